"""Commands that train: `compare`, `train`, `sweep`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
    OfTrain,
    Rhythm,
    RhythmFlags,
    SizeFlags,
    Sizes,
    SpreadFlags,
    Spreading,
    TaskFlags,
    TrainingTasks,
)
from spherelm.cli.given import Sets
from spherelm.errors import UserError

if TYPE_CHECKING:
    from spherelm.runs.config import RunConfig

OfOptim = Sets("spherelm.optim.groups.OptimConfig", left_out="(default: what the recipe says)")
OfGrid = Sets("spherelm.experiments.evidence_plan.Grid")
Compared = Sets("spherelm.experiments.comparison.CompareConfig")


def compare(
    out: Path,
    data: Annotated[str | None, Compared] = None,
    preset: Annotated[str, Compared] = "demo",
    recipe: Annotated[str, Compared] = "law",
    steps: Annotated[int | None, Compared] = None,
    seq_len: Annotated[int | None, Compared] = None,
    batch_size: Annotated[int | None, Compared] = None,
    lr_gpt: Annotated[float | None, Compared] = None,
    lr_ngpt: Annotated[float | None, Compared] = None,
    seeds: Annotated[int, Compared] = 1,
    quick: Annotated[Flag, Compared] = False,
    dtype: Annotated[Dtype, Compared] = "auto",
    no_compile: Flag = False,
    workers: int | None = None,
    resume: Flag = False,
) -> None:
    """Train a baseline and its normalized twin, and write a page that says how many fewer tokens the better one needs.

    Args:
        out: Directory for both arms' runs, summary.json and report.html.
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
        data=data,
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
    arm: Literal["gpt", "ngpt"] | None = None,
    data: str | None = None,
    preset: str | None = None,
    recipe: str | None = None,
    config: Path | None = None,
    sizes: SizeFlags = Sizes(),
    lr: Annotated[float | None, OfOptim] = None,
    seed: Annotated[int | None, OfTrain] = None,
    dtype: Annotated[Dtype | None, OfTrain] = None,
    threads: Annotated[int | None, OfTrain] = None,
    no_compile: Flag = False,
    mask_documents: Annotated[Flag, OfTrain] = False,
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
        data: Directory of `spherelm data prepare`; DIR=WEIGHT,DIR=WEIGHT; stream:NAME; PATH,tokenizer=NAME for token files of
            nanoGPT, llm.c or Megatron. The shipped text if left out.
        preset: Size and length of the run; demo if left out.
        recipe: How the arm is trained: law (if left out), paper, nugpt, training-ngpt, or an ablation
            (docs/recipes.md).
        config: A run's config.json: the run is that one, but for the flags that are given. Or a file, JSON or YAML, of some of
            its fields, as --set names them or nested as there: preset, recipe and flags say the rest.
        no_compile: Do not use torch.compile.
        fields: What shall differ from the recipe, field by field: schedule=log rho=0.05 optimizer=muon matrix_rate=3.
        resume: Go on with the run in `out` from its last checkpoint.
    """
    from spherelm.experiments.sweep import parse_fields
    from spherelm.recipes.overrides import WHOLE
    from spherelm.runs.config import read_record

    own = {"lr": lr, "seed": seed, "dtype": dtype, "threads": threads, "compile": False if no_compile else None}
    own |= {"mask_documents": mask_documents or None, **vars(sizes), **vars(rhythm), **vars(spreading)}
    own |= {"recompute": spreading.recompute or None, **vars(bad_steps), **vars(logs), **vars(scores)}
    chosen = {"arm": arm, "data": data, "preset": preset, "recipe": recipe}
    asked = {name: value for name, value in own.items() if value is not None}
    record = {} if config is None else read_record(config)
    is_whole = record.keys() >= WHOLE
    if is_whole:
        refuse_choices(config, chosen, fields)
    asked |= parse_fields(fields, {"lr": lr, **vars(sizes)})
    if config is not None and is_whole:
        run = run_of_whole(config, chosen, asked)
    else:
        run = run_of_parts(config, record, chosen, asked, dry_run.dry_run)
    carry_out(run, out, resume, dry_run)


def refuse_choices(config: Path | None, chosen: Mapping[str, str | None], fields: Iterable[str]) -> None:
    """Raise `UserError` where a flag or `--set` chooses what the whole run of the file `config` has chosen already."""
    names = ("arm", "preset", "recipe")
    given = [f"--{name}" for name in names if chosen[name] is not None]
    given += [f"--set {word}" for word in fields if word.partition("=")[0] in names]
    if given:
        raise UserError(f"{given[0]} does nothing beside --config {config}, which is of a whole run: leave it out")


def run_of_whole(config: Path, chosen: Mapping[str, str | None], asked: Mapping[str, Any]) -> RunConfig:
    """The run of the config.json `config`, but for the data that is chosen and the fields that are asked for."""
    from spherelm.data.sources import parse_data
    from spherelm.recipes import changed
    from spherelm.runs.config import read_config

    run, data = changed(read_config(config), asked), chosen["data"]
    if data is None:
        return run
    return replace(run, data=data, model=replace(run.model, vocab_size=parse_data(data).vocab_size))


def run_of_parts(
    config: Path | None,
    record: Mapping[str, Any],
    chosen: Mapping[str, str | None],
    asked: Mapping[str, Any],
    dry: bool,
) -> RunConfig:
    """The run of the fields in `record`, of the file `config`, and over them what is chosen and asked for by flags."""
    from spherelm.recipes import make_run
    from spherelm.recipes.overrides import fields_in

    given = fields_in(record) | {name: value for name, value in chosen.items() if value is not None} | dict(asked)
    arm, preset, data = given.pop("arm", None), given.pop("preset", "demo"), given.pop("data", None)
    if arm is None:
        lacking = "no arm is given" if config is None else f"{config} names no arm"
        raise UserError(f"{lacking}: give --arm gpt or --arm ngpt, or the --config of a run")
    for name, value in (("arm", arm), ("preset", preset), ("data", data)):
        if not isinstance(value, str | None):
            raise UserError(f"{name} must be text, got {value!r}")
    size = vocabulary(data, preset, dry)
    return make_run(arm, preset, given.pop("recipe", "law"), **{"vocab_size": size, "data": data, **given})


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
    from spherelm.recipes.explained import explained
    from spherelm.train.batches import check_text, epochs
    from spherelm.train.estimate import Layout, estimate, estimate_table
    from spherelm.train.sinks import check_names

    train = config.train
    check_names(train.log_to)
    check_text(config)
    layout = Layout(asked.world_size, train.strategy, train.shard_size, train.recompute)
    memory = None if asked.device_memory is None else round(asked.device_memory * 2**30)
    found = estimate(config, layout, asked.mfu, asked.peak_tflops, memory, epochs(config, train.steps))
    print(json.dumps(found, indent=2) if asked.json else "\n".join([estimate_table(found), *explained(config)]))


def sweep(
    out: Path,
    arms: tuple[Literal["gpt", "ngpt"], ...] = ("gpt", "ngpt"),
    lr: tuple[float, ...] = (),
    vary: tuple[str, ...] = (),
    preset: str = "demo",
    recipe: tuple[str, ...] = ("law",),
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
    data: Annotated[Path, OfGrid],
    test: Annotated[Path, OfGrid],
    sizes: Annotated[tuple[str, ...], OfGrid] = ("0.3m",),
    contexts: Annotated[tuple[int, ...], OfGrid] = (256,),
    budgets: Annotated[tuple[float, ...], OfGrid] = (5.0, 10.0),
    contenders: Annotated[tuple[str, ...], OfGrid] = ("gpt-law", "gpt-paper", "ngpt-law", "ngpt-paper"),
    seeds: Annotated[int, OfGrid] = 3,
    workers: int | None = None,
    minutes: float | None = None,
) -> None:
    """Measure the tokens and seconds nGPT saves over sizes, contexts and budgets, every contender tuned at each; resumable.

    Args:
        out: Directory for the runs and evidence.json; the same command again goes on with it.
        workers: Runs at once; one a core if left out.
        minutes: After so long, save what is under way, print the tables so far and end with exit code 0; no limit if left out.
    """
    from spherelm.experiments.evidence import climb
    from spherelm.experiments.evidence_plan import Grid
    from spherelm.experiments.evidence_record import table

    grid = Grid(str(data), str(test), sizes, contexts, budgets, contenders, seeds)
    print(table(climb(grid, out, workers, minutes)))
