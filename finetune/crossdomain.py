"""What the next hospital costs: taught in some domains, judged in another; frozen features, or adapted backbones.

A domain is a source of the index, or the values of any column of its table (--by domain, --by scanner). Two questions:

  an unseen domain         each in turn is left out: a head of all the others, against a head of all
  train here, test there   a head of one domain on the images of another, against the head of that other

Both sides of a gap are read on the same test images and among the classes that both were taught, so a gap is the price
of not having been taught there, and not of harder cases. Intervals resample patients or lesions.

  python -m finetune crossdomain --backbone models/derm-s --data data/ham --by domain --out results/derm-s
  python -m finetune crossdomain --backbone models/derm-s --data data/ham --to data/pad --map nv=NEV bcc=BCC mel=MEL \\
      akiec=ACK bkl=SEK --out results/derm-s      (two indexes, whose classes have other names)

Writes OUT/crossdomain-COLUMN-METHOD/results.json and report.html. The scores kept for `fair` are those of the
head that was never taught in an image's own domain.
"""

from __future__ import annotations

import argparse
import difflib
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from finetune import adapt, adapters, crossdomain_page, heads, options, task, ways, written
from finetune.columns import meta_column
from finetune.domains import CLASS_IMAGES, Gap, Head, Pair, Pool, eligible, judge
from finetune.resample import GROUPS, mean
from finetune.splits import Leaks, guard
from hybridssl.errors import UserError
from shards.index import Index
from shards.terminal import Terminal

Array = np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    add = parser.add_argument
    what = f"what is taught (logistic): {', '.join(ways.METHODS)}"
    add("--methods", nargs="+", choices=ways.METHODS, default=["logistic"], metavar="M", help=what)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--by", default="source", metavar="COLUMN", help="column that says the domain (source)")
    way.add_argument("--to", type=Path, metavar="DIR", help="another index: the two are the domains")
    add("--map", nargs="+", default=[], metavar="OURS=THEIRS", help="class of --data and its name in --to")
    least = f"a domain needs so many train and test images (30), and test patients or lesions, up to {GROUPS} of them"
    add("--min-images", type=int, default=30, metavar="N", help=least)
    add("--min-classes", type=int, default=2, metavar="N", help=f"... and classes with {CLASS_IMAGES} of each (2)")
    adapt.add_training_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.map and not args.to:
        raise UserError("--map renames the classes of a second index: name that with --to")
    adapted = [method for method in args.methods if method in ways.ADAPTED]
    if args.to and adapted:
        raise UserError(f"--to judges frozen features: {', '.join(adapted)} asks for one index with --by")
    if args.to and (args.grades or args.multi_label or args.positive):
        raise UserError("--to judges sets with one class an image: leave --grades, --multi-label and --positive away")
    if args.min_classes < 2:
        raise UserError(f"--min-classes {args.min_classes} must be 2 or more: one class is nothing to tell apart")
    name = domain_names(args)[1] if args.to else args.by
    protocols = {m: f"crossdomain-{re.sub('[^A-Za-z0-9_.]+', '-', name)}-{m}" for m in args.methods}
    work = task.prepare(args, list(protocols.values()))
    more: dict[str, Any] = {}
    if adapted:
        adapters.require_trainable(work.encoder)
    if args.to:
        other = task.prepare(argparse.Namespace(**{**vars(args), "data": args.to, "source": None}), [])
        pool, leaks = two_indexes(work, other, args.map, domain_names(args))
        more = {"leaks": leaks.as_dict(), "to": other.about("")["data"] | {"map": args.map}}
    else:
        pool = one_index(work, args.by)
    kept, skipped = eligible(pool, args.seeds, args.min_images, args.min_classes)
    if len(kept) < 2:
        why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or f"all are {kept[0]}"
        raise UserError(f"{name}: fewer than two domains can be judged ({why}); see --by, --min-images, --min-classes")
    for method, protocol in protocols.items():
        study_domains(work, pool, kept, skipped, method, protocol, more)


# -- pools ------------------------------------------------------------------------------------------------------------


def one_index(work: task.Task, by: str) -> Pool:
    """The labelled images of one index, in the domains that the column `by` names."""
    domain = meta_column(work.index, work.features.numbers, by)
    own = work.features
    return Pool(own.x, work.y, own.group, own.numbers, domain, work.test, work.split, work.classes, work.kind)


