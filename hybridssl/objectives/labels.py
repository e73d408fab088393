"""Partial labels of several sources: what a source cannot name is unknown, what it could have named is a negative."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridssl import ontology
from hybridssl.dist import all_reduce_sum, world_size
from hybridssl.errors import UserError
from hybridssl.heads import fp32, linear32
from hybridssl.objectives import Context, Objective, ObjectiveOptions
from hybridssl.types import Batch, ViewTokens
from hybridssl.vocabulary import Vocabulary


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    kind: Literal["one_of", "multi"] = "one_of"  # softmax (one diagnosis an image) or sigmoids (several findings)
    view: Literal["clean", "global"] = "clean"  # the mild view, or both augmented global ones
    head: Literal["cosine", "linear", "mlp"] = "cosine"  # mlp: a projection before the cosines, for labels so few that
    # the backbone learns them by heart: the projection does instead, and is not exported (t-ReX, arXiv 2206.15369)
    init: Literal["random", "text"] = "random"  # text: prototypes from `python -m hybridssl prototypes`
    scale: float = 10.0  # of the cosines: 1 / temperature
    smoothing: float = 0.0  # label smoothing, over the classes that the image's source can name
    dropout: float = 0.0  # on the features, before the head
    head_first: float = 0.0  # share of the run until which only the head learns, and the backbone does not: it then
    # meets a head that knows the classes (LP-FT, arXiv 2202.10054)
    unfreeze_at: float = 0.1  # share of the run until which text prototypes rest; 0 or `start`: they do not; 1: always
    ontology: str = ""  # CSV (name,parents): for classes that are kinds of others, or sources of unlike detail
    adjust: bool = False  # one_of: logits + log prior of the class in its source (logit adjustment, arXiv 2007.07314),
    # for frequencies that differ between sources, and for data drawn as they come; no image is shown more often for it
    pseudo_above: float = 1.0  # probability from which the teacher's answer labels an unlabelled image; 1: never

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 < self.pseudo_above <= 1:
            raise UserError(
                f"objectives.labels.pseudo_above={self.pseudo_above}: use a probability above .5, such as .95; 1: none"
            )
        later = f"{min(self.start + 0.05, (1 + self.start) / 2):g}"
        if 0 < self.head_first <= self.start:
            raise UserError(
                f"objectives.labels.head_first={self.head_first} is a share of the whole run, and labels start at "
                f"{self.start}: no head would learn first. Take one behind that, such as {later}, or 0"
            )
        if self.init == "text" and 0 < self.unfreeze_at < self.start:
            raise UserError(
                f"objectives.labels.unfreeze_at={self.unfreeze_at} is a share of the whole run, and labels start at "
                f"{self.start}: the words would never rest. Take one behind that, such as {later}, or 0"
            )
        if self.adjust and self.kind == "multi":
            raise UserError(
                "objectives.labels.adjust works with kind=one_of alone: with several findings an image the biases of "
                "the head learn what is rare"
            )


class Target(NamedTuple):
    """For one micro-batch. The factors turn sums over images into this micro-batch's share of the mean."""

    labelled: Tensor  # scalar
    unlabelled: Tensor | None = None  # scalar
    true: Tensor | None = None  # bool [B, V]: what the teacher holds true of the unlabelled images
    known: Tensor | None = None  # bool [B, V]: what it is sure of, true or false


