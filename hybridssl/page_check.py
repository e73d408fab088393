"""Does some HTML hold only what `Page` and the charts write? Asked of a page that lies among results, before its body
goes into another page: results are sent around.

It is read strictly, token by token. What a browser might understand otherwise than we do is no page of ours.
"""

from __future__ import annotations

import re

ELEMENT = re.compile(
    "a|b|br|caption|circle|dd|div|dl|dt|figcaption|figure|h2|h3|h4|img|p|path|polygon|polyline|rect|small|span|svg|"
    "table|tbody|td|text|thead|th|title|tr|tspan"
)
ATTRIBUTE = re.compile(
    "alt|aria-label|class|cx|cy|d|dx|fill|fill-opacity|height|href|id|points|r|role|rx|src|stroke|stroke-dasharray|"
    "stroke-linecap|stroke-linejoin|stroke-opacity|stroke-width|style|text-anchor|viewBox|width|x|y"
)
_TOKEN = re.compile(r"""[^<]+|</([a-z][a-z0-9]*)>|<([a-z][a-z0-9]*)((?: [A-Za-z-]+=(?:"[^"<>]*"|[\w-]+))*)/?>""")
_GIVEN = re.compile(r""" ([A-Za-z-]+)=(?:"([^"]*)"|([\w-]+))""")
_HARMLESS = {
    "href": re.compile(r"#[\w-]*|(?!//)[^:\\\s&]*"),  # a place in the page, or a path beside it
    "src": re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=]*"),
    "style": re.compile(r"(?!.*(?:url|image|expression|import|position|\\|/\*|@))[^&]*", re.IGNORECASE),
}


def strange(markup: str) -> str:
    """The first thing in `markup` that no page of ours has; "" when there is none."""
    at = 0
    while at < len(markup):
        token = _TOKEN.match(markup, at)
        if not token:
            return markup[at : at + 40]
        name, attributes = token[1] or token[2], token[3] or ""
        if name and not ELEMENT.fullmatch(name):
            return token[0][:40]
        for attribute, quoted, bare in _GIVEN.findall(attributes):
            rule = _HARMLESS.get(attribute)
            if not ATTRIBUTE.fullmatch(attribute) or (rule and not rule.fullmatch(quoted or bare)):
                return token[0][:40]
        at = token.end()
    return ""