def two_indexes(work: task.Task, other: task.Task, rules: list[str], names: tuple[str, str]) -> tuple[Pool, Leaks]:
    """The images of two indexes, the classes of the second under the names of the first.

    UserError for an image in a training split of one and judged in the other, unless --allow-leak.
    """
    renamed = renames(rules, work.classes, other.classes)
    theirs = [renamed.get(c, c) for c in other.classes]
    classes = (*work.classes, *dict.fromkeys(c for c in theirs if c not in work.classes))
    first = len(work.y)

    def split(seed: int) -> tuple[Array, Array]:
        ours, others = work.split(seed), other.split(seed)
        return tuple(np.concatenate([a, b + first]) for a, b in zip(ours, others, strict=True))  # type: ignore

    groups = [np.unique(t.features.group, return_inverse=True)[1] for t in (work, other)]
    groups[1] = groups[1] + groups[0].max() + 1  # patient 7 of one hospital is not patient 7 of the other
    pool = Pool(
        x={kind: np.concatenate([v, other.features.x[kind]]) for kind, v in work.features.x.items()},
        y=np.concatenate([work.y, np.array([classes.index(c) for c in theirs])[other.y]]),
        group=np.concatenate(groups),
        number=np.concatenate([work.features.numbers, other.features.numbers]),
        domain=np.repeat(names, [first, len(other.y)]),
        test=np.concatenate([work.test, other.test + first]),
        split=split,
        classes=classes,
        kind=work.kind,  # one class an image: its metrics do not know how many there are
    )
    a, b = (_digests(t) for t in (work, other))
    both = np.isin(a["train"], b["judged"]).sum() + np.isin(b["train"], a["judged"]).sum()
    across = guard(Leaks(None, 0, int(both)), work.args.allow_leak)
    known = [t.leaks.pretraining for t in (work, other) if t.leaks.pretraining is not None]
    counts = [sum(getattr(t.leaks, name) for t in (work, other)) for name in ("groups", "images")]
    total = Leaks(sum(known) if known else None, counts[0], counts[1] + across.images)
    return pool, replace(total, allowed=total.any and work.args.allow_leak)


def _digests(work: task.Task) -> dict[str, Array]:
    digest, numbers = np.asarray(work.index.column("digest")), work.features.numbers
    judged = np.concatenate([rows for name, rows in work.rows.items() if name != "train"])
    return {"train": digest[numbers[work.rows["train"]]], "judged": digest[numbers[judged]]}


def renames(rules: list[str], ours: tuple[str, ...], theirs: tuple[str, ...]) -> dict[str, str]:
    """["nv=NEV"] -> {"NEV": "nv"}. UserError for a rule that names no class, or one of theirs twice."""
    found: dict[str, str] = {}
    for rule in rules:
        mine, _, their = rule.partition("=")
        for name, known, where in ((mine, ours, "--data"), (their, theirs, "--to")):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.5)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise UserError(f"--map {rule}: {where} has no class '{name}'; {hint}It has {', '.join(known)}")
        if their in found:
            raise UserError(f"--map gives '{their}' two names, '{found[their]}' and '{mine}': choose one")
        found[their] = mine
    return found


def domain_names(args: argparse.Namespace) -> tuple[str, str]:
    """What the two indexes are called: by their one source, or else by their folders."""
    indexes = [Index.open(path) for path in (args.data, args.to)]
    ours, theirs = (i.sources[0] if len(i.sources) == 1 else i.root.resolve().name for i in indexes)
    return (ours, theirs) if ours != theirs else (ours, f"{theirs}-2")


# -- judging ----------------------------------------------------------------------------------------------------------


