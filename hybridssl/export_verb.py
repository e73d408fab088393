"""python -m hybridssl export: a run's backbone as a folder for timm and transformers, and from there to the hub."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hybridssl import push
from hybridssl.errors import UserError

DESCRIPTION = """\
Write the backbone of a run as a folder that timm and transformers load unchanged, with a model card:

  python -m hybridssl export runs/derm-s --out models/derm-s --license apache-2.0 --results results/derm

  timm.create_model("local-dir:models/derm-s", pretrained=True, num_classes=0)
  transformers.AutoModel.from_pretrained("models/derm-s")

Both are tried before the folder appears; should they give other features than the trained backbone, nothing is written.

Read the card, mend it by hand, then publish the folder as it stands (or add --push to the line above):

  python -m hybridssl export models/derm-s --push ORG/NAME --private

Without --push nobody is contacted. A push sends the parts of an export and no other file of the folder, says beforehand
which, and gives each step a tag. An upload that broke goes on with the same line.
"""
CARD = ("license", "results", "dataset", "data_license", "tag")
WRITING = ("out", "which", "overwrite", "onnx", *CARD)  # what has no meaning for a folder that is an export already
PUSHING = ("private", "revision", "retag")


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "checkpoint", metavar="RUN", help="run folder, one of its checkpoints/step-N, or an exported folder"
    )
    verb.add_argument("--out", metavar="DIR", help="folder to write")
    verb.add_argument("--which", choices=("teacher", "student"), help="default: teacher")
    verb.add_argument("--onnx", action="store_true", help="model.onnx too, checked in onnxruntime (any image size)")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier export at DIR")
    card = verb.add_argument_group(
        "for the model card, which is public once the folder is; the last four may be repeated"
    )
    card.add_argument("--license", metavar="ID", help="of the weights, for example apache-2.0")
    card.add_argument(
        "--results", action="append", metavar="DIR", help="results of finetune; those of this backbone count"
    )
    card.add_argument("--dataset", action="append", metavar="ID", help="training data that are on the hub")
    card.add_argument("--data-license", action="append", metavar="TEXT", help="as 'HAM10000: CC BY-NC 4.0'")
    card.add_argument("--tag", action="append", metavar="TEXT", help="for the hub's search, for example dermatology")
    hub = verb.add_argument_group("to the hub")
    hub.add_argument("--push", metavar="ORG/NAME", help="repository to send the folder to; created if there is none")
    hub.add_argument("--private", action="store_true", help="only its owners see it; refused if it is public already")
    hub.add_argument("--revision", metavar="TAG", help="default: step-N, the step of the checkpoint")
    hub.add_argument("--retag", action="store_true", help="move TAG if it stands for other files")


def run(args: argparse.Namespace) -> None:
    exported = _is_export(args.checkpoint)
    _check(args, exported)
    folder = args.checkpoint if exported else _export(args)
    if args.push:
        _push(args, folder)


def _is_export(folder: str) -> bool:
    return (Path(folder) / "pretraining.json").is_file()


def _check(args: argparse.Namespace, exported: bool) -> None:
    """UserError for options that contradict each other, before any work."""
    given = {name for name, value in vars(args).items() if value}
    if exported and (ours := [name for name in WRITING if name in given]):
        raise UserError(
            f"{args.checkpoint} is an export already and is pushed as it stands: {_flags(ours)} belong to a run; "
            "export the run again"
        )
    if exported and not args.push:
        raise UserError(f"{args.checkpoint} is an export already: --push ORG/NAME publishes it")
    if not exported and not args.out:
        raise UserError("--out DIR is missing: the folder to write, for example models/derm-s")
    if not args.push and (ours := [name for name in PUSHING if name in given]):
        raise UserError(f"{_flags(ours)} without --push ORG/NAME has no meaning")
    if args.push:  # no work for a push that cannot be
        push.check_names(args.push, args.revision or "")
        push.require_token()
        if args.out and _is_export(args.out) and not args.overwrite:
            raise UserError(
                f"{args.out} holds an export already: `python -m hybridssl export {args.out} --push {args.push}` sends "
                "it as it stands, --overwrite writes it anew"
            )


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _export(args: argparse.Namespace) -> str:
    from hybridssl.export import export
    from hybridssl.stated import Stated

    lists = (tuple(given or ()) for given in (args.dataset, args.data_license, args.tag))
    stated = Stated(args.license or "", *lists, results=_results(args.results or ()))
    report = export(args.checkpoint, args.out, args.which or "teacher", stated, args.overwrite, args.onnx)
    print(f"{args.out}: {args.which or 'teacher'} of step {report.step:,}")
    figures = ", ".join(f"{library} {far:.1e}" for library, far in report.parity.items())
    print(f"difference from the trained backbone: {figures}")
    if args.results:
        print(f"evaluations of this backbone in the model card: {report.results}")
    if not args.license:
        print("note: the model card states no licence; --license ID fills it in")
    if not args.push:
        name = Path(args.out).name
        print(f"next: python -m finetune probe --backbone {args.out} --data FOLDER --out results/{name}")
    return args.out


def _results(folders: Sequence[str]) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Folder -> results in it. Reading them is the evaluation's own business, which no part here knows."""
    if not folders:
        return {}
    find = import_module("finetune.results").find
    return {folder: [result.about for result in find([Path(folder)])] for folder in folders}


def _push(args: argparse.Namespace, folder: str) -> None:
    plan = push.plan(folder, args.push, args.revision or "", args.private)
    print("\n".join(plan.lines()), flush=True)
    outcome = push.upload(plan, args.retag)
    seen = "private" if outcome.private else "public"
    print(f"{outcome.url}: {'sent' if outcome.new else 'the same files are there already'}, {seen}")
    print(f'timm.create_model("hf-hub:{plan.repo}@{plan.tag}", pretrained=True, num_classes=0)')
