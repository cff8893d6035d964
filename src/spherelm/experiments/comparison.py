"""The main job: both arms on the same text, batches and budget, and a page that says what came of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from spherelm.data.output import write_json
from spherelm.data.sources import parse_data
from spherelm.data.tokenizer import load_tokenizer
from spherelm.errors import UserError
from spherelm.evaluate.perplexity import bits_per_byte
from spherelm.experiments.cost import StepCost, measure_cost
from spherelm.experiments.jobs import Job, run_jobs, say_before, threads_each, workers_for
from spherelm.experiments.speedup import CurvePoint, losing_losses, speedup, winner
from spherelm.fields import check
from spherelm.generation import DRAW
from spherelm.generation.samples import continuations
from spherelm.models import ARMS, DecoderArch, parameter_count
from spherelm.recipes import PRESET, RECIPE, make_run
from spherelm.recipes.overrides import fields_of
from spherelm.recipes.written import FIXED, parse_fields
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.runs.config import RunConfig, TrainConfig, read_config
from spherelm.runs.metrics import read_metrics
from spherelm.runs.record import claimed, command_line, git_commit, versions
from spherelm.train.batches import open_data
from spherelm.train.checks import check_runs
from spherelm.train.guard import Diverged
from spherelm.train.precision import on_device
from spherelm.train.threads import threads

SHORTER = (0.65, 0.4, 0.25)
"""The parts of the full budget that the winning arm is also trained for, each with a full schedule of its own, until
one is too short for it to win."""

PROMPT = "The old man looked out over the sea, and"


@dataclass(frozen=True)
class CompareConfig:
    """A comparison: preset, recipe and seeds, and the fields that differ from the preset (`None`: as there).

    Attributes:
        preset: Size and length of the models' runs (spherelm list presets); demo if left out.
        recipe: How each arm is trained (spherelm list recipes); law if left out.
        data: As for spherelm train; the text that ships with spherelm if left out.
        seeds: Runs an arm; with 2 or more the speedup gets an interval.
        quick: Read the speedup off the curves of the full runs; do not train at shorter budgets as well.
        steps: Updates of a full run; the preset's if left out.
        seq_len: Tokens a sequence; the preset's if left out.
        batch_size: Sequences an update; the preset's if left out.
        lr_gpt: The baseline's peak learning rate; the recipe's if left out.
        lr_ngpt: The normalized arm's peak learning rate; the recipe's if left out.
        dtype: As in `TrainConfig`.
        compile: Whether to use torch.compile; the preset says if left out.
        fields: More fields, such as "d_model=64", for each arm that has them.
        threads: Threads of the processor in each run; the cores are shared if left out.
        device: As in `TrainConfig`.
        quiet: As in `TrainConfig`.
    """

    preset: str = PRESET
    recipe: str = RECIPE
    data: str | None = None
    seeds: PositiveInt = 1
    quick: bool = False
    steps: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    lr_gpt: float | None = None
    lr_ngpt: float | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = TrainConfig.dtype
    compile: bool | None = None
    fields: tuple[str, ...] | None = None
    threads: PositiveInt | None = None
    device: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def record(self) -> dict[str, Any]:
        """The settings that the results depend on."""
        return {name: value for name, value in vars(self).items() if name not in ("threads", "device", "quiet")}

    def run(self, arm: str, vocab_size: int, seed: int, steps: int | None = None) -> RunConfig:
        """The run of `arm` with `seed`, over `steps` updates or the whole budget."""
        asked: dict[str, Any] = {"steps": steps or self.steps, "seq_len": self.seq_len, "batch_size": self.batch_size}
        asked |= {"dtype": self.dtype, "compile": self.compile, "threads": self.threads, "device": self.device}
        given = {name: value for name, value in asked.items() if value is not None}
        fields = parse_fields(self.fields or (), given, FIXED)
        others = set().union(*(fields_of(other) for other in ARMS if other != arm)) - fields_of(arm)
        given |= {"seed": seed, **{name: value for name, value in fields.items() if name not in others}}
        lr = self.lr_gpt if arm == "gpt" else self.lr_ngpt
        return make_run(arm, self.preset, self.recipe, vocab_size=vocab_size, data=self.data, lr=lr, **given)


def compare(config: CompareConfig, out: Path, resume: bool = False, workers: int | None = None) -> dict[str, Any]:
    """Train both arms as `config` says in directories below `out`; write `summary.json` and `samples.json`.

    Returns the summary. Raises `FileExistsError` if `out` holds something already, unless `resume` is given, and
    `Diverged` if every run did.
    """
    start = time.perf_counter()
    workers_for(1, workers)  # a wrong number is refused before anything is written
    vocab_size = parse_data(config.data).vocab_size
    full = {arm: [config.run(arm, vocab_size, seed) for seed in range(config.seeds)] for arm in ARMS}
    if not isinstance(architecture := full["gpt"][0].model.architecture, DecoderArch):
        raise UserError(
            f"compare is for language models, and preset {config.preset!r} has the architecture "
            f"{architecture.kind}: use spherelm sweep to train both arms"
        )
    data = open_data(full["gpt"][0])
    check_runs(
        [runs[0] for runs in full.values()]
        + [
            config.run(arm, vocab_size, 0, steps)
            for arm, runs in full.items()
            for steps in shorter_budgets(runs[0].train.steps)
        ]
    )
    with claimed(out, {**config.record, "data_identity": data.identity}, resume, "seeds"), on_device(config.device):
        jobs = {arm: [Job(run, out / f"{arm}-{run.train.seed}") for run in runs] for arm, runs in full.items()}
        # Seed by seed, so that both arms of a pair run side by side.
        in_order = [job for pair in zip(*jobs.values(), strict=True) for job in pair]
        if not config.quiet:
            say_before(in_order, workers)
        losses = dict(
            zip(
                (job.out for job in in_order),
                run_jobs(in_order, workers, "" if config.quiet else "full runs"),
                strict=True,
            )
        )
        if all(math.isnan(loss) for loss in losses.values()):
            raise Diverged(
                f"{out}: every run of both arms diverged, there is nothing to compare: lower --lr-gpt and --lr-ngpt"
            )
        final = {arm: [losses[job.out] for job in arm_jobs] for arm, arm_jobs in jobs.items()}
        best = winner(final)
        targets = losing_losses(final, best)
        ends = [] if config.quick else shorter_runs(config, best, jobs[best][0].config, targets, out, workers)
        with threads(threads_each(workers_for(len(in_order), workers))):
            cost = measure_cost(full["gpt"][0], full["ngpt"][0])
            drawn = samples({arm: jobs[arm][0].out for arm in jobs})
        summary = summarize(config, jobs, final, ends, cost, data.tokens_per_byte)
        summary["wall_seconds"] = time.perf_counter() - start
        write_json(out / "summary.json", summary)
        write_json(out / "samples.json", drawn)
        return summary


def shorter_budgets(steps: int) -> list[int]:
    """The parts `SHORTER` of `steps` in whole updates, longest first, without repetition."""
    return sorted({round(part * steps) for part in SHORTER} - {0, steps}, reverse=True)


def shorter_runs(
    config: CompareConfig, arm: str, full: RunConfig, targets: list[float], out: Path, workers: int | None
) -> list[tuple[Job, float]]:
    """Train `arm` over ever shorter budgets until no seed reaches its target any more: there the crossing is bracketed.

    full: the run over the whole budget; targets: the loss to reach, by seed. Returns the runs and how they ended.
    """
    done: list[tuple[Job, float]] = []
    for count in shorter_budgets(full.train.steps):
        runs = [config.run(arm, full.model.vocab_size, seed, steps=count) for seed in range(config.seeds)]
        jobs = [Job(run, out / f"{arm}-{run.train.seed}-steps{count}") for run in runs]
        losses = run_jobs(jobs, workers, "" if config.quiet else "shorter runs")
        done += zip(jobs, losses, strict=True)
        if not any(loss <= target for loss, target in zip(losses, targets, strict=True)):
            break
    return done


def in_run_curve(run: Path) -> list[CurvePoint]:
    """(tokens, validation loss) along a run, its untrained start left out."""
    return [(r["tokens"], r["loss"]) for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "val" and r["step"]]


def tokens_of(config: RunConfig) -> int:
    """How many tokens a whole run trains on."""
    return config.train.steps * config.train.batch_size * config.train.seq_len


def summarize(
    config: CompareConfig,
    jobs: dict[str, list[Job]],
    final: dict[str, list[float]],
    shorter: list[tuple[Job, float]],
    cost: StepCost,
    rate: float,
) -> dict[str, Any]:
    """The content of `summary.json`; rate: tokens a byte of the validation text."""
    best, first = winner(final), jobs["gpt"][0].config
    if config.quick:
        curves, method = [in_run_curve(job.out) for job in jobs[best]], "in-run"
    else:
        whole = zip(jobs[best], final[best], strict=True)
        ends = {job.config.train.seed: [(float(tokens_of(job.config)), loss)] for job, loss in whole}
        for job, loss in shorter:
            ends[job.config.train.seed].append((float(tokens_of(job.config)), loss))
        curves, method = list(ends.values()), "schedule-ends"
    seconds = dict(zip(ARMS, (cost.gpt_seconds, cost.ngpt_seconds), strict=True))
    micro = (first.train.micro_batch_size or first.train.batch_size) * first.train.seq_len
    return {
        "arms": {
            arm: {
                "final_loss": float(np.mean(final[arm])),
                "final_loss_by_seed": final[arm],
                "final_loss_se": float(np.std(final[arm], ddof=1) / len(final[arm]) ** 0.5) if config.seeds > 1 else None,
                "bits_per_byte": bits_per_byte(float(np.mean(final[arm])), rate),
                "tokens_per_second": micro / seconds[arm],
                "lr": jobs[arm][0].config.optim.lr,
                "recipe": config.recipe,
                "optimizer": jobs[arm][0].config.optim.optimizer.kind,
                "parameters": parameter_count(jobs[arm][0].config.model),
                "runs": [job.out.name for job in jobs[arm]],
            }
            for arm in ARMS
        },
        "short_runs": [
            {
                "run": job.out.name,
                "arm": job.config.arm,
                "seed": job.config.train.seed,
                "steps": job.config.train.steps,
                "tokens": tokens_of(job.config),
                "final_loss": loss,
            }
            for job, loss in shorter
        ],
        "speedup": speedup(final, tokens_of(first), curves, cost.ratio, method),
        "step_time_ratio": cost.ratio,
        "config": {**config.record, "steps": first.train.steps, "seq_len": first.train.seq_len,
                   "batch_size": first.train.batch_size, "tokens": tokens_of(first)},
        "command": command_line(),
        "versions": versions(),
        "git_commit": git_commit(),
    }  # fmt: skip


def samples(runs: dict[str, Path]) -> dict[str, Any]:
    """`samples.json`: what each arm's first run makes of the same beginning, drawn by `DRAW`.

    Where models read too few tokens for that, beginning and continuation share what there is. A run that diverged
    before it saved anything has no samples.
    """
    first = next(iter(runs.values()))
    tokenizer, limit = load_tokenizer(first), read_config(first / "config.json").model.max_seq_len
    prompt = tokenizer.decode(tokenizer.encode(PROMPT)[: max(1, limit // 2)])
    length = max(0, min(90, limit - len(tokenizer.encode(prompt))))
    drawn = {
        arm: continuations(run, prompt, 2, length, **DRAW, seed=0) if latest_checkpoint(run) else []
        for arm, run in runs.items()
    }
    return {"prompt": prompt, **drawn}
