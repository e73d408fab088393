"""Addresses of data, whole for whoever fetches, and without what must not be written down: keys, passwords, signatures.

`https://user:password@host/set?sig=...` is such an address. It is used as it is, and told and recorded as
`https://host/set`.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

ADDRESS = re.compile(r"(s3|gs|hf|https?):/+(.*)", re.DOTALL)  # a Path has turned // into /
_SCHEME = r"(?:s3|gs|hf|https?):/+"
_INSIDE = re.compile(rf"\b{_SCHEME}(?:(?!,{_SCHEME})[^\s'\"<>\\])+")  # a comma before another ends an address


def public(address: str) -> str:
    """The address without its credentials; what is no address (a folder, a hub id) as it is."""
    match = ADDRESS.fullmatch(address.strip())
    if not match:
        return address
    place = re.split(r"[?#]", match[2], maxsplit=1)[0]
    host, slash, path = place.partition("/")
    return f"{match[1]}://{host.rpartition('@')[2]}{slash}{path}"


def whole(address: str) -> str:
    """The address as a Path may have left it, with both slashes, and none before its query. Raises nothing."""
    match = ADDRESS.fullmatch(address)
    if not match:
        return address
    place, mark, query = match[2].partition("?")
    return f"{match[1]}://{place.rstrip('/')}{mark}{query}"


def below(address: str, name: str) -> str:
    """The address of a file in that folder: its name goes before the query."""
    place, mark, query = address.partition("?")
    return f"{place}/{quote(name) if address.startswith('http') else name}{mark}{query}"


def told(text: str) -> str:
    """A text without the credentials of the addresses in it, such as a command line."""
    return _INSIDE.sub(lambda match: public(match[0]), text)


def hushed(text: str, address: str) -> str:
    """What a driver said, without the credentials of `address`, wherever they stand in it."""
    text = told(text)
    for secret in sorted(_secrets(address), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets(address: str) -> set[str]:
    """User, password, query and the values in it, plain and quoted; what is too short to be told from words stays."""
    place, _, query = whole(address).partition("?")
    host = place.split("://", 1)[-1].partition("/")[0]
    user = host.rpartition("@")[0]
    found = {user, *user.split(":"), query, *(part.partition("=")[2] for part in query.split("&"))}
    return {form for text in found for form in (text, quote(text, safe=""), unquote(text)) if len(form) > 3}
