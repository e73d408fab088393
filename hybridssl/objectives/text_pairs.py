"""Images and their reports: CLIP (Radford et al. 2021, arXiv 2103.00020) or SigLIP (Zhai et al. 2023, 2303.15343)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridssl.dist import all_gather, rank, world_size
from hybridssl.errors import UserError
from hybridssl.heads import fp32, linear32
from hybridssl.objectives import Context, Objective, ObjectiveOptions
from hybridssl.tower import Moving, TextTower
from hybridssl.types import Batch, ViewTokens, sent

SCALE = {"clip": 1 / 0.07, "siglip": 10.0}  # first factor of the cosines (2103.00020, section 2.5; 2303.15343, 3.2)
LARGEST = 100.0  # and the largest (2103.00020, section 2.5)
BIAS = -10.0  # SigLIP's first: nearly all pairs are negative (3.2)


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    loss: Literal["clip", "siglip"] = "clip"  # a softmax over the batch, or a sigmoid for each pair
    tower: Literal["frozen", "lora", "trained"] = "frozen"  # how the text encoder (text.encoder) takes part
    tower_lr: float = 0.1  # factor of the learning rate for a tower that moves: it has been trained already
    width: int = 512  # of the space that images and reports share
    tokens: int = 128  # a report is cut after so many


class Target(NamedTuple):
    """Of a micro-batch with r reports, in a step of N images over all micro-batches and processes.

    What is compared with has a row for each of the N images: how many of them have a report the device alone knows.
    """

    rows: Tensor  # int64 [r]: the images that have a report
    place: Tensor  # int64 [r]: where they stand among the N
    images: Tensor  # [2, N, width]: what the teacher says of both global views, unit norm
    texts: Tensor  # [N, width]: and of the reports; zero where there is none
    report: Tensor  # int64 [N]: reports with one number are one text; 0: none
    features: Tensor | None  # [r, Dt]: this micro-batch's reports in a tower that rests
    scale: Tensor  # scalar: micro-batches x processes / reports of the step


class TextPairs(Objective):
    """Each image finds its report among all reports of the step, and each report its image.

    With unit vectors x of images and y of reports, t a learnt scale and b (SigLIP) a learnt bias:

        clip    1/2R sum_i [ -log softmax_j(t x_i . y_j)_i - log softmax_j(t y_i . x_j)_i ]
        siglip  -1/R sum_i sum_j log sigmoid(z_ij (t x_i . y_j + b)), z_ij = 1 where i = j, else -1

    **What is compared with what.** A row i is the student's, what it is compared with (j) the teacher's, in both
    directions: in CLIP's first term x_i is the student's and y_j the teacher's, in its second y_i is the student's
    and x_j the teacher's; SigLIP's sum is the mean of these two ways. So every negative of the whole step, over all
    micro-batches and processes, is there at no cost: the teacher has seen all of them when the first student pass
    begins. Losses and gradients do not depend on how the batch is parted. Where teacher and student agree this is
    CLIP's value. Its gradient is that of the rows; the part through what they are compared with is left out, as in
    MoCo (1911.05722), whose keys come from a moving average too. (Caching all embeddings first and then passing once
    more, as GradCache does, 2101.06983, would have both, for a second student pass.)

    Images without a report are skipped. Two images with one report, up to spaces, are no negatives of each other. The
    loss is the mean over both global views.
    """

    options: Options
    taught = True
    expects = (
        "clip: starts near ln of the reports in a batch and falls; siglip: starts near 10 and falls. Near zero long "
        "before the end means that the reports are learnt by heart; exactly zero that no image has one."
    )

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        if not context.encoder:
            raise UserError("objectives.text_pairs needs a text encoder: set text.encoder to a hub id or a folder")
        self.tower = TextTower(context.encoder, context.pooling, options.tower, options.tokens)
        self.moving = Moving(self.tower.start, options.tower_lr)
        self.project_image = nn.Linear(context.dim, options.width, bias=False)
        self.project_text = nn.Linear(self.tower.width, options.width, bias=False)
        for linear in (self.project_image, self.project_text):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.log_scale = nn.Parameter(torch.tensor([math.log(SCALE[options.loss])]))
        self.bias = nn.Parameter(torch.tensor([BIAS])) if options.loss == "siglip" else None

    @torch.no_grad()
    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Target]:
        reports = [_reports(batch) for batch in batches]
        device, said = self.log_scale.device, [r for some in reports for r in some]
        features = self._features([r for r in said if r])
        there = sent(torch.tensor(_told(said), dtype=torch.int64), device)
        texts = features.new_zeros(len(said), self.options.width).index_copy(0, there, self._texts(features))
        images = torch.cat([self._images(tokens) for tokens in teacher], dim=1)  # [2, n, width]

        report = all_gather(sent(torch.tensor([_number(r) for r in said]), device))
        images, texts = all_gather(images.transpose(0, 1)).transpose(0, 1), all_gather(texts)
        scale = len(batches) * world_size() / (report != 0).sum().clamp_min(1)

        out, start, own = [], rank() * len(said), features.split([len(_told(some)) for some in reports])
        for mine, f in zip(reports, own, strict=True):
            rows = sent(torch.tensor(_told(mine), dtype=torch.int64), device)
            kept = f if self.options.tower == "frozen" else None
            out.append(Target(rows, rows + start, images, texts, report, kept, scale))
            start += len(mine)
        return out

    def forward(self, student: ViewTokens, target: Target, batch: Batch, progress: float) -> dict[str, Tensor]:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(LARGEST))
        features = self._features([r for r in _reports(batch) if r]) if target.features is None else target.features
        images, texts = self._images(student)[:, target.rows], self._texts(features)  # [2, r, width], [r, width]
        losses = [
            self._rows(view, target.texts, target) + self._rows(texts, others, target)
            for view, others in zip(images, target.images, strict=True)
        ]
        return {"text_pairs": torch.stack(losses).mean(dim=0).sum() / 2 * target.scale}

    def _rows(self, mine: Tensor, others: Tensor, target: Target) -> Tensor:
        """mine [r, width] against others [N, width] -> loss [r]."""
        scores = self.log_scale.exp() * linear32(mine, others)  # [r, N]
        own = target.place[:, None] == torch.arange(len(others), device=scores.device)
        repeats = (target.report[target.place][:, None] == target.report) & ~own
        apart = repeats | (target.report == 0)  # neither the own one nor a negative
        if self.options.loss == "clip":
            return F.cross_entropy(scores.masked_fill(apart, -torch.inf), target.place, reduction="none")
        assert self.bias is not None
        signed = torch.where(own, 1, -1) * (scores + self.bias)
        return -F.logsigmoid(signed).masked_fill(apart, 0).sum(dim=1)

    def _images(self, tokens: ViewTokens) -> Tensor:
        """Both global views as unit vectors, [2, B, width]."""
        return F.normalize(linear32(tokens.global_.cls, self.project_image.weight), dim=1).unflatten(0, (2, -1))

    def _texts(self, features: Tensor) -> Tensor:
        """[n, Dt] -> unit vectors [n, width]."""
        return F.normalize(linear32(features, self.project_text.weight), dim=1)

    def _features(self, reports: Sequence[str]) -> Tensor:
        """[n, Dt] of the tower, a text that is there several times computed once."""
        moving, device = self.moving.named(), self.log_scale.device
        if not reports:  # on the graph of all that moves, so that no process waits for a gradient
            return self.log_scale.new_zeros(0, self.tower.width) + sum(p.sum() * 0 for p in moving.values())
        numbers = {report: i for i, report in enumerate(dict.fromkeys(reports))}
        rows = sent(torch.tensor([numbers[report] for report in reports]), device)
        return fp32(self.tower(list(numbers), moving, device))[rows]

    @torch.no_grad()
    def health(self, student: ViewTokens, target: Target, batch: Batch) -> dict[str, Tensor]:
        nearest = linear32(self._images(student)[0, target.rows], target.texts)  # [r, N]
        nearest = nearest.masked_fill(target.report == 0, -torch.inf)
        share = target.rows.new_tensor(len(target.rows) / len(batch), dtype=torch.float32)
        if not len(target.rows):
            return {"reports_found": share, "with_report": share}
        right = target.report[nearest.argmax(dim=1)] == target.report[target.place]
        return {"reports_found": right.float().mean(), "with_report": share}


def _reports(batch: Batch) -> list[str]:
    """A report an image, its spaces made one each; "" where there is none."""
    return [" ".join(text.split()) for text in batch.text] or [""] * len(batch)


def _told(reports: Sequence[str]) -> list[int]:
    """The images that have one."""
    return [i for i, report in enumerate(reports) if report]


def _number(report: str) -> int:
    """The same for the same text in every process; 0: no report."""
    digest = blake2b(report.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little", signed=True) or 1) if report else 0