class Labels(Objective):
    """Cross-entropy of the student's CLS token with class prototypes, over the classes that its source can name.

    one_of: softmax restricted to these classes. multi: DermINO (arXiv 2508.12190), the mean over labelled views of
    sum_c m_c BCE(logit_c, y_c) / sum_c m_c, with m = 1 for these classes. An image without a label is skipped, and
    for one_of also one that is labelled as none of its source's classes. An image without a source may name every
    class. The mean is over all labelled views of all micro-batches and processes.

    **Ontology.** Ancestors are further classes; hybridssl/vocabulary.py says what a label tells of them. multi: each
    ancestor has a prototype and a sigmoid of its own. one_of: an ancestor's probability is the sum of its classes'
    (Valmadre 2022, arXiv 2210.10929, "flat softmax"), and an image's loss the mean of -log p over its label and the
    ancestors: the hierarchical cross-entropy of Bertinetto et al. 2020 (arXiv 1912.09393, section 3.1), its weights
    growing linearly towards the root. A label may stand anywhere in the hierarchy.

    **Pseudo-labels** (FixMatch, arXiv 2001.07685, eq. 4, with the teacher as the labeller of its two whole views):
    an unlabelled image counts where the teacher is sure of something, divided by the number of all unlabelled images.
    With an ontology that may be an ancestor alone.
    """

    options: Options
    prior: Tensor  # [S + 1, K] log share of each class in its source; zero unless it is to be added
    per_class = True
    expects = (
        "Starts near ln(number of classes) (one_of) or .69 (multi) and falls; near zero long before the end "
        "means that the labels are learnt by heart."
    )

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.pseudo = options.pseudo_above < 1
        self.views = frozenset({options.view, "global"} if self.pseudo else {options.view})
        self.taught = self.pseudo
        if context.classes == 0:
            hint = "label some images, or say objectives.labels=null stream.labelled_fraction=0"
            raise UserError(f"objectives.labels: the data names no class; {hint}")
        above = _above(options, context)
        self.vocabulary = Vocabulary(context.named, above)
        counts = context.named if context.counts is None else context.counts
        self.register_buffer("prior", self.vocabulary.log_prior(counts) * options.adjust, persistent=False)
        self.weight = nn.Parameter(_prototypes(options, context))
        rows = above.shape[1] if options.kind == "multi" else context.classes
        members = above[:, context.classes : rows]
        self.ancestors = nn.Parameter(_means(members, self.weight)) if members.shape[1] else None
        with_bias = options.head == "linear" or options.kind == "multi"  # cosines alone cannot say "rare"
        self.bias = nn.Parameter(torch.zeros(rows)) if with_bias else None
        self.dropout = nn.Dropout(options.dropout)
        self.project = projection(context.dim) if options.head == "mlp" else nn.Identity()

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Target]:
        """How labelled images are to be weighed, and what the teacher says of the others, for each micro-batch."""
        shares = len(batches) * world_size()
        counted = all_reduce_sum(torch.stack([self._known(batch)[2].sum() for batch in batches]).sum())
        labelled = shares / counted.clamp_min(1)
        if not self.pseudo:
            return [Target(labelled)] * len(batches)
        without = all_reduce_sum(torch.stack([(~batch.labelled).sum() for batch in batches]).sum())
        unlabelled = shares / without.clamp_min(1)
        sure = (self._sure(t, b) for t, b in zip(teacher, batches, strict=True))
        return [Target(labelled, unlabelled, true, known) for true, known in sure]

    def forward(self, student: ViewTokens, target: Target, batch: Batch, progress: float) -> dict[str, Tensor]:
        tokens = student.clean if self.options.view == "clean" else student.global_
        if tokens is None:
            raise UserError(f"objectives.labels.view={self.options.view}, but the loader yields no such view")
        true, known, counted, source = self._known(batch)
        views = 1 if self.options.view == "clean" else 2
        cls = self._shown(tokens.cls, progress)
        logits = self.logits(self.dropout(cls)).unflatten(0, (views, len(counted)))
        if self.options.adjust:
            logits = logits + self.prior[source]
        losses = self.losses(logits, true, known, source, self.options.smoothing)  # [views, B]
        found = {"labels": (losses.mean(dim=0) * counted).sum() * target.labelled}
        if target.true is not None and target.known is not None and target.unlabelled is not None:
            cls = self._shown(student.global_.cls, progress)
            logits = self.logits(self.dropout(cls)).unflatten(0, (2, -1))
            losses = self.losses(logits, target.true, target.known, batch.source)
            found["pseudo"] = (losses.mean(dim=0) * target.known.any(dim=1)).sum() * target.unlabelled
        return found

    def _shown(self, cls: Tensor, progress: float) -> Tensor:
        """`cls`, and while only the head learns without its gradient; yet on the graph, or DDP waits for it."""
        return cls if self.reaches(progress) else cls.detach() + 0 * cls

    def reaches(self, progress: float) -> bool:
        return progress >= self.options.head_first

    def logits(self, features: Tensor) -> Tensor:
        """[N, dim] -> [N, K] for any image and all classes; multi: [N, V], the ancestors behind the classes."""
        weight = self.weight if self.ancestors is None else torch.cat([self.weight, self.ancestors])
        if self.options.head == "linear":
            return linear32(features, weight, self.bias)
        cosine = linear32(F.normalize(fp32(self.project(features)), dim=1), F.normalize(fp32(weight), dim=1))
        return self.options.scale * cosine + (0 if self.bias is None else self.bias)

    def losses(self, logits: Tensor, true: Tensor, known: Tensor, source: Tensor, smoothing: float = 0.0) -> Tensor:
        """logits [views, B, K or V], true and known [B, V], source [B] -> [views, B]; a row without a label is finite
        and means nothing."""
        if self.options.kind == "multi":
            return multi(logits, true, known, smoothing)
        log_p, log_events = self.vocabulary.log_probabilities(logits, source)
        events = true & self.vocabulary.telling[source]  # what is true of every atom of the source has p = 1
        return one_of(log_events, events, log_p, self.vocabulary.allowed[source], smoothing)

    def frozen(self, progress: float) -> Iterable[nn.Parameter]:
        rows = [row for row in (self.weight, self.ancestors) if row is not None]
        return rows if self.options.init == "text" and progress < self.options.unfreeze_at else []

    @torch.no_grad()
    def health(self, student: ViewTokens, target: Target, batch: Batch) -> dict[str, Tensor]:
        if target.known is None:
            return {}
        sure = target.known.any(dim=1).sum() / (~batch.labelled).sum().clamp_min(1)
        return {"pseudo_labelled": sure}

    def _known(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the images of a view: what is true, what is known (bool [B, V]); does it count; its source."""
        true, known = self.vocabulary.known(batch.labels, batch.source)
        counted = batch.labelled & (true if self.options.kind == "one_of" else known).any(dim=1)
        rows = (true, known, counted, batch.source)
        if self.options.view == "clean" and batch.clean_of is not None:  # not every image has a clean view
            true, known, counted, source = (row[batch.clean_of] for row in rows)
            return true, known, counted, source
        return rows

    def _sure(self, teacher: ViewTokens, batch: Batch) -> tuple[Tensor, Tensor]:
        """(true, known) bool [B, V]: what the teacher's mean over both views puts beyond the threshold."""
        logits = self.logits(teacher.global_.cls).unflatten(0, (2, -1))
        limit = self.options.pseudo_above
        without = ~batch.labelled[:, None]
        if self.options.kind == "multi":
            p = logits.sigmoid().mean(dim=0)
            return (p >= limit) & without, ((p >= limit) | (p <= 1 - limit)) & without
        p = self.vocabulary.log_probabilities(logits, batch.source)[1].exp().mean(dim=0)
        true = (p >= limit) & self.vocabulary.telling[batch.source] & without
        return true, true


def one_of(log_events: Tensor, events: Tensor, log_p: Tensor, allowed: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean of -log p over what is true, smoothed towards all allowed classes: -> [..., B].

    log_events [..., B, V] and log_p [..., B, K] log probabilities; events [B, V] and allowed [B, K] bool.
    """
    hit = -(log_events * events).sum(dim=-1) / events.sum(dim=1).clamp_min(1)
    if not smoothing:
        return hit
    even = -(log_p * allowed).sum(dim=-1) / allowed.sum(dim=1).clamp_min(1)
    return (1 - smoothing) * hit + smoothing * even


def multi(logits: Tensor, true: Tensor, known: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean binary cross-entropy over what is known: logits [..., B, V], masks [B, V] -> [..., B]."""
    target = (true * (1 - smoothing) + smoothing / 2).expand(logits.shape)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * known).sum(dim=-1) / known.sum(dim=1).clamp_min(1)


def _above(options: Options, context: Context) -> Tensor:
    if not options.ontology:
        return torch.eye(context.classes, dtype=torch.bool)
    parents = ontology.read(options.ontology)
    return ontology.hierarchy(context.names, parents, f"objectives.labels.ontology={options.ontology}").above


def projection(dim: int) -> nn.Module:
    """As wide as the MLP of a transformer block."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def _means(members: Tensor, weight: Tensor) -> Tensor:
    """members bool [K, A], weight [K, dim] -> [A, dim]: an ancestor starts amid its classes."""
    return (members.float() / members.sum(dim=0)).T @ weight.detach()


def _prototypes(options: Options, context: Context) -> Tensor:
    """The first value of the head [K, dim]."""
    shape = (context.classes, context.dim)
    if options.init == "random":
        rows = nn.init.trunc_normal_(torch.empty(shape), std=0.02)
        return rows if options.head == "linear" else F.normalize(rows, dim=1)
    if context.prototypes is None:
        raise UserError(
            "objectives.labels.init=text needs class prototypes: make them with "
            "`python -m hybridssl prototypes`, or set objectives.labels.init=random"
        )
    if context.prototypes.shape != shape:
        raise UserError(
            f"class prototypes are {list(context.prototypes.shape)}, but the data and the backbone want {list(shape)}: "
            "make them again with `python -m hybridssl prototypes`"
        )
    return F.normalize(context.prototypes.detach().float().cpu(), dim=1).clone()
