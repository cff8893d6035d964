"""What a training step of each arm costs: both timed in one process, in turn, so that a machine's moods hit both."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from spherelm.models import Decoder, build
from spherelm.optim import build_optimizer
from spherelm.train.config import RunConfig
from spherelm.train.heap import keep_freed_memory
from spherelm.train.precision import best_device, compile_blocks, resolve_dtype
from spherelm.train.trainer import clip_gradients


@dataclass(frozen=True)
class StepCost:
    """The median seconds of a training step of each arm, and the median of the ratios of neighbouring steps (nGPT / GPT)."""

    gpt_seconds: float
    ngpt_seconds: float
    ratio: float


class TimedSteps:
    """A model of one arm, ready to take timed steps on one micro-batch of random tokens."""

    def __init__(self, config: RunConfig) -> None:
        device, train = best_device(), config.train
        keep_freed_memory()
        self.model: Decoder = build(config.model).to(device)
        self.model.set_compute_dtype(resolve_dtype(train.dtype, device))
        self.optimizer = build_optimizer(self.model, config.optim)
        self.grad_clip = config.optim.grad_clip
        shape = (train.micro_batch_size or train.batch_size, train.seq_len)
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


def measure_cost(gpt: RunConfig, ngpt: RunConfig, steps: int = 15, warmup: int = 3) -> StepCost:
    """Time `steps` steps of each arm, alternating, after `warmup` that are not counted; shows how far it is."""
    arms = TimedSteps(gpt), TimedSteps(ngpt)
    for _ in range(warmup):
        for arm in arms:
            arm.time_step()
    # The order within a pair is swapped each time, so that neither arm always follows the other.
    times: tuple[list[float], list[float]] = ([], [])
    for i in tqdm(range(steps), desc="timing steps of both arms", unit="pair"):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            times[which].append(arms[which].time_step())
    ratio = statistics.median(ngpt_time / gpt_time for gpt_time, ngpt_time in zip(*times, strict=True))
    return StepCost(statistics.median(times[0]), statistics.median(times[1]), ratio)
