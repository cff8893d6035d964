"""The cost of training steps. Those compared are timed in one process, in turn,
so that a busy machine slows all alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from spherelm.models import Decoder, build
from spherelm.optim import build_optimizer
from spherelm.optim.groups import clip_gradients
from spherelm.progress import Bar
from spherelm.runs.config import RunConfig
from spherelm.train.heap import keep_freed_memory
from spherelm.train.precision import best_device, compile_blocks, resolve_dtype

COMPILE_FROM = 640
"""Updates from which a run earns back its compilation:
9 seconds from the cache, 1.65 times the steps a second (`0.3m`).
"""

TIMED, WARMUP = 15, 3
"""Steps of each config that are timed, and those before them that are not."""


@dataclass(frozen=True)
class StepCost:
    """The median seconds of a training step of each arm, and the median of the ratios of neighbouring
    steps (nGPT / GPT).
    """

    gpt_seconds: float
    ngpt_seconds: float
    ratio: float


class TimedSteps:
    """A model of one arm, ready to take timed steps on one micro-batch of random tokens."""

    def __init__(self, config: RunConfig) -> None:
        device, train = best_device(), config.train
        keep_freed_memory()
        self.model: Decoder = build(config.model).to(device)
        shape = (train.micro_batch_size or train.batch_size, train.seq_len)
        self.model.runtime.compute_dtype = resolve_dtype(train.dtype, self.model, math.prod(shape))
        self.optimizer = build_optimizer(self.model, config.optim)
        self.grad_clip = config.optim.grad_clip
        self.tokens = torch.randint(config.model.vocab_size, shape, device=device)
        self.targets = torch.randint(config.model.vocab_size, shape, device=device)
        if train.compile:
            compile_blocks(self.model, self.time_step)

    def time_step(self) -> float:
        """Seconds of one whole step: forward, backward, clipping, update and, on the sphere, retraction."""
        start = time.perf_counter()
        self.model.loss(self.tokens, self.targets).backward()
        clip_gradients(self.model, self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.tokens.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start


def time_in_turn(configs: Mapping[str, RunConfig], steps: int = TIMED, warmup: int = WARMUP) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each config, by its name, one of each a round, after `warmup` that are not counted.

    Shows how far it is. Every other round goes the other way round, so that none always follows the same one.
    """
    timed = {name: TimedSteps(config) for name, config in configs.items()}
    for _ in range(warmup):
        for one in timed.values():
            one.time_step()
    times: dict[str, list[float]] = {name: [] for name in timed}
    with Bar(f"timing steps of {', '.join(timed)}", steps, unit="round") as bar:
        for i in range(steps):
            for name in timed if i % 2 == 0 else reversed(timed):
                times[name].append(timed[name].time_step())
            bar.update()
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios of neighbours: of two lists of `time_in_turn`."""
    return statistics.median(one / other for one, other in zip(times, base, strict=True))


def measure_cost(gpt: RunConfig, ngpt: RunConfig, steps: int = TIMED, warmup: int = WARMUP) -> StepCost:
    """Time both arms in turn (`time_in_turn`)."""
    times = time_in_turn({"GPT": gpt, "nGPT": ngpt}, steps, warmup)
    ratio = median_ratio(times["nGPT"], times["GPT"])
    return StepCost(statistics.median(times["GPT"]), statistics.median(times["nGPT"]), ratio)
