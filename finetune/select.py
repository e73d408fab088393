"""Which images should be labelled next? Proposes N of the unlabelled ones and writes the table for the annotators.

Looks at the unlabelled images of the train split in the backbone's feature space. Images of patients or lesions that
are in val or test are never proposed, nor copies of labelled images, and at most one image a patient or lesion is.

  typiclust    the most typical image of each region that has no label yet (the default; best with few labels)
  coverage     the image farthest from all labels, again and again: finds what is rare, and what is broken
  uncertainty  where a probe trained on the present labels hesitates (needs labels; best with many)
  random       what the others have to beat

  python -m finetune select --backbone models/derm-s --data data/derm --count 200 --out results/round-1

writes results/round-1/select/to_label.csv with an empty column `label`, the images beside it in images/, and a page.
When the column is filled, this makes a labelled index of them:

  python -m shards build --images results/round-1/select/images --table results/round-1/select/to_label.csv \\
      --out data/derm-round-1
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune import kinds, labelfree, probe, question, results, strategies, to_label
from finetune.encoder import Encoder
from finetune.features import Features, groups_of
from finetune.gallery import thumbnails
from finetune.metrics import Interval, bootstrap
from finetune.pages import begin, close
from finetune.splits import label_subset
from finetune.strategies import Pick, Pool
from finetune.task import CARVED
from hybridssl.errors import UserError
from hybridssl.page import Markup, Page, inline
from hybridssl.probe import neighbours
from shards.index import Index
from shards.terminal import Terminal

Array = np.ndarray
SHOWN = 60


@dataclass(frozen=True)
class Choice:
    """What there was to choose from, and what was chosen."""

    pool: Features
    known: Features
    space: Pool
    picks: list[Pick]
    chosen: dict[str, Any]  # the seed, and of `uncertainty` the probe's hyper-parameters
    judged_on: str  # the images on which those were chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    labelfree.add_arguments(parser, "index with unlabelled images in its train split")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many images to propose")
    names = [*strategies.FROM_FEATURES, "uncertainty"]
    parser.add_argument("--strategy", choices=names, default="typiclust", help="see above (typiclust)")
    parser.add_argument("--per-group", type=int, default=1, metavar="N", help="images a patient or lesion (1); 0: any")


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    if args.count < 1 or args.per_group < 0:
        raise UserError(f"--count {args.count} must be 1 or more, and --per-group {args.per_group} not negative")
    index, out = Index.open(args.data), args.out / "select"
    numbers = candidates(index)
    encoder = labelfree.open_encoder(args)
    data = {"sha256": index.sha256, "labels": 0.0, "source": None}
    identity = {"protocol": "select", "backbone": encoder.about(), "data": data}
    results.check_room(out, identity, args.overwrite)
    if not args.overwrite:
        to_label.keep_work(out)
    choice = choose(args, encoder, index, *numbers)
    pool, picks = choice.pool, choice.picks
    rows = np.array([pick.row for pick in picks])
    about = labelfree.about("select", encoder, index, args.data, {"pool": pool, "labelled": choice.known})
    about |= {
        "task": None,
        "seeds": [args.seed],
        "selected": {"split": choice.judged_on, "by": args.strategy, "grid": {}, "choices": [choice.chosen]},
        "cost": labelfree.cost(started, len(choice.known)),
        "notes": notes(pool),
    }
    to_label.write(out, index, pool.numbers, picks)
    figures, scores = nearness(choice.space, rows, args), np.array([pick.score for pick in picks])
    about["detail"] = {"strategy": args.strategy, "count": args.count, "per_group": args.per_group}
    about["detail"]["build"] = to_label.build_options(index, out / to_label.IMAGES)
    about["detail"]["said"] = said(choice, args.strategy, figures)
    results.write(out, about, figures, number=pool.numbers[rows], score=scores)
    page(about, choice, out / "results.json").write(out / "report.html")
    console = Terminal()
    console.print(f"{len(picks):,} of {len(pool):,} unlabelled images proposed by {args.strategy}", style="bold")
    for note in about["notes"]:
        console.print(f"note: {note}")
    console.print(f"fill the column `label` of {out / to_label.TABLE}, then:", soft_wrap=True)
    console.print(to_label.feed_back(out, about["detail"]["build"]), soft_wrap=True)


def choose(args: argparse.Namespace, encoder: Encoder, index: Index, unlabelled: Array, labelled: Array) -> Choice:
    """Features of both, and the picks of the strategy. UserError when there are fewer images than asked for."""
    wanted, doubting = labelled, args.strategy == "uncertainty"
    if doubting:
        val = labelfree.in_splits(index, ("val",))
        wanted = np.concatenate([labelled, val[index.column("label")[val] >= 0]])
    features = labelfree.features_of(args, encoder, index, np.concatenate([unlabelled, wanted]))
    pool, known, taught = (features.take(np.isin(features.numbers, part)) for part in (unlabelled, labelled, wanted))
    space = strategies.pool_of(pool.x["cls"], pool.group, known.x["cls"], known.group, args.per_group)
    member, left = space.room()
    room = int(np.minimum(np.bincount(member), left).sum())
    if room < args.count:
        limit = f" with {args.per_group} a patient or lesion" if args.per_group else ""
        raise UserError(f"{index} has {room:,} unlabelled images to propose{limit}, not --count {args.count:,}")
    if doubting:
        picks, chosen = doubtful(taught, pool, space, args)
        return Choice(pool, known, space, picks, chosen, "val, or a part of train where there is no val")
    picks = strategies.FROM_FEATURES[args.strategy](space, args.count, args.seed)
    return Choice(pool, known, space, picks, {"seed": args.seed}, "none: nothing is chosen")


def candidates(index: Index) -> tuple[Array, Array]:
    """Numbers of what may be proposed, and of what has a label in train. UserError when there is nothing to propose."""
    train = labelfree.in_splits(index, ("train", ""))
    held = labelfree.in_splits(index, ("val", "test"))
    label, digest = index.column("label"), index.column("digest")
    unlabelled, labelled = train[label[train] < 0], train[label[train] >= 0]
    if not len(unlabelled):
        raise UserError(f"{index.root} has no unlabelled image in its train split: there is nothing to propose")
    allowed = ~np.isin(groups_of(index, unlabelled), groups_of(index, held))
    allowed &= ~np.isin(digest[unlabelled], digest[np.concatenate([held, labelled])])
    unlabelled = unlabelled[allowed]
    unlabelled = np.sort(unlabelled[np.unique(digest[unlabelled], return_index=True)[1]])  # one of identical files
    if not len(unlabelled):
        raise UserError(f"all unlabelled images of {index.root} are of patients in val or test, or copies of others")
    return unlabelled, labelled


def doubtful(labelled: Features, pool: Features, space: Pool, args: argparse.Namespace) -> tuple[list[Pick], dict]:
    """The uncertainty strategy: fit the probe on the labels there are, its C chosen on val or on a part of train."""
    occurring = np.flatnonzero(labelled.y.any(0))
    if len(occurring) < 2:
        raise UserError(f"{pool.index} has labels of {len(occurring)} classes: start with --strategy typiclust")
    classes = [labelled.classes[k] for k in occurring]
    several = bool((labelled.y.sum(1) > 1).any())
    if several:
        question.all_known(labelled, [int(k) for k in occurring], "choose another --strategy")
    kind = kinds.choose("multi-label" if several else "one-of", classes)
    y = labelled.y[:, occurring] if several else np.searchsorted(occurring, labelled.label)
    splits = np.array(labelled.index.splits)[labelled.index.column("split")[labelled.numbers]]
    val = splits == "val"
    if not val.any():
        strata = labelled.y[:, occurring].argmax(1)
        val = label_subset(strata, labelled.group, CARVED, args.seed, keep_one=True)
    if not val.any() or val.all():
        raise UserError(f"{pool.index} has too few labels to fit and judge a probe: start with --strategy typiclust")
    if not several and len(np.unique(y[~val])) < 2:  # val may name more
        raise UserError(
            f"{pool.index} has train labels of one class to fit a probe on: start with --strategy typiclust"
        )
    rows = np.flatnonzero(~val), np.flatnonzero(val)
    head = probe.fit(labelled.x, y, *rows, kind, len(classes), args.seed)
    picks = strategies.uncertainty(space, args.count, head.predict(pool.x), classes, several)
    return picks, {"seed": args.seed, **head.choice, "val": round(head.val, 4)}


def nearness(space: Pool, rows: Array, args: argparse.Namespace) -> dict[str, Interval]:
    """Mean distance of an unlabelled image to the nearest that is labelled or chosen; the same for a random choice; and
    the difference of the two, over the same images."""

    def distance(chosen: Array) -> Array:
        return 1 - neighbours(np.concatenate([space.known, space.x[chosen]]), space.x, 1)[0][:, 0]

    def mean(near: Array) -> Interval:
        average = {"mean": lambda y, scores, weight: weight @ near / weight.sum(1)}
        return bootstrap(near, near[:, None], space.group, average)["mean"]

    ours = distance(rows)
    drawn = distance(np.array([pick.row for pick in strategies.random(space, args.count, args.seed + 1)]))
    found = {"nearest_distance": ours, "nearest_distance_random": drawn, "nearest_distance_difference": ours - drawn}
    return {name: mean(values) for name, values in found.items()}


def said(choice: Choice, strategy: str, figures: dict[str, Interval]) -> list[str]:
    """What is proposed, how it lies beside a random choice, and what that does not say."""
    ours, theirs, less = figures.values()
    shown = "shown to be nearer" if less.high < 0 else "shown to be farther" if less.low > 0 else "not shown to differ"
    return [
        f"{len(choice.picks):,} of {len(choice.pool):,} unlabelled images are proposed, by {strategy}.",
        f"Once they are labelled, the mean distance (1 - cosine) of an unlabelled image to the nearest labelled one is "
        f"{ours}; with a random choice of as many {theirs}: {shown}, {less.signed()}.",
        "Not shown: that a classifier will be better for it, which only a comparison on labelled data tells (python -m "
        "benchmarks.selection runs one). And a choice that is not random is no sample of the patients: never estimate "
        "how frequent a disease is, or how good a classifier is, from these labels.",
    ]


def notes(pool: Features) -> list[str]:
    said, index = [], pool.index
    if not (index.column("group")[pool.numbers] != 0).any():
        said.append("the index has no groups: several of the proposed images may be of one patient")
    if index.synthetic:
        said.append("synthetic images: these figures say nothing about patients")
    return said


def page(about: dict[str, Any], choice: Choice, path: Path) -> Page:
    strategy, data, picks = about["detail"]["strategy"], about["data"], choice.picks
    command = to_label.feed_back(Path("."), about["detail"]["build"])
    html = Page("What to label next", f"{len(picks):,} images of {data['index']}, chosen by {strategy}")
    begin(html, about, path)
    html.facts(
        [
            ("Unlabelled images to choose from", len(choice.pool)),
            ("Labelled in train already", len(choice.known)),
            ("Proposed", len(picks)),
        ]
    )
    html.section("How to go on")
    html.text(
        "Look at the images in images/ and fill the column “label” of to_label.csv: several labels as a|b, none where "
        f"nobody can say. Then make an index of them: {command}"
    )
    html.text(
        f"Or copy the labels into the table from which {data['index']} was built (the column “original” has the path "
        "of each image), and build that again."
    )
    html.section(
        "The proposed images", "In the order in which they were chosen: should time run out, label from the top."
    )
    shown = picks[:SHOWN]
    images = thumbnails(choice.pool.index, choice.pool.numbers[[pick.row for pick in shown]])
    cells = [
        (image, Markup(f"<b>{n}</b> {inline(p.reason)}"))
        for n, (image, p) in enumerate(zip(images, shown, strict=True), 1)
    ]
    html.images([cells[at : at + 6] for at in range(0, len(cells), 6)], cell=140)
    if len(picks) > SHOWN:
        html.text(f"The other {len(picks) - SHOWN:,} are in the table.")
    close(html, about, path)
    return html
