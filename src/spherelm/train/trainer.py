"""The training loop. It does not know which arm it trains: what makes nGPT nGPT hangs on the optimizer.

Nor does it know how many processes train: `parallel.Group` and `parallel.Spread` do, and of one process they make nothing.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spherelm.data.loader import Batches
from spherelm.data.sources import RunData
from spherelm.data.verification import verify_where_cheap
from spherelm.errors import UserError
from spherelm.evaluate.perplexity import bits_per_byte
from spherelm.layers.attention import separate_documents
from spherelm.layers.loss import IGNORED
from spherelm.layers.moe import clear_loads
from spherelm.models import Decoder, build
from spherelm.optim import build_optimizer, factor
from spherelm.optim.groups import clip_gradients, set_rate
from spherelm.progress import Bar, say
from spherelm.runs.checkpoint import CheckpointWriter, Progress, latest_checkpoint, load_checkpoint
from spherelm.runs.config import RunConfig, micro_batches, to_dict
from spherelm.runs.group import Group
from spherelm.runs.metrics import in_words
from spherelm.runs.record import open_run, recorded_dtype
from spherelm.train.batches import open_data, total_loss, validation_losses
from spherelm.train.diagnostics import Diagnosis, Speed, load_of_experts, peak_memory_mb
from spherelm.train.evaluation import task_scorer
from spherelm.train.guard import WORSE, Diverged, Guard, untrained_loss
from spherelm.train.heap import keep_freed_memory
from spherelm.train.init_from import check_length, load_initial_weights
from spherelm.train.low_precision import lower_precision, seed_noise
from spherelm.train.metrics_log import MetricsLog, NoLog
from spherelm.train.opening import opening
from spherelm.train.parallel import RankLost, Spread, joined, spread
from spherelm.train.precision import best_device, compile_blocks, name_of, on_device, resolve_dtype
from spherelm.train.signals import Interrupted, Noted, Stop, signals_noted
from spherelm.train.sinks import check_names, open_sinks
from spherelm.train.threads import threads, threads_for


class Trainer:
    """One run: a model, its optimizer, its data and its directory, seen from one of the processes that train it.

    held: keeps other processes out of the directory until it is closed, or `run` has ended.
    Raises what `open_run` and `open_data` raise if the directory or the text do not allow the run.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        resume: bool = False,
        group: Group | None = None,
        held: ExitStack | None = None,
    ) -> None:
        self.config, self.out, self.held = config, out, held or ExitStack()
        self.group = group = group or Group(device=best_device())
        self.device, train = group.device, config.train
        group.together(self._prepare)
        keep_freed_memory()
        torch.manual_seed(train.seed)
        model = build(config.model)
        if config.init_from and not (resume and latest_checkpoint(out)):
            group.together(lambda: load_initial_weights(model, Path(str(config.init_from)), self.data.tokenizer))
        model.to(self.device)
        self.config = config = group.first(lambda: self._with_dtype(model, resume))
        model.runtime.compute_dtype = resolve_dtype(config.train.dtype, model, 0)
        model.runtime.label_smoothing = train.label_smoothing
        self.noise = group.together(lambda: lower_precision(model, train.precision, train.seed))
        self.model = model
        self.spread = spread(model, group, train.recompute)
        self.optimizer = build_optimizer(model, config.optim, group.summed)
        # Only now: what is refused before leaves no trace, so that the corrected command can be given at once.
        checkpoint = self._claim(resume)
        self.progress = Progress(0, 0.0)
        self._saved: int | None = None
        if checkpoint is not None:
            self.progress = load_checkpoint(checkpoint, model, self.optimizer, group)
            self.data.loader.restore(self.progress.data)
            self._saved = self.progress.step
        self.guard = Guard(train, self.progress.skipped, self.progress.norm)
        self.speed = Speed(model, train, self.device, group.world_size)
        self.checkpoints = CheckpointWriter(out, train.keep, train.keep_every, group)
        self.metrics = group.together(lambda: self._open_log() if group.is_first else NoLog())
        self._noted, self._stop, self._bar = Noted(), 0, Bar("", None, show=False)
        self._now = self._saved_at = group.gather([time.monotonic()])[0][0]

    def _prepare(self) -> None:
        """Everything that may be refused on any process: text, tasks, sinks."""
        config, group = self.config, self.group
        self.micro_batch_size, _ = micro_batches(config.train, group.world_size)
        self.data, self.score_tasks = prepare(config, group)
        if self.score_tasks is not None and not group.is_alone:
            raise UserError(
                "--eval-tasks is for runs of one process: score the checkpoints of this one by spherelm eval"
            )

    def _with_dtype(self, model: Decoder, resume: bool) -> RunConfig:
        """The configuration with a format in place of "auto": that of the run which is resumed, or the faster one here."""
        train, before = self.config.train, recorded_dtype(self.out) if resume else "auto"
        dtype = before if train.dtype == "auto" else train.dtype
        self._choice = "the faster one here" if dtype == "auto" else "as before" if dtype == before else "as asked for"
        found = name_of(resolve_dtype(dtype, model, self.micro_batch_size * train.seq_len))
        # What is emulated is not compiled.
        compiled = train.compile and train.precision.kind is None
        return replace(self.config, train=replace(train, dtype=found, compile=compiled))

    def _claim(self, resume: bool) -> Path | None:
        """Take the directory for this run, and return the checkpoint to resume from."""
        group = self.group
        group.first(lambda: check_length(self.out, self.config, resume))
        opened = open_run(self.out, self.config, self.data.identity, resume)
        checkpoint = group.first(lambda: self.held.enter_context(opened))
        if checkpoint is not None:
            begun = (self.out / "config.json").stat().st_mtime
            group.together(lambda: verify_where_cheap(self.data.shards, begun, group.rank, group.world_size))
        group.first(lambda: self.data.tokenizer.save(self.out))
        return checkpoint

    def _open_log(self) -> MetricsLog:
        sinks = open_sinks(self.config.train.log_to, self.out, to_dict(self.config))
        return MetricsLog(self.out / "metrics.jsonl", self.progress.step, sinks)

    @property
    def tokens_per_step(self) -> int:
        """How many tokens an update sees."""
        return self.data.tokens_per_update or self.config.train.seq_len * self.config.train.batch_size

    def run(self, show_progress: bool = True) -> float:
        """Train to the last step and return the final validation loss in nats per token.

        Raises `Diverged` naming the step and the cause, `Interrupted` after saving on one of the signals `NOTED`, `RankLost`
        naming the processes that do not answer, `OSError` if a checkpoint cannot be written.
        """
        with threads(self.config.train.threads or torch.get_num_threads()):
            return self._run_on_threads(show_progress and self.group.is_first)

    def _run_on_threads(self, show: bool) -> float:
        train = self.config.train
        rows = self.micro_batch_size * train.seq_len
        is_free = train.threads is None and self.device.type == "cpu" and self.group.is_alone
        self.threads = threads_for(self.model, rows) if is_free else None
        if show:
            done, peak = self.progress.step, self.speed.peak()
            for line in opening(self.config, self.out, self.group, self._choice, self.tokens_per_step, done, peak):
                say(line)
        if train.compile:
            compile_blocks(self.model, lambda: self._gradients(self.progress.step))
            self.optimizer.zero_grad()
            clear_loads(self.model)
        self._bar = Bar(self.out.resolve().name, train.steps, self.progress.step, show=show, every=train.log_every)
        with self.held, closing(self.metrics), signals_noted() as self._noted, self._bar, closing(self.checkpoints):
            try:
                with self.group.answering():
                    return self._run()
            except RankLost:
                self.checkpoints.abandon()
                raise

    def _run(self) -> float:
        """Train to the end, or until a signal asks to stop: then save first, and leave the rest to --resume."""
        try:
            # A run that was stopped at this step may have been saved before it was measured.
            loss = self._measure(self.group.first(lambda: self.metrics.present))
            while self.progress.step < self.config.train.steps:
                self._step()
                loss = self._measure({})
                if self._is_due(self.config.train.save_every) or self._is_time_to_save():
                    self._save()
            return loss
        except Stop as stop:
            step = self.progress.step
            if step != self._saved:
                self._save()
            self.checkpoints.wait()
            name = signal.Signals(stop.number).name
            command = f"spherelm train --resume {shlex.quote(str(self.out))}"
            raise Interrupted(f"{name}: saved {self.out} at step {step}; resume with: {command}", stop.number) from None

    def _is_due(self, every: int) -> bool:
        """Whether something that is done every so many updates, and at the end, is to be done now."""
        step = self.progress.step
        return step == self.config.train.steps or (bool(every) and step % every == 0)

    def _is_time_to_save(self) -> bool:
        """Whether a run that saves by the clock has not done so for long."""
        train = self.config.train
        by_clock = train.save_minutes > 0 and not train.save_every
        return by_clock and self._now - self._saved_at >= 60 * train.save_minutes

    def _measure(self, present: Mapping[str, Mapping[str, Any]]) -> float:
        """Validate and score tasks where that is due and not `present` in the log; returns the validation loss, or NaN."""
        step, train = self.progress.step, self.config.train
        loss: float = present["val"]["loss"] if "val" in present else math.nan
        if "val" not in present and (step == 0 or self._is_due(train.eval_every)):
            loss = self._validate()
            self._heed()
        if "eval" not in present and step and self._is_due(train.eval_tasks_every):
            self._score_tasks()
            self._heed()
        return loss

    def _heed(self) -> None:
        """Raise `Stop` on every process if a signal came to one of them; all must call."""
        if number := int(max(first for (first,) in self.group.gather([float(self._noted.first)]))):
            raise Stop(number)

    def _step(self) -> None:
        diagnosis = Diagnosis(self.model, self.optimizer) if self._is_diagnosed() else None
        config, step, start = self.config, self.progress.step, time.perf_counter()
        lr = config.optim.lr * factor(config.schedule, step, config.train.steps)
        loss, grad_norm = self._update(step, lr)
        seconds = time.perf_counter() - start
        self.progress = replace(self.progress, step=step + 1, seconds=self.progress.seconds + seconds)
        speed = self.tokens_per_step / seconds
        record: dict[str, Any] = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
        if grad_norm is not None:
            record |= {"mfu": self.speed.mfu(speed), "memory_mb": peak_memory_mb(self.device)}
            record |= {"threads": torch.get_num_threads(), **load_of_experts(self.model)}
            self.metrics.write("train", **self._position(), **record, **(diagnosis.measure() if diagnosis else {}))
        # Compiled code is made for a number of threads.
        if self.threads and not config.train.compile and (changed := self.threads.after(seconds)):
            self._bar.line(changed)
        self._bar.update(1, in_words({"kind": "train", **record}))
        if self._stop:
            raise Stop(self._stop)

    def _is_diagnosed(self) -> bool:
        every = self.config.train.diagnose_every
        return bool(every) and (self.progress.step + 1) % every == 0

    def _update(self, step: int, lr: float) -> tuple[float, float | None]:
        """One optimizer step: the batch's loss and the norm of its gradient before clipping, `None` if it was left out.

        Notes the signal by which any of the processes was asked to stop, and the time.
        """
        set_rate(self.optimizer, lr)
        seed_noise(self.noise, self.config.train.seed, step, self.group.rank)
        reports = self.group.gather([self._gradients(step), float(self._noted.first), time.monotonic()])
        losses, self._stop = [report[0] for report in reports], int(max(report[1] for report in reports))
        self._now = reports[0][2]  # by the clock of the first process, so that all save at one update
        norm: float | None = clip_gradients(self.model, self.config.optim.grad_clip)
        fault = self.guard.fault(losses, norm or 0.0, step)
        if fault is None:
            self.optimizer.step()
        else:
            norm = None
            clear_loads(self.model)
            self._leave_out(fault, step)
        self.optimizer.zero_grad()
        return sum(losses) / len(losses), norm

    def _leave_out(self, fault: str, step: int) -> None:
        """Note an update that is not made; raises `Diverged` where the run has to end."""
        try:
            self.guard.skip(fault)
        except Diverged as error:
            raise self._diverged(str(error), step=step + 1) from None
        self._tell("skip", **{**self._position(), "step": step + 1, "reason": fault})

    def _tell(self, kind: str, **values: Any) -> None:
        """Note a record that a person sees at once."""
        self.metrics.write(kind, **values)
        self._bar.line(in_words({"kind": kind, **values}))

    def _diverged(self, what: str, **position: int) -> Diverged:
        """The error with which the run ends, noted in the log."""
        self.metrics.write("stop", **{**self._position(), **position, "reason": what})
        rate = self.config.optim.lr
        return Diverged(
            f"{self.out}: {what} (peak learning rate {rate:.3g}): lower --lr or check the data around this batch"
        )

    def _gradients(self, step: int) -> float:
        return gradients_of_batch(self.spread, self.data.loader, step, self.micro_batch_size, self.data.end_token)

    def _position(self) -> dict[str, float]:
        step = self.progress.step
        return {"step": step, "tokens": step * self.tokens_per_step, "seconds": round(self.progress.seconds, 4)}

    def _validation_losses(self) -> dict[str, float]:
        try:
            return validation_losses(self.model, self.data, self.micro_batch_size, self.group, self._heed)
        finally:
            self.spread.rest()

    def _validate(self) -> float:
        losses, step = self._validation_losses(), self.progress.step
        loss, strangers = total_loss(self.data, losses), self.group.strangers(self.model)
        if strangers:
            raise self._diverged(
                f"rank {', '.join(map(str, strangers))} holds different weights from the other ranks at step {step}"
            )
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss} at step {step}")
        limit = self.config.train.stop_above
        if limit is not None and step and loss > limit:
            raise self._diverged(f"the validation loss {loss:.3f} at step {step} is above {limit:.3f}")
        if step == 0:
            self.progress = replace(self.progress, start=loss)
        untrained = untrained_loss(self.config.model.vocab_size, self.progress.start)
        if step == self.config.train.steps and loss > untrained + WORSE:
            raise self._diverged(
                f"the run ends worse than an untrained model: its validation loss is {loss:.3f} at step {step}, that of an "
                f"untrained model {untrained:.3f}"
            )
        by_source = {"loss_by_source": losses} if len(losses) > 1 else {}
        in_bits = bits_per_byte(loss, self.data.tokens_per_byte)
        self._tell("val", **self._position(), loss=loss, bits_per_byte=in_bits, **by_source)
        return loss

    def _score_tasks(self) -> None:
        """Score the tasks, of a run of one process; a signal breaks that off wherever it is, and nothing is half done."""
        if self.score_tasks is not None:
            with self._noted.at_once():
                scores = self.score_tasks(self.model)
            self._tell("eval", **self._position(), **scores)

    def _save(self) -> None:
        data = self.data.loader.state(self.progress.step)
        self.progress = replace(self.progress, data=data, skipped=self.guard.skipped, norm=self.guard.norm)
        self.metrics.flush()
        self.checkpoints.save(self.model, self.optimizer, self.progress)
        self._saved, self._saved_at = self.progress.step, self._now


