"""Handling of bad updates: stop the run, or skip the update, at most a given number of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spherelm.runs.config import TrainConfig

MEMORY = 0.98
"""Decay of the running average of gradient norms per update: it covers about 50 updates."""

TRUSTED = 20
"""Updates before that average is trusted."""


WORSE = 0.1
"""Nats that a run may end above an untrained model:
validation text is short, and a run of a few updates moves little.
"""


class Diverged(RuntimeError):
    """The loss or a gradient stopped being a number, or leapt, or the run ended worse than an untrained model."""


def untrained_loss(vocab_size: int, start: float | None) -> float:
    """The loss of an untrained model, nats per token:
    at the start of the run where it is known, at least an even guess's.
    """
    return max(math.log(vocab_size), start or 0.0)


@dataclass
class Guard:
    """Judges updates before they are made. skipped, norm: how many were left out, and the average norm;
    saved with the run.
    """

    train: TrainConfig
    skipped: int = 0
    norm: float = 0.0

    def fault(self, losses: Sequence[float], grad_norm: float, step: int) -> str | None:
        """The fault of the update after `step` others, `None` if it has none; losses: of the batch, by rank."""
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            where = f" on rank {', '.join(map(str, bad))}" if len(losses) > 1 else ""
            return f"the loss is {losses[bad[0]]} at step {step + 1}{where}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm} at step {step + 1}"
        if self.train.spike_factor and step >= TRUSTED and grad_norm > self.train.spike_factor * self.norm:
            return f"the gradient norm is {grad_norm:.4g} at step {step + 1}, {grad_norm / self.norm:.1f} times its average"
        self.norm = grad_norm if step == 0 or not self.norm else MEMORY * self.norm + (1 - MEMORY) * grad_norm
        return None

    def skip(self, fault: str) -> None:
        """Count an update that is left out; raises `Diverged` with its `fault` where none may be."""
        if self.train.on_bad_step == "stop":
            raise Diverged(fault)
        if self.skipped >= self.train.skip_budget:
            raise Diverged(f"{fault}, and all {self.train.skip_budget} updates that may be skipped were skipped")
        self.skipped += 1
