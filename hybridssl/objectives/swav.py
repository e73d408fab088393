"""SwAV (Caron et al. 2020, arXiv 2006.09882): every crop predicts the cluster codes of the other crops' image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridssl import health
from hybridssl.assign import sinkhorn
from hybridssl.dist import all_gather, rank, world_size
from hybridssl.fused import Targets, cross_entropy
from hybridssl.heads import Head
from hybridssl.objectives import Context, Objective, ObjectiveOptions
from hybridssl.objectives._distil import crossing
from hybridssl.types import Batch, ViewTokens


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    prototypes: int = 3000  # clusters
    hidden: int = 2048  # width of the projection's MLP
    bottleneck: int = 128  # width of the unit vectors that meet the prototypes
    temperature: float = 0.1  # by which the student's cosines are divided
    epsilon: float = 0.05  # temperature of the codes
    queue: int = 0  # earlier images that share in the balance of the codes: 3,840 for batches of 256; 0: none
    freeze_last: float = 0.01  # share of the run, from `start` on, for which the prototypes do not move


class Swav(Objective):
    """Mean over the codes of both global views and the 1 + L other crops of CE(code, softmax(z . prototypes / T)).

    Codes are Sinkhorn's over the effective batch, view by view. SwAV has no teacher: its codes come from the student
    itself. The teacher's copy makes them here, so **set teacher.momentum=[0, 0]**: it is then the student as the last
    step left it, which is the student that is about to be trained, in evaluation mode (no stochastic depth, running
    statistics). With any other momentum this is SwAV with a momentum encoder. The heads have no batch normalisation,
    which would see a micro-batch only.

    The queue holds the newest unit vectors of each view, alike on all processes and saved with the teacher. Codes are
    balanced over batch and queue once it is full (section 3.1, small batches).
    """

    options: Options
    views = frozenset({"global", "local"})
    taught = True
    queue: Tensor  # [2, Q, bottleneck], newest first; zero: not filled yet
    expects = (
        "Starts near ln K (the number of prototypes) and falls; flat at ln K for long means that the prototypes tell "
        "no images apart: fewer prototypes, or a smaller epsilon."
    )

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.head = Head(context.dim, options.prototypes, options.hidden, options.bottleneck, layers=2)
        self.register_buffer("queue", torch.zeros(2, options.queue, options.bottleneck))

    @torch.no_grad()
    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Targets]:
        """Codes [2, B] of the global views of each micro-batch."""
        z = [self.head.bottleneck(tokens.global_.cls).unflatten(0, (2, -1)) for tokens in teacher]
        whole = torch.cat(z, dim=1)  # [2, n, bottleneck]
        weight, epsilon = self.head.weight, self.options.epsilon
        seen = [self._with_queue(rows, queue) for rows, queue in zip(whole, self.queue, strict=True)]
        bias = torch.stack([sinkhorn(rows, weight, epsilon, counted=counted) for rows, counted in seen])
        if self.options.queue:
            newest = all_gather(whole.transpose(0, 1)).transpose(0, 1).to(self.queue.dtype)
            self.queue.copy_(torch.cat([newest, self.queue], dim=1)[:, : self.options.queue])
        return Targets(whole, weight, epsilon, bias).split([part.shape[1] for part in z])

    def _with_queue(self, z: Tensor, queue: Tensor) -> tuple[Tensor, Tensor | None]:
        """z and this process' share of the queue's rows, and which of them are balanced: the queue's once it is full.

        They are there before, too: only the device knows when it is full, and is not asked.
        """
        if not len(queue):
            return z, None
        full, mine = queue[-1].any(), queue[rank() :: world_size()].to(z.dtype)
        return torch.cat([z, mine]), torch.cat([z.new_ones(len(z), dtype=torch.bool), full.expand(len(mine))])

    def forward(self, student: ViewTokens, target: Targets, batch: Batch, progress: float) -> dict[str, Tensor]:
        crops = [student.global_.cls] + ([student.local.cls] if student.local is not None else [])
        z = self.head.bottleneck(torch.cat(crops)).unflatten(0, (-1, target.z.shape[1]))  # [2 + L, B, bottleneck]
        mix, weights = crossing(len(z), 1.0, z)
        share = (weights / z.shape[1]).expand(z.shape[:2])
        return {"swav": cross_entropy(z, self.head.weight, target, self.options.temperature, share, mix)}

    def frozen(self, progress: float) -> Iterable[nn.Parameter]:
        return [self.head.prototypes] if progress < self.options.start + self.options.freeze_last else []

    @torch.no_grad()
    def health(self, student: ViewTokens, target: Targets, batch: Batch) -> dict[str, Tensor]:
        return health.of_targets(target.dense(), self.head(student.global_.cls).unflatten(0, (2, -1)))
