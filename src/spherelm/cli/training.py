"""Commands that train: `compare`, `train`, `sweep`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from spherelm.cli.flags import (
    BadStepFlags,
    BadSteps,
    DryRun,
    DryRunFlags,
    Dtype,
    Flag,
    LogFlags,
    Logs,
    Rhythm,
    RhythmFlags,
    SizeFlags,
    Sizes,
    SpreadFlags,
    Spreading,
    TaskFlags,
    TrainingTasks,
)
from spherelm.cli.given import Needs, is_given
from spherelm.errors import UserError

if TYPE_CHECKING:
    from spherelm.runs.config import RunConfig


def compare(
    out: Path,
    data: Path | None = None,
    preset: str = "demo",
    recipe: str = "default",
    steps: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    lr_gpt: float | None = None,
    lr_ngpt: float | None = None,
    seeds: int = 1,
    quick: Flag = False,
    dtype: Dtype = "auto",
    no_compile: Flag = False,
    workers: int | None = None,
    resume: Flag = False,
) -> None:
    """Train a baseline and its normalized twin, and write a page that says how many fewer tokens the better one needs.

    Args:
        out: Directory for both arms' runs, summary.json and report.html.
        data: Data directory made by `spherelm data prepare`; the text that ships with spherelm if left out.
        preset: Size and length of the models' runs.
        recipe: How each arm is trained: default, adam, muon, paper, nugpt, training-ngpt, or an ablation (docs/recipes.md).
        steps: Updates of a full run; the preset's if left out.
        seq_len: Tokens a sequence; the preset's if left out.
        batch_size: Sequences an update; the preset's if left out.
        lr_gpt: The baseline's peak learning rate; the one tuned for the preset if left out.
        lr_ngpt: The normalized arm's peak learning rate; the one tuned for the preset if left out.
        seeds: Runs an arm; with 2 or more the speedup gets an interval.
        quick: Read the speedup off the curves of the full runs; do not train at shorter budgets as well.
        dtype: Format of the computation (weights are float32); auto: bfloat16 where the hardware has it.
        no_compile: Do not use torch.compile (the demo preset does not anyway).
        workers: Runs at once; one a core if left out, one in all on an accelerator.
        resume: Go on with the comparison in `out`.
    """
    from spherelm.experiments.comparison import CompareConfig
    from spherelm.experiments.comparison import compare as run_comparison
    from spherelm.report.drawing import require_matplotlib
    from spherelm.report.report import write_report

    config = CompareConfig(
        preset=preset,
        recipe=recipe,
        data=None if data is None else str(data),
        seeds=seeds,
        quick=quick,
        steps=steps,
        seq_len=seq_len,
        batch_size=batch_size,
        lr_gpt=lr_gpt,
        lr_ngpt=lr_ngpt,
        dtype=dtype,
        compile=False if no_compile else None,
    )
    require_matplotlib()  # the page comes last: do not train for it in vain
    summary = run_comparison(config, out, resume, workers)
    write_report(out)
    print(json.dumps({"speedup": summary["speedup"], "step_time_ratio": summary["step_time_ratio"]}, indent=2))
    print(f"The page: {(out / 'report.html').resolve()}")


def train(
    out: Path,
    arm: Annotated[Literal["gpt", "ngpt"] | None, Needs(without=["--config"])] = None,
    data: Path | None = None,
    preset: Annotated[str, Needs(without=["--config"])] = "demo",
    recipe: Annotated[str, Needs(without=["--config"])] = "default",
    config: Path | None = None,
    sizes: SizeFlags = Sizes(),
    lr: float | None = None,
    seed: int = 0,
    dtype: Dtype = "auto",
    no_compile: Flag = False,
    mask_documents: Flag = False,
    fields: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = (),
    resume: Flag = False,
    rhythm: RhythmFlags = Rhythm(),
    spreading: SpreadFlags = Spreading(),
    bad_steps: BadStepFlags = BadSteps(),
    logs: LogFlags = Logs(),
    scores: TaskFlags = TrainingTasks(),
    dry_run: DryRunFlags = DryRun(),
) -> None:
    """Train one model.

    Args:
        out: Run directory: config.json, metrics.jsonl, checkpoints.
        arm: The baseline, or the normalized Transformer; the preset says in which architecture.
        data: Directory made by `spherelm data prepare`, DIR=WEIGHT,DIR=WEIGHT, or stream:NAME; the shipped text if left out.
        preset: Size and length of the run.
        recipe: How the arm is trained: default, adam, muon, paper, nugpt, training-ngpt, or an ablation (docs/recipes.md).
        config: A run's config.json: the run is that one, but for the flags that are given.
        lr: Peak learning rate; the one tuned for the preset and recipe if left out.
        seed: Of the weights' start and of the order of the text.
        dtype: Format of the computation (weights are float32); auto: bfloat16 where the hardware has it.
        no_compile: Do not use torch.compile.
        mask_documents: Keep attention within a document where a sequence holds several.
        fields: What shall differ from the recipe, field by field: schedule=log rho=0.05 optimizer=muon matrix_rate=3.
        resume: Go on with the run in `out` from its last checkpoint.
    """
    from spherelm.experiments.sweep import parse_fields
    from spherelm.recipes import changed, make_run
    from spherelm.runs.config import read_config

    path, compiled = None if data is None else str(data), False if no_compile else None
    habits: dict[str, Any] = {"compile": compiled, "mask_documents": mask_documents or None}
    habits |= {**vars(rhythm), **vars(logs), **vars(spreading), **vars(bad_steps)}
    habits |= {**vars(scores), "task_data": None if scores.task_data is None else str(scores.task_data)}
    own = parse_fields(fields, {"lr": lr, **vars(sizes)})
    asked = {"lr": lr, "seed": seed, "dtype": dtype, **vars(sizes), **habits}
    asked = {name: value for name, value in asked.items() if value is not None}
    if config is not None:
        given = {name: value for name, value in asked.items() if is_given({"compile": "no_compile"}.get(name, name))}
        run = changed(read_config(config), given | own)
        run = run if path is None else on_data(run, path)
    elif arm is None:
        raise UserError("no arm is given: give --arm gpt or --arm ngpt, or the --config of a run")
    else:
        size = vocabulary(path, preset, dry_run.dry_run)
        run = make_run(arm, preset, recipe, vocab_size=size, data=path, **(asked | own))
    carry_out(run, out, resume, dry_run)


def on_data(config: RunConfig, data: str) -> RunConfig:
    """The run of `config` on other data, with as many token ids as that has."""
    from spherelm.data.sources import parse_data

    return replace(config, data=data, model=replace(config.model, vocab_size=parse_data(data).vocab_size))


def carry_out(config: RunConfig, out: Path, resume: bool, dry_run: DryRun) -> None:
    """Train by `config` in `out`, or say what that would take."""
    from spherelm.train.trainer import train as run_training

    if dry_run.dry_run:
        describe(config, dry_run)
        return
    loss = run_training(config, out, resume)
    print(f"final validation loss {loss:.4f} nats per token; the run is in {out}")


def vocabulary(data: str | None, preset: str, dry_run: bool) -> int:
    """How many token ids the data has; a size that names its own vocabulary needs no data to be described."""
    from spherelm.data.sources import parse_data
    from spherelm.recipes.presets import PRESETS

    known = PRESETS[preset].vocab_size if preset in PRESETS and dry_run and data is None else None
    return known or parse_data(data).vocab_size


def describe(config: RunConfig, asked: DryRun) -> None:
    """Print what the run of `config` would take, spread as asked."""
    from spherelm.train.batches import check_text, epochs
    from spherelm.train.estimate import Layout, estimate, estimate_table
    from spherelm.train.sinks import check_names

    train = config.train
    check_names(train.log_to)
    check_text(config)
    layout = Layout(asked.world_size, train.strategy, train.shard_size, train.recompute)
    memory = None if asked.device_memory is None else round(asked.device_memory * 2**30)
    found = estimate(config, layout, asked.mfu, asked.peak_tflops, memory, epochs(config, train.steps))
    print(json.dumps(found, indent=2) if asked.json else estimate_table(found))


def sweep(
    out: Path,
    arms: tuple[Literal["gpt", "ngpt"], ...] = ("gpt", "ngpt"),
    lr: tuple[float, ...] = (),
    vary: tuple[str, ...] = (),
    preset: str = "demo",
    recipe: tuple[str, ...] = ("default",),
    steps: int | None = None,
    data: Path | None = None,
    seeds: int = 1,
    workers: int | None = None,
) -> None:
    """Train every combination of arms, recipes, learning rates and varied fields; resumable by giving the command again.

    Args:
        out: Directory for the runs, sweep.json and the page index.html.
        arms: Which arms.
        lr: Peak learning rates; the tuned one if left out.
        vary: Fields and their values, such as alpha.init=0.05,0.25 or batch_size=4,8.
        preset: Size and length of the runs.
        recipe: How the arms are trained, one or several; ablations stands for the paper's recipe and all of its ablations.
        steps: Updates; the preset's if left out.
        data: Data directory made by `spherelm data prepare`; the text that ships with spherelm if left out.
        seeds: Runs a combination.
        workers: Runs at once; one a core if left out.
    """
    from spherelm.data.sources import parse_data
    from spherelm.experiments.sweep import grid, parse_axes, table
    from spherelm.experiments.sweep import sweep as run_sweep
    from spherelm.recipes import distinct, recipe_names
    from spherelm.report.drawing import require_matplotlib
    from spherelm.report.sweep_page import write_page

    require_matplotlib()  # the page comes last: do not train for it in vain
    path = None if data is None else str(data)
    varied = parse_axes(vary, {"lr": lr or None, "steps": steps}, ("seed", "data", "vocab_size"))
    axes = {"arm": arms, "preset": (preset,), "recipe": recipe_names(recipe), **varied}
    axes |= {"lr": lr} if lr else {}
    axes |= {} if steps is None else {"steps": (steps,)}
    rows = run_sweep(
        distinct(grid(axes)), seeds, out, vocab_size=parse_data(path).vocab_size, data=path, workers=workers
    )
    write_page(rows, out)
    print(table(rows))


def evidence(
    out: Path,
    data: Path,
    test: Path,
    sizes: tuple[str, ...] = ("0.3m",),
    contexts: tuple[int, ...] = (256,),
    budgets: tuple[float, ...] = (5.0, 10.0),
    contenders: tuple[str, ...] = ("gpt-adamw", "gpt-muon", "ngpt-adam", "ngpt-muon"),
    seeds: int = 3,
    workers: int | None = None,
    minutes: float | None = None,
) -> None:
    """Measure the tokens and seconds nGPT saves over sizes, contexts and budgets, every contender tuned at each; resumable.

    Args:
        out: Directory for the runs and evidence.json; the same command again goes on with it.
        data: Data directory made by `spherelm data prepare`; its validation text chooses learning rates.
        test: Data directory made with the same tokenizer, whose validation text is used at the end only.
        sizes: Presets: 0.3m, 1m, 4m, 12m are counted in block parameters.
        contexts: Tokens a sequence; an update has 1024 tokens at each.
        budgets: Tokens for each block parameter.
        contenders: Among gpt-paper, gpt-adamw, gpt-muon, ngpt-paper, ngpt-adam, ngpt-muon, nugpt, training-ngpt.
        seeds: Runs at the learning rate that was found.
        workers: Runs at once; one a core if left out.
        minutes: After so long, save what is under way, print the tables so far and end with exit code 0; no limit if left out.
    """
    from spherelm.experiments.evidence import climb
    from spherelm.experiments.evidence_plan import Grid
    from spherelm.experiments.evidence_record import table

    grid = Grid(str(data), str(test), sizes, contexts, budgets, contenders, seeds)
    print(table(climb(grid, out, workers, minutes)))
