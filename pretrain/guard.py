"""Bad steps: which are not taken, whose samples they were, and when a run goes back or gives up.

A step is refused when a loss or the gradient is not finite, or when the gradient's norm is a spike: further above the
median of the last norms than `spike` robust deviations, on a logarithmic scale. Judged on the device, without the host
waiting for it, and by all processes alike; the weights, their moving average and every buffer stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridssl import dist

WINDOW = 128  # norms that a step is compared with
ENOUGH = 20  # of them, before one is called a spike
LEAST = 0.2  # a deviation is never taken for less: where norms hardly differ, a tenth more is no spike


@dataclass(frozen=True)
class GuardOptions:
    spike: float = 12.0  # robust deviations (1.48 MAD of the log norm, at least 0.2) above the median; 0: no bound
    patience: int = 8  # refused steps in a row at which the run goes back to its newest checkpoint

    def __post_init__(self) -> None:
        if self.spike < 0 or self.patience < 1:
            raise ValueError(f"spike is {self.spike} and patience {self.patience}; they must be 0 and 1 at least")


class Diverged(Exception):
    """Training cannot go on as it is; the message says what was seen and what may help."""


class Guard:
    """Judges every step. Everything it knows is on the device; the host looks at log points (`read`)."""

    def __init__(self, options: GuardOptions, device: torch.device, known: dict[str, Any] | None = None) -> None:
        """known: `state()` of the checkpoint that the run goes on from."""
        self.options, self.device = options, device
        self.refused: list[dict[str, Any]] = []  # the last ones
        self.returned_to: Path | None = None
        self._load(known or {})

    def _load(self, known: dict[str, Any]) -> None:
        norms = [math.nan if value is None else value for value in known.get("norms", [None] * WINDOW)]
        self.norms = torch.tensor(norms, dtype=torch.float32, device=self.device)  # logarithms; NaN: none yet
        self.row = torch.tensor(float(known.get("row", 0)), device=self.device)  # refused so far without a good one
        self.at, self.moving = known.get("at", 0), known.get("moving", -1)
        self.steps: list[tuple[int, list[str]]] = []  # since the last `read`: step, keys of this process's samples
        self.seen: list[Tensor] = []  # and [refused, norm, bound, loss]
        self.refused_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run must judge as this one would."""
        norms = [None if math.isnan(value) else value for value in self.norms.tolist()]
        return {"norms": norms, "row": self.row.item(), "at": self.at, "moving": self.moving}

    def judge(self, step: int, loss: Tensor, norm: Tensor, moving: int, keys: Sequence[str]) -> Tensor:
        """float scalar on the device, the same in every process: above 0 where step `step` must not be taken.

        loss: what was trained on, of this process; norm: of the gradient, before clipping, of all of them; moving: a
        number for what moves, and what moves it. When it changes (a backbone that rested, a head set free, a loss that
        has come to it), old norms say nothing.
        """
        if moving != self.moving:
            self.norms.fill_(math.nan)
            self.moving = moving
        level, bound = norm.detach().float().log(), self._bound()
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss.detach())) | (level > bound)
        refused = dist.all_reduce_max(bad.float())
        # A norm of zero (nothing moves, no image has a label) is nothing to compare with.
        self.norms[self.at % WINDOW] = torch.where((refused > 0) | level.isinf(), torch.nan, level)
        self.at += 1
        self.row = torch.where(refused > 0, self.row + 1, 0.0)
        self.steps.append((step, list(keys)))
        self.seen.append(torch.stack([refused, norm.detach().float(), bound.exp(), loss.detach().float()]))
        return refused

    def _bound(self) -> Tensor:
        """Of the logarithm of a norm; infinite while too few are known."""
        if not self.options.spike:
            return self.norms.new_full((), math.inf)  # not new_tensor, for which the host would wait
        median = self.norms.nanmedian(dim=0).values
        deviation = 1.4826 * (self.norms - median).abs().nanmedian(dim=0).values
        enough = (~self.norms.isnan()).sum() >= ENOUGH
        return torch.where(enough, median + self.options.spike * deviation.clamp_min(LEAST), math.inf)

    def read(self) -> list[dict[str, Any]]:
        """The refused steps since the last call, with the keys of all processes' samples. All processes call it."""
        if not self.seen:
            return []
        seen = torch.stack([*self.seen, torch.stack([self.row] * 4)]).tolist()  # here the host waits for the device
        self.refused_in_a_row = int(seen[-1][0])
        found = []
        for (step, keys), (refused, norm, bound, loss) in zip(self.steps, seen, strict=False):
            if refused > 0:
                finite = math.isfinite(norm) and math.isfinite(loss)
                found.append(
                    {
                        "step": step,
                        "reason": "spike" if finite and norm > bound else "not finite",
                        "grad_norm": norm if math.isfinite(norm) else str(norm),
                        "bound": bound if math.isfinite(bound) else None,
                        "loss": loss if math.isfinite(loss) else str(loss),
                        "keys": [key for part in dist.gather_objects(keys) for key in part],
                    }
                )
        self.steps, self.seen = [], []
        self.refused = [*self.refused, *found][-self.options.patience :]
        return found

    @property
    def lost(self) -> bool:
        """As of the last `read`: so many steps were refused in a row that waiting does not help."""
        return self.refused_in_a_row >= self.options.patience

    def back_to(self, checkpoint: Path, known: dict[str, Any]) -> None:
        """The run goes on from a checkpoint, as if these steps had never been."""
        self._load({**known, "row": 0})
        self.returned_to = checkpoint

    def diagnosis(self, lr: float, precision: str, weights: str) -> str:
        """What a person should know when the run gives up, and try. weights: where the last good ones are."""
        last, spikes = self.refused[-1], [one for one in self.refused if one["reason"] == "spike"]
        what = "spikes of the gradient" if len(spikes) == len(self.refused) else "losses or gradients not finite"
        advice = [
            f"a smaller optim.lr or a longer optim.warmup (the learning rate was {lr:.2g})",
            "precision=no" if precision != "no" else "",
            "a lower optim.clip, or a higher guard.spike if the run was fine until then" if spikes else "",
            "a look at the samples named in skipped.jsonl: the same each time, or of one source?",
        ]
        again = ", also after going back and on with other images" if self.returned_to else ""
        return (
            f"{len(self.refused)} steps in a row up to step {last['step']} were refused: {what} (the last had a "
            f"gradient norm of {last['grad_norm']} and a loss of {last['loss']}){again}. The last good weights: "
            f"{weights}.\nWhat may help, in a run of its own (out=...):\n  "
            + "\n  ".join(text for text in advice if text)
        )


class Unchanged:
    """Buffers (running statistics, centres, queues) as they were before a step, for the case that it is refused.

    All of a type as one: a network of batch norms has hundreds of a few numbers each, and a GPU does not get through a
    kernel for each of them sooner than through one for all.
    """

    def __init__(self, *models: nn.Module) -> None:
        self.models = models
        self.before = {kind: _joined(buffers) for kind, buffers in self._buffers().items()}

    @torch.no_grad()
    def keep(self, refused: Tensor) -> None:
        bad = refused > 0
        for kind, buffers in self._buffers().items():
            then = torch.where(bad, self.before[kind], _joined(buffers)).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [t.view_as(b) for t, b in zip(then, buffers, strict=True)])

    def _buffers(self) -> dict[torch.dtype, list[Tensor]]:
        found: dict[torch.dtype, list[Tensor]] = {}
        for model in self.models:
            for buffer in model.buffers():
                found.setdefault(buffer.dtype, []).append(buffer)
        return found


def _joined(buffers: Sequence[Tensor]) -> Tensor:
    """Their values one behind the other, copied."""
    return torch.cat([buffer.flatten() for buffer in buffers])