def study_domains(
    work: task.Task, pool: Pool, kept: list[str], skipped: dict[str, str], method: str, protocol: str, more: dict
) -> None:
    """Fit every head that a pair asks for, judge, and write result and page."""
    seeds, everyone = work.args.seeds, tuple(kept)
    held_out = [Pair(d, everyone, tuple(k for k in kept if k != d)) for d in kept]
    transfers = [Pair(there, (there,), (here,)) for here, there in permutations(kept, 2)]
    homes = [Pair(d, (d,), (d,)) for d in kept]  # the diagonal: at home, among all classes of the place
    pairs = [*held_out, *transfers, *homes]
    wanted: list[Head] = list(dict.fromkeys(head for pair in pairs for head in (pair.home, pair.away)))
    scores, taught = {}, {}
    choices: list[dict[str, Any]] = [{"seed": seed} for seed in seeds]
    for head in track(wanted, f"{method} heads", console=Terminal(stderr=True), transient=True):
        judged = []
        for seed, choice in zip(seeds, choices, strict=True):
            train, val = pool.parts(seed, *head)
            found = teach(work, pool, method, train, val, seed)
            choice[" + ".join(head)] = found.choice
            judged.append(found.predict(pool.test))
        scores[head] = np.stack(judged)
        taught[head] = [pool.parts(seed, *head)[0] for seed in seeds]
    found = judge(pool, pairs, scores, taught)
    apart = {pair.there: found[pair] for pair in held_out if pair in found}
    if not apart:
        raise UserError(f"no domain of {', '.join(kept)} shares two classes with the others: there is nothing to judge")
    detail = {
        "by": None if work.args.to else work.args.by,
        "metric": pool.kind.select_by,
        "method": method,
        "domains": {d: _sizes(pool, d, seeds[0]) for d in kept},
        "skipped": skipped,
        "held_out": [{"domain": d, **_row(gap)} for d, gap in apart.items()],
        "matrix": [{"train": p.away[0], "test": p.there, **_row(found[p])} for p in [*transfers, *homes] if p in found],
    }
    moved = [found[pair].gap for pair in transfers if pair in found]
    figures = {
        "in_domain": mean([g.home for g in apart.values()]).interval,
        "out_of_domain": mean([g.away for g in apart.values()]).interval,
        "gap": mean([g.gap for g in apart.values()]).interval,
        **{f"gap_{d}": g.gap.interval for d, g in apart.items()},
        **({"transfer_gap": mean(moved).interval} if moved else {}),
    }
    detail["said"] = crossdomain_page.said(detail["metric"], detail["held_out"], figures["gap"])
    used = {part: [len(pool.parts(seed, *kept)[n]) for seed in seeds] for n, part in enumerate(("train", "val"))}
    notes = [*work.notes([taught[everyone][n] for n in range(len(seeds))] if not work.args.to else _own(work))]
    notes += task.rich_val(used)
    notes += [f"left out, {name}: {reason}" for name, reason in skipped.items()]
    lost = [d for d in kept if d not in apart]
    notes += [f"{d} shares fewer than two classes with the others: not judged as unseen" for d in lost]
    grid = heads.weighed(ways.settings(work.args, method), method, pool.kind)
    selected = {"grid": grid, "choices": choices}
    arrays = _unseen(work, pool, held_out, scores)
    result = written.write(work, protocol, figures, selected, used, arrays, notes, detail=detail, **more)
    crossdomain_page.page(result)


def teach(work: task.Task, pool: Pool, method: str, train: Array, val: Array, seed: int) -> ways.Taught:
    """A head of the pool's rows, which are the task's own where there is one index."""
    if not work.args.to:
        return ways.teach(work, method, work.args, train, val, seed)
    head = heads.fit(method, pool.x, pool.y, train, val, pool.kind, len(pool.classes), seed)
    choice = {**head.choice, "val": round(head.val, 4)}
    return ways.Taught(lambda rows: head.predict(heads.take(pool.x, rows)), choice)


def _own(work: task.Task) -> list[Array]:
    return [work.split(seed)[0] for seed in work.args.seeds]


def _sizes(pool: Pool, domain: str, seed: int) -> dict[str, Any]:
    parts = (*pool.parts(seed, domain), pool.of(pool.test, domain))
    counts = {c: int(n) for c, n in zip(pool.classes, pool.counts(parts[2]), strict=True) if n}
    return {**dict(zip(("train", "val", "test"), map(len, parts), strict=True)), "test_classes": counts}


def _row(gap: Gap) -> dict[str, Any]:
    parts = {"home": gap.home, "away": gap.away, "gap": gap.gap}
    figures = {name: heads.as_dict(draws.interval) for name, draws in parts.items()}
    return {**figures, "classes": gap.classes, "images": gap.images}


def _unseen(work: task.Task, pool: Pool, held_out: list[Pair], scores: dict[Head, Array]) -> dict[str, Array]:
    """Predictions of the test images of the kept domains by the heads that were not taught there.

    With --to, `scores` are of the images of --data, and `to_scores` those of the others, over --data's classes and then
    the classes that only the others have."""
    domain = pool.domain[pool.test]
    away, home = (np.zeros_like(next(iter(scores.values()))) for _ in range(2))
    for pair in held_out:
        here = domain == pair.there
        away[:, here], home[:, here] = scores[pair.away][:, here], scores[pair.home][:, here]
    kept = np.isin(domain, [pair.there for pair in held_out])
    ours = kept & (pool.test < len(work.y))
    rows, own = pool.test[ours], slice(0, len(work.classes))
    arrays = {
        "scores": away[:, ours, own].astype(np.float32),
        "home_scores": home[:, ours, own].astype(np.float32),
        "y": pool.y[rows],
        "group": work.features.group[rows],
        "number": work.features.numbers[rows],
    }
    if not work.args.to:
        return arrays
    theirs = kept & (pool.test >= len(work.y))
    rows = pool.test[theirs]
    of_rows = {"to_y": pool.y[rows], "to_group": pool.group[rows], "to_number": pool.number[rows]}
    return arrays | {"to_scores": away[:, theirs].astype(np.float32), **of_rows}
