"""The training loop. It does not know which arm it trains: what makes nGPT nGPT hangs on the optimizer."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spherelm.data.loader import Batches
from spherelm.evaluate.perplexity import bits_per_byte
from spherelm.layers.attention import separate_documents
from spherelm.models import Decoder, build
from spherelm.optim import build_optimizer, factor
from spherelm.optim.groups import set_rate
from spherelm.train.batches import open_data, total_loss, validation_losses
from spherelm.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from spherelm.train.config import RunConfig, to_dict
from spherelm.train.diagnostics import Diagnosis, Speed, peak_memory_mb
from spherelm.train.evaluation import task_scorer
from spherelm.train.metrics import MetricsLog
from spherelm.train.precision import best_device, compile_blocks, resolve_dtype
from spherelm.train.record import open_run
from spherelm.train.sinks import check_names, open_sinks


class Diverged(RuntimeError):
    """The loss or a gradient stopped being a number."""


class Interrupted(RuntimeError):
    """The run was asked to stop by a signal and saved itself first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list given instead of dying of them; a second SIGINT is let through.

    Outside of the main thread, where Python allows no handlers, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """One run: a model, its optimizer, its data and its directory.

    Raises what `open_run` and `open_data` raise if the directory or the text do not allow the run.
    """

    def __init__(self, config: RunConfig, out: Path, resume: bool = False) -> None:
        self.config, self.out = config, out
        check_names(config.train.log_to)
        self.data = open_data(config)
        self.score_tasks = task_scorer(config.train, self.data.tokenizer)
        self.device = best_device()
        checkpoint = open_run(out, config, self.data.identity, resume)
        self.data.tokenizer.save(out)
        torch.manual_seed(config.train.seed)
        self.model = build(config.model).to(self.device)
        self.model.set_compute_dtype(resolve_dtype(config.train.dtype, self.device))
        self.optimizer = build_optimizer(self.model, config.optim)
        self.progress = Progress(0, 0.0)
        if checkpoint is not None:
            self.progress = load_checkpoint(checkpoint, self.model, self.optimizer)
            self.data.loader.restore(self.progress.data)
        self.speed = Speed(self.model, config.train, self.device)
        sinks = open_sinks(config.train.log_to, out, to_dict(config))
        self.metrics = MetricsLog(out / "metrics.jsonl", self.progress.step, sinks)

    @property
    def tokens_per_step(self) -> int:
        """How many tokens an update sees."""
        return self.config.train.seq_len * self.config.train.batch_size

    def run(self, show_progress: bool = True) -> float:
        """Train to the last step and return the final validation loss in nats per token.

        Raises `Diverged` naming the step and the cause, `Interrupted` after saving on SIGINT or SIGTERM.
        """
        train = self.config.train
        if train.compile:
            compile_blocks(self.model, lambda: self._gradients(self.progress.step))
            self.optimizer.zero_grad()
        bar = tqdm(
            total=train.steps, initial=self.progress.step, desc=self.out.name, unit="step", disable=not show_progress
        )
        loss = math.nan
        with closing(self.metrics), signals_noted() as received, bar:
            if self.progress.step == 0:
                loss = self._validate()
            while self.progress.step < train.steps:
                self._step(bar)
                step = self.progress.step
                if step == train.steps or (train.eval_every and step % train.eval_every == 0):
                    loss = self._validate()
                if step == train.steps or (train.eval_tasks_every and step % train.eval_tasks_every == 0):
                    self._score_tasks()
                if step == train.steps or received or (train.save_every and step % train.save_every == 0):
                    self._save()
                if received and step < train.steps:
                    name = signal.Signals(received[0]).name
                    raise Interrupted(f"{name}: saved {self.out} at step {step}; go on with --resume", received[0])
        return loss if not math.isnan(loss) else total_loss(self.data, self._validation_losses())

    def _step(self, bar: Any) -> None:
        diagnosis = Diagnosis(self.model, self.optimizer) if self._is_diagnosed() else None
        config, step, start = self.config, self.progress.step, time.perf_counter()
        lr = config.optim.lr * factor(config.schedule, step, config.train.steps)
        loss, grad_norm = self._update(step, lr)
        seconds = time.perf_counter() - start
        self.progress = Progress(step + 1, self.progress.seconds + seconds)
        speed = self.tokens_per_step / seconds
        record = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
        record |= {"mfu": self.speed.mfu(speed), "memory_mb": peak_memory_mb(self.device)}
        self.metrics.write("train", **self._position(), **record, **(diagnosis.measure() if diagnosis else {}))
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()

    def _is_diagnosed(self) -> bool:
        every = self.config.train.diagnose_every
        return bool(every) and (self.progress.step + 1) % every == 0

    def _update(self, step: int, lr: float) -> tuple[float, float]:
        """One optimizer step; returns the batch's loss and the norm of its gradient before clipping."""
        set_rate(self.optimizer, lr)
        loss = self._gradients(step)
        grad_norm = clip_gradients(self.model, self.config.optim.grad_clip)
        self._check_finite("loss", loss, step + 1)
        self._check_finite("gradient norm", grad_norm, step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, grad_norm

    def _gradients(self, step: int) -> float:
        size = self.config.train.micro_batch_size
        return gradients_of_batch(self.model, self.data.loader, step, size, self.data.end_token)

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise Diverged(
                f"{self.out}: the {name} is {value} at step {step} (peak learning rate {self.config.optim.lr:.3g}): "
                "lower --lr or look at the text around this batch"
            )

    def _position(self) -> dict[str, float]:
        step = self.progress.step
        return {"step": step, "tokens": step * self.tokens_per_step, "seconds": round(self.progress.seconds, 4)}

    def _validation_losses(self) -> dict[str, float]:
        return validation_losses(
            self.model, self.data, self.config.train.micro_batch_size or self.config.train.batch_size
        )

    def _validate(self) -> float:
        losses = self._validation_losses()
        loss = total_loss(self.data, losses)
        self._check_finite("validation loss", loss, self.progress.step)
        by_source = {"loss_by_source": losses} if len(losses) > 1 else {}
        in_bits = bits_per_byte(loss, self.data.tokens_per_byte)
        self.metrics.write("val", **self._position(), loss=loss, bits_per_byte=in_bits, **by_source)
        return loss

    def _score_tasks(self) -> None:
        if self.score_tasks is not None:
            self.metrics.write("eval", **self._position(), **self.score_tasks(self.model))

    def _save(self) -> None:
        self.progress = replace(self.progress, data=self.data.loader.state(self.progress.step))
        save_checkpoint(self.out, self.model, self.optimizer, self.progress, self.config.train.keep)


def gradients_of_batch(
    model: Decoder, loader: Batches, step: int, micro_batch_size: int | None, end_token: int | None = None
) -> float:
    """Add the gradients of batch number `step` to the parameters, in micro-batches, and return its mean loss in nats.

    end_token: where given, attention does not cross from one document into another, each ended by this token.
    """
    tokens, targets = loader.batch(step)
    device = next(model.parameters()).device
    size, total = micro_batch_size or len(tokens), 0.0
    for part, wanted in zip(tokens.split(size), targets.split(size), strict=True):
        part = part.to(device)
        loss = model.loss(part, wanted.to(device), *separate_documents(part, end_token)) * (len(part) / len(tokens))
        loss.backward()
        total += loss.item()
    return total


def clip_gradients(model: torch.nn.Module, limit: float | None) -> float:
    """Scale all gradients so that their global norm is at most `limit`; returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if limit is None else limit).item()


def train(config: RunConfig, out: Path, resume: bool = False, show_progress: bool = True) -> float:
    """Do the run that `config` describes in the directory `out`; returns the final validation loss in nats per token."""
    return Trainer(config, out, resume).run(show_progress)