def prepare(config: RunConfig, group: Group) -> tuple[RunData, Callable[[Decoder], dict[str, Any]] | None]:
    """The text of a run, and what scores its model on tasks, if any; `ValueError` for these and for sinks that cannot be."""
    check_names(config.train.log_to)
    data = open_data(config, group.rank, group.world_size)
    return data, task_scorer(config.train, data.tokenizer)


def check_runs(configs: Sequence[RunConfig]) -> None:
    """Raise what the first of these runs that cannot begin would raise; nothing is written and no model takes memory."""
    texts = {
        str((c.model.architecture, c.data, c.model.vocab_size, replace(c.train, seed=0, steps=1))): c for c in configs
    }
    for config in texts.values():
        micro_batches(config.train, 1)
        prepare(config, Group())
    for model in {str(config.model): config.model for config in configs}.values():
        with torch.device("meta"):
            build(model)
    for optim in {str(config.optim): config.optim for config in configs}.values():
        build_optimizer(torch.nn.Linear(1, 1), optim)


def gradients_of_batch(
    model: Spread, loader: Batches, step: int, micro_batch_size: int | None = None, end_token: int | None = None
) -> float:
    """Add the gradients of batch number `step` to the parameters, in micro-batches, and return its mean loss in nats.

    Of several processes each reads its own part of the batch; the gradients are the mean over all, the loss is its own, times
    the weight that makes the mean over processes one over targets.
    end_token: where given, attention does not cross from one document into another, each ended by this token.
    """
    tokens, targets = loader.batch(step)
    parts = list(zip(*(x.split(micro_batch_size or len(tokens)) for x in (tokens, targets)), strict=True))
    # Pairs of texts have different numbers of targets, and the mean is over targets.
    counts = [int((wanted != IGNORED).sum()) for _, wanted in parts]
    weight, total = loader.weight(step) / sum(counts), 0.0

    def loss_of(part: Tensor, wanted: Tensor) -> Tensor:
        part = part.to(model.device)
        return model.loss(part, wanted.to(model.device), *separate_documents(part, end_token))

    with model.whole(len(parts), lambda: [loss_of(*part) for part in parts]):
        for number, (part, wanted) in enumerate(parts, 1):
            with model.last(number == len(parts)):
                loss = loss_of(part, wanted) * (counts[number - 1] * weight)
                loss.backward()
            total += loss.item()
    return total


def train(config: RunConfig, out: Path, resume: bool = False, show_progress: bool = True) -> float:
    """Train the run that `config` describes, in the directory `out`; returns the final validation loss in nats per token.

    Under torchrun all its processes do it together, and a restart by torchrun resumes from the last checkpoint.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with on_device(config.train.device), joined(config.train, best_device()) as group, ExitStack() as held:
        return Trainer(config, out, resume or restarted, group, held).run(show_progress and not config.train.quiet)
