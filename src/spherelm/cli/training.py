"""Commands that train: `compare`, `train`, `sweep`, `evidence`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spherelm.cli.flags import TRAIN, Arm, DryRunFlags, Given, OnMachine, Settings, TrainFlags
from spherelm.cli.parser import BARE, Fields
from spherelm.errors import UserError

if TYPE_CHECKING:
    from spherelm.runs.config import RunConfig

COMPARE = "spherelm.experiments.comparison.CompareConfig"
Compared = Annotated[
    Given,
    Fields(COMPARE, "data", "preset", "recipe", "steps", "seq_len", "batch_size", "lr_gpt", "lr_ngpt", "seeds", "quick"),
    Fields(TRAIN, "dtype"),
    Fields(COMPARE, "threads", title="machine"),
    Fields(TRAIN, "device", "quiet", title="machine"),
]  # fmt: skip
Gridded = Annotated[Given, Fields("spherelm.experiments.evidence_plan.Grid", "sizes", "contexts", "budgets",
                                  "contenders", "seeds", "confirm")]  # fmt: skip


def compare(
    *,
    out: Path,
    config: Compared,
    set_: Settings = (),
    no_compile: bool = False,
    workers: int | None = None,
    resume: bool = False,
) -> None:
    """Train GPT and nGPT on the same data, and report how many fewer tokens the better one needs.

    Example: spherelm compare --out runs/first --data book.txt --seeds 3

    Args:
        out: Directory for both arms' runs, summary.json and report.html.
        set_: Fields of the runs that differ from the recipe; a field that only one arm has is set for that arm
            (spherelm list fields).
        no_compile: Do not use torch.compile (the demo preset does not anyway).
        workers: Runs at once; one per core if left out, a single one on an accelerator.
        resume: Continue the comparison in --out; a larger --seeds adds runs.
    """
    from spherelm.data.text_files import prepared
    from spherelm.experiments.comparison import CompareConfig
    from spherelm.experiments.comparison import compare as run_comparison
    from spherelm.report.comparison_page import conclusion, write_report
    from spherelm.report.drawing import require_matplotlib

    require_matplotlib()  # the page comes last: do not train for it in vain
    given = {"fields": set_ or None, "compile": False if no_compile else None, **config}
    asked = CompareConfig(**given | {"data": prepared(config.get("data"), out)})
    run_comparison(asked, out, resume, workers)
    write_report(out)
    print(conclusion(out))
    print(f"The page: {(out / 'report.html').resolve()}")


def train(
    *,
    out: Path | None = None,
    arm: Arm | None = None,
    data: str | None = None,
    preset: str | None = None,
    recipe: str | None = None,
    config: Path | None = None,
    set_: Settings = (),
    resume: Annotated[str | None, BARE] = None,
    init_from: Path | None = None,
    no_compile: bool = False,
    precision: Literal["float32", "bfloat16", "fp8", "mxfp8", "nvfp4"] | None = None,
    given: TrainFlags,
    dry_run: DryRunFlags,
) -> None:
    """Train one model.

    Example: spherelm train --arm ngpt --out runs/mine --data book.txt --steps 500

    Args:
        out: Run directory: config.json, metrics.jsonl, checkpoints.
        arm: gpt, the baseline, or ngpt, the normalized Transformer; the preset sets the architecture.
        data: Directory of spherelm data prepare; DIR=WEIGHT,DIR=WEIGHT; stream:NAME; PATH,tokenizer=NAME for token
            files of nanoGPT, llm.c or Megatron. Or text, which is prepared into OUT-data: the files, patterns and
            directories that data prepare reads. The shipped text if left out.
        preset: Size and length of the run (spherelm list presets); demo if left out.
        recipe: How the arm is trained (spherelm list recipes); law if left out.
        config: A run's config.json, to repeat that run with the given flags changed. Or a JSON or YAML file with some
            of its fields, named as for --set or nested as in config.json; preset, recipe and flags set the rest.
        set_: Fields that differ from the recipe (spherelm list fields): schedule=log rho=0.05 optimizer=muon.
        resume: Resume this run, or the one in --out, from its last checkpoint. Its config.json sets everything else;
            flags that do not change the result may differ, and so may --steps where the schedule allows it.
        init_from: Start from the weights of this run, checkpoint or exported folder; the model takes its shape.
        no_compile: Do not use torch.compile.
        precision: Number format of the products with the blocks' matrices (docs/precision.md): fp8, mxfp8 and nvfp4 are
            emulated; float32 and bfloat16 are those of --dtype.
    """
    from spherelm.recipes.overrides import WHOLE
    from spherelm.recipes.written import parse_fields
    from spherelm.runs.config import read_record
    from spherelm.train.trainer import train as run_training

    chosen = {"arm": arm, "preset": preset, "recipe": recipe, "config": config, "init_from": init_from}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    out, config = resumed(resume, out, chosen)
    own = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in given.items()}
    own |= ({"compile": False} if no_compile else {}) | ({"precision": precision} if precision else {})
    asked = own | parse_fields(set_, own)
    record = {} if config is None else read_record(config)
    if config is not None and record.keys() >= WHOLE:
        run = run_of_whole(config, record, out, data, chosen, asked)
    else:
        run = run_of_parts(config, record, out, data, chosen, asked, "dry_run" in dry_run)
    if "dry_run" in dry_run:
        describe(run, dry_run, out, resume is not None)
        return
    loss = run_training(run, out, resume is not None)
    print(f"final validation loss {loss:.4f} nats per token; the run is in {out}")


def resumed(resume: str | None, out: Path | None, chosen: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """The run directory, and the file that its configuration is read from: with --resume its own, unless --arm or
    --config describe how the run was started.
    """
    if resume and out not in (None, Path(resume)):
        raise UserError(
            f"--resume {resume} continues {resume}: leave out --out {out}, or start a new run with --init-from {resume}"
        )
    from spherelm.runs.loading import no_run

    directory = Path(resume) if resume else out
    if directory is None:
        raise UserError("no directory is given: --out DIR for a new run, --resume RUN to continue one")
    if resume is None or (not resume and chosen.keys() & {"arm", "config"}):
        return directory, chosen.get("config")
    if chosen:
        name = next(iter(chosen))
        raise UserError(
            f"--{name.replace('_', '-')} has no effect with --resume: {directory}/config.json sets it; leave it out"
        )
    if not (directory / "config.json").is_file():
        raise no_run(directory)
    return directory, directory / "config.json"


def run_of_whole(
    config: Path,
    record: Mapping[str, Any],
    out: Path,
    data: str | None,
    chosen: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> RunConfig:
    """The run in the file `config`, whose content is `record`, but for what is given by flags."""
    from spherelm.data.sources import parse_data
    from spherelm.data.text_files import prepared
    from spherelm.progress import say
    from spherelm.recipes import changed
    from spherelm.recipes.explained import kept
    from spherelm.runs.config import read_config
    from spherelm.runs.record import refuse_unknown_entries

    refused = [name for name in ("arm", "preset", "recipe") if name in chosen]
    if refused:
        raise UserError(f"--{refused[0]} has no effect with --config {config}, which holds a whole run: leave it out")
    refuse_unknown_entries(config, record)
    before = read_config(config)
    if "config" in chosen:
        refuse_long_warmup(config, before, asked)
    run = changed(before, asked)
    if run.recipe == "law" and "config" in chosen and (names := kept(before, run)):
        say(
            f"warning: {', '.join(names)} stay as in {config}; for this shape and length the law has others "
            "(--dry-run shows them): without --config they are chosen anew"
        )
    if "init_from" in chosen:
        run = replace(run, init_from=str(chosen["init_from"]))
    if data is None:
        return run
    path = prepared(data, out)
    return replace(run, data=path, model=replace(run.model, vocab_size=parse_data(path).vocab_size))


def refuse_long_warmup(config: Path, before: RunConfig, asked: Mapping[str, Any]) -> None:
    """Raise `UserError` where the run `before`, of the file `config`, is made so short that it is only warm-up."""
    steps, warmup = asked.get("steps"), before.schedule.warmup_steps
    if isinstance(steps, int) and 0 < steps <= warmup < before.train.steps and "warmup_steps" not in asked:
        fitting = round(warmup * steps / before.train.steps)
        raise UserError(
            f"{config} has {warmup} updates of warm-up, and the run only {steps} in all: give --set warmup_steps={fitting} "
            "too, which is the same part of it"
        )


def run_of_parts(
    config: Path | None,
    record: Mapping[str, Any],
    out: Path,
    data: str | None,
    chosen: Mapping[str, Any],
    asked: Mapping[str, Any],
    dry: bool,
) -> RunConfig:
    """The run of the fields in `record`, of the file `config`, overridden by the flags."""
    from spherelm.data.text_files import prepared
    from spherelm.recipes import PRESET, RECIPE, make_run, run_from
    from spherelm.recipes.overrides import fields_in

    given = fields_in(record) | {name: value for name, value in chosen.items() if name != "config"} | dict(asked)
    names = {"arm": None, "preset": PRESET, "recipe": RECIPE, "data": None, "init_from": None}
    arm, preset, recipe, source, init = (given.pop(name, default) for name, default in names.items())
    if arm is None and init is None:
        lacking = "no arm is given" if config is None else f"{config} names no arm"
        raise UserError(f"{lacking}: give --arm gpt or --arm ngpt, the --config of a run, or --resume RUN")
    for name, value in (("arm", arm), ("preset", preset), ("recipe", recipe), ("data", source), ("init_from", init)):
        if not isinstance(value, str | Path | None):
            raise UserError(f"{name} must be text, got {value!r}")
    if init is not None:
        text = prepared(data or source, out, tokenizer=Path(init))
        return run_from(Path(init), arm, preset, recipe, data=text, **given)
    text = prepared(data or source, out)
    return make_run(arm, preset, recipe, **{"vocab_size": vocabulary(text, preset, dry), "data": text, **given})


def vocabulary(data: str | None, preset: str, dry_run: bool) -> int:
    """How many token ids the data has; a size that names its own vocabulary needs no data to be described."""
    from spherelm.data.sources import parse_data
    from spherelm.recipes.presets import PRESETS

    known = PRESETS[preset].vocab_size if preset in PRESETS and dry_run and data is None else None
    return known or parse_data(data).vocab_size


def describe(config: RunConfig, asked: Given, out: Path, resume: bool) -> None:
    """Print the estimate of the run of `config` in `out`, for the devices in `asked`, the flags of a dry run. Raises
    `UserError` for what training would refuse, but for a device that another machine may have.
    """
    from spherelm.recipes.explained import explained
    from spherelm.train.batches import epochs
    from spherelm.train.checks import check_start
    from spherelm.train.estimate import Assumed, estimate, estimate_table
    from spherelm.train.precision import check_device

    assumed = Assumed(**{name: value for name, value in asked.items() if name not in ("dry_run", "json")})
    check_device(config.train.device, anywhere=True)
    check_start(config, out, resume, assumed.world_size)
    found = estimate(config, assumed, epochs(config, config.train.steps))
    lines = [estimate_table(found), *explained(config, found["parameters_by_role"])]
    print(json.dumps(found, indent=2) if "json" in asked else "\n".join(lines))


def sweep(
    *,
    out: Path,
    arms: tuple[Arm, ...] = ("gpt", "ngpt"),
    lr: tuple[float, ...] = (),
    vary: Settings = (),
    set_: Settings = (),
    preset: str | None = None,
    recipe: tuple[str, ...] = (),
    steps: int | None = None,
    data: str | None = None,
    seeds: int = 1,
    workers: int | None = None,
    quiet: bool = False,
    machine: OnMachine,
) -> None:
    """Train every combination of arms, recipes, learning rates and fields; the same command again resumes.

    Example: spherelm sweep --out runs/alpha --arms ngpt --vary alpha.init=0.05,0.25 --seeds 3

    Args:
        out: Directory for the runs, sweep.json and the page index.html.
        arms: Arms to train.
        lr: Peak learning rates; the recipe's if left out.
        vary: Fields with several values each; all combinations are tried (spherelm list fields).
        set_: Fields that are the same in all runs.
        preset: Size and length of the runs (spherelm list presets); demo if left out.
        recipe: How the arms are trained (spherelm list recipes); law if left out. ablations means the paper's recipe
            and all of its ablations.
        steps: Updates; the preset's if left out.
        data: As for spherelm train. The shipped text if left out.
        seeds: Runs per combination.
        workers: Runs at once; one per core if left out.
        quiet: Show no progress.
    """
    from spherelm.data.sources import parse_data
    from spherelm.data.text_files import prepared
    from spherelm.experiments.sweep import grid, sweep_table
    from spherelm.experiments.sweep import sweep as run_sweep
    from spherelm.recipes import PRESET, RECIPE, distinct, recipe_names
    from spherelm.recipes.written import parse_axes, parse_fields
    from spherelm.report.drawing import require_matplotlib
    from spherelm.report.sweep_page import write_page

    require_matplotlib()  # the page comes last: do not train for it in vain
    flags = {"lr": lr or None, "steps": steps}
    varied = parse_axes(vary, flags, ("seed", "data", "vocab_size"))
    same = parse_fields(set_, flags)
    for name in varied.keys() & same.keys():
        raise UserError(f"{name} is given by --vary and by --set: give it once")
    axes = {"arm": arms, "preset": (preset or PRESET,), "recipe": recipe_names(recipe or (RECIPE,)), **varied}
    axes |= {"lr": lr} if lr else {}
    axes |= {} if steps is None else {"steps": (steps,)}
    axes |= {name: (value,) for name, value in same.items()}
    text = prepared(data, out)
    size = parse_data(text).vocab_size
    choices = distinct(grid(axes))
    rows = run_sweep(choices, seeds, out, vocab_size=size, data=text, workers=workers, machine=machine, quiet=quiet)
    write_page(rows, out)
    print(sweep_table(rows))


def evidence(
    *,
    out: Path,
    data: Path,
    test: Path,
    grid: Gridded,
    workers: int | None = None,
    minutes: float | None = None,
) -> None:
    """Measure how many tokens and seconds nGPT saves over sizes, contexts and budgets, with rates tuned at each.

    Example: spherelm evidence --out runs/ladder --data data/books --test data/test --sizes 0.3m,1m --minutes 60

    Args:
        out: Directory for the runs and evidence.json; the same command again resumes.
        data: Data directory of spherelm data prepare; its validation text is used to choose learning rates.
        test: Data directory with the same tokenizer, whose validation text is used only at the end, as held-out text.
        workers: Runs at once; one per core if left out.
        minutes: After so many minutes, save unfinished runs, print the tables so far and exit with 0; no
            limit if left out.
    """
    from spherelm.experiments.evidence import climb
    from spherelm.experiments.evidence_plan import Grid
    from spherelm.experiments.evidence_record import evidence_table

    print(evidence_table(climb(Grid(str(data), str(test), **grid), out, workers, minutes)))
