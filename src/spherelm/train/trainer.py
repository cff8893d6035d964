"""The training loop. It does not know which arm it trains: what makes nGPT nGPT hangs on the optimizer.

Nor does it know how many processes train: `parallel.Group` and `parallel.DistributedModel` do.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spherelm.data.verification import verify_where_cheap
from spherelm.evaluate.perplexity import bits_per_byte
from spherelm.layers.moe import clear_loads, routers
from spherelm.models import Decoder, build
from spherelm.optim import build_optimizer, factor
from spherelm.optim.groups import clip_gradients, set_rate
from spherelm.progress import Bar, say
from spherelm.runs.checkpoint import CheckpointWriter, Progress, latest_checkpoint, load_checkpoint
from spherelm.runs.config import RunConfig, micro_batches, to_dict
from spherelm.runs.group import Group
from spherelm.runs.metrics import in_words
from spherelm.runs.record import open_run, recorded_dtype
from spherelm.train.batches import total_loss, validation_losses
from spherelm.train.checks import prepare, started
from spherelm.train.diagnostics import Diagnosis, Speed, load_of_experts, peak_memory_mb
from spherelm.train.guard import WORSE, Diverged, Guard, untrained_loss
from spherelm.train.heap import keep_freed_memory
from spherelm.train.init_from import check_length, load_initial_weights
from spherelm.train.low_precision import lower_precision, seed_noise
from spherelm.train.metrics_log import MetricsLog, NoLog
from spherelm.train.opening import opening
from spherelm.train.parallel import RankLost, distributed, joined
from spherelm.train.precision import best_device, compile_blocks, name_of, on_device, resolve_dtype
from spherelm.train.signals import Interrupted, Noted, Stop, signals_noted
from spherelm.train.sinks import open_sinks
from spherelm.train.threads import threads, threads_for
from spherelm.train.update import Arriving, Update, gradients_of_batch


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
        group.together(lambda: self._prepare(resume))
        keep_freed_memory()
        torch.manual_seed(train.seed)
        model = build(config.model)
        if config.init_from and not (resume and latest_checkpoint(out)):
            group.together(lambda: load_initial_weights(model, Path(str(config.init_from))))
        model.to(self.device)
        self.config = config = group.first(lambda: self._with_dtype(model, resume))
        model.runtime.compute_dtype = resolve_dtype(config.train.dtype, model, 0)
        model.runtime.label_smoothing = train.label_smoothing
        self.noise = group.together(lambda: lower_precision(model, train.precision, train.seed))
        self.model = model
        self.distributed = distributed(model, group, train.recompute, train.gather)
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
        # An update that may be left out is judged before it is made.
        self.reads_late = self.device.type != "cpu" and train.on_bad_step == "stop" and not train.spike_factor
        self._unread: Update | None = None
        self._since = 0.0
        self.speed = Speed(model, train, self.device, group.world_size)
        self.checkpoints = CheckpointWriter(out, train.keep, train.keep_every, group)
        self.metrics = group.together(lambda: self._open_log() if group.is_first else NoLog())
        self._noted, self._stop, self._bar = Noted(), 0, Bar("", None, show=False)
        self._now = self._saved_at = group.gather([time.monotonic()])[0][0]

    def _prepare(self, resume: bool) -> None:
        """Everything that may be refused on any process: text, tasks, sinks."""
        config, group = started(self.config, self.out, resume), self.group
        self.micro_batch_size, _ = micro_batches(config.train, group.world_size)
        self.data, self.score_tasks = prepare(config, group)

    def _with_dtype(self, model: Decoder, resume: bool) -> RunConfig:
        """The configuration with a format in place of "auto": the resumed run's, or the faster one here."""
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
        for line in group.first(lambda: check_length(self.out, self.config, resume)):
            say(line)
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

        Raises `Diverged` naming the step and the cause, `Interrupted` after saving on one of the signals `NOTED`,
        `RankLost` naming the processes that do not answer, `OSError` if a checkpoint cannot be written.
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
        """Validate and score tasks where due and not `present` in the log; returns the validation loss, or NaN."""
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
        """Make an update and report on it; where that can be late, on the one before, while the device computes."""
        config, step = self.config, self.progress.step
        every = config.train.diagnose_every
        diagnosis = Diagnosis(self.model, self.optimizer) if every and (step + 1) % every == 0 else None
        if self._unread is None:
            self._since = time.perf_counter()
        update = self._update(step, config.optim.lr * factor(config.schedule, step, config.train.steps))
        self.progress = replace(self.progress, step=step + 1)
        self._catch_up()
        self._unread, update.diagnosis = update, diagnosis
        if diagnosis or not self.reads_late:
            self._catch_up()
        if self._stop:
            raise Stop(self._stop)

    def _update(self, step: int, lr: float) -> Update:
        """One optimizer step, if it is not left out; one that is judged late is made, and waits for nothing."""
        set_rate(self.optimizer, lr)
        seed_noise(self.noise, self.config.train.seed, step, self.group.rank)
        losses = self._gradients(step)
        update = Update(step, lr, Arriving(losses, clip_gradients(self.model, self.config.optim.grad_clip)))
        if self.reads_late or self._judge(update):
            self.optimizer.step()
        self.optimizer.zero_grad()
        update.loads = Arriving(*(router.seen for _, router in routers(self.model)))
        return update

    def _judge(self, update: Update) -> bool:
        """Read the loss of an update, and the norm of its gradient before clipping; whether nothing is wrong with them.

        Notes the signal by which any of the processes was asked to stop, and the time.
        """
        losses, norm = update.numbers.read()
        reports = self.group.gather([sum(losses.tolist()), float(self._noted.first), time.monotonic()])
        by_rank, self._stop = [report[0] for report in reports], int(max(report[1] for report in reports))
        self._now = reports[0][2]  # by the clock of the first process, so that all save at one update
        update.loss, update.grad_norm = sum(by_rank) / len(by_rank), norm.item()
        if fault := self.guard.fault(by_rank, update.grad_norm, update.step):
            update.grad_norm = None
            clear_loads(self.model)
            self._leave_out(fault, update.step)
        return not fault

    def _catch_up(self) -> None:
        """Report on the update that was not reported on yet, if any: before anything is made of its weights."""
        update, self._unread = self._unread, None
        if update is None:
            return
        if update.loss is None:
            self._judge(update)
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        self.progress = replace(self.progress, seconds=self.progress.seconds + seconds)
        speed = self.tokens_per_step / seconds
        record: dict[str, Any] = {"loss": update.loss, "lr": update.lr, "grad_norm": update.grad_norm}
        record["tokens_per_second"] = speed
        if update.grad_norm is not None:
            record |= {"mfu": self.speed.mfu(speed), "memory_mb": peak_memory_mb(self.device)}
            record |= {"threads": torch.get_num_threads(), **load_of_experts(update.loads.read())}
            measured = update.diagnosis.measure() if update.diagnosis else {}
            self.metrics.write("train", **self._position(update.step + 1), **record, **measured)
        # Compiled code is made for a number of threads.
        if self.threads and not self.config.train.compile and (changed := self.threads.after(seconds)):
            self._bar.line(changed)
        self._bar.update(1, in_words({"kind": "train", **record}))

    def _leave_out(self, fault: str, step: int) -> None:
        """Note an update that is not made; raises `Diverged` where the run has to end."""
        try:
            self.guard.skip(fault)
        except Diverged as error:
            raise self._diverged(str(error), step + 1) from None
        self._tell("skip", **self._position(step + 1), reason=fault)

    def _tell(self, kind: str, **values: Any) -> None:
        """Note a record that a person sees at once."""
        self.metrics.write(kind, **values)
        self._bar.line(in_words({"kind": kind, **values}))

    def _diverged(self, what: str, step: int | None = None) -> Diverged:
        """The error with which the run ends, noted in the log; step: where, if not here."""
        self.metrics.write("stop", **self._position(step), reason=what)
        rate = self.config.optim.lr
        return Diverged(
            f"{self.out}: {what} (peak learning rate {rate:.3g}): lower --lr or check the data around this batch"
        )

    def _gradients(self, step: int) -> Tensor:
        return gradients_of_batch(self.distributed, self.data.loader, step, self.micro_batch_size, self.data.end_token)

    def _position(self, step: int | None = None) -> dict[str, float]:
        step = self.progress.step if step is None else step
        return {"step": step, "tokens": step * self.tokens_per_step, "seconds": round(self.progress.seconds, 4)}

    def _validation_losses(self) -> dict[str, float]:
        try:
            return validation_losses(self.model, self.data, self.micro_batch_size, self.group, self._heed)
        finally:
            self.distributed.rest()

    def _validate(self) -> float:
        self._catch_up()
        losses, step = self._validation_losses(), self.progress.step
        loss, unequal_ranks = total_loss(self.data, losses), self.group.unequal_ranks(self.model)
        if unequal_ranks:
            raise self._diverged(
                f"rank {', '.join(map(str, unequal_ranks))} holds different weights from the other ranks at step {step}"
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
        """Score the tasks, of a run of one process; a signal breaks that off wherever it is,
        and nothing is half done.
        """
        self._catch_up()
        if self.score_tasks is not None:
            with self._noted.at_once():
                scores = self.score_tasks(self.model)
            self._tell("eval", **self._position(), **scores)

    def _save(self) -> None:
        self._catch_up()
        data = self.data.loader.state(self.progress.step)
        self.progress = replace(self.progress, data=data, skipped=self.guard.skipped, norm=self.guard.norm)
        self.metrics.flush()
        self.checkpoints.save(self.model, self.optimizer, self.progress)
        self._saved, self._saved_at = self.progress.step, self._now


def train(config: RunConfig, out: Path, resume: bool = False, show_progress: bool = True) -> float:
    """Train the run that `config` describes, in the directory `out`; returns the last validation loss in nats.

    Under torchrun all its processes do it together, and a restart by torchrun resumes from the last checkpoint.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with on_device(config.train.device), joined(config.train, best_device()) as group, ExitStack() as held:
        return Trainer(config, out, resume or restarted, group, held).run(show_progress and not config.train.quiet)
