"""Commands that measure trained models: `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from spherelm.cli.flags import Given, OnMachine, Run, computing
from spherelm.cli.parser import Fields, Needs
from spherelm.counting import counted

OF_TASKS = dict.fromkeys(
    ("data", "limit", "few_shot", "batch_size"), Needs("--tasks", without=["--perplexity", "--translate"])
)
WITH_PERPLEXITY, WITH_TRANSLATE = Needs("--perplexity"), Needs("--translate")
OF_PLAN = dict.fromkeys(("stride", "document_tokens", "bins"), WITH_PERPLEXITY)
TaskFlags = Annotated[Given, Fields("spherelm.evaluate.harness.TaskSettings", *OF_TASKS, title="tasks", needs=OF_TASKS,
                                    called={"data": "task_data"})]  # fmt: skip
PlanFlags = Annotated[
    Given, Fields("spherelm.evaluate.lengths.LengthPlan", *OF_PLAN, title="perplexity", needs=OF_PLAN)
]
BEAMS = ("beams", "length_penalty")
BeamFlags = Annotated[Given, Fields("spherelm.generation.beam.BeamSettings", *BEAMS, title="translation",
                                    needs=dict.fromkeys(BEAMS, WITH_TRANSLATE))]  # fmt: skip


def eval_(
    *,
    run: Run,
    tasks: tuple[str, ...] = (),
    settings: TaskFlags,
    perplexity: tuple[Path, ...] = (),
    rows: Annotated[Given, Fields("spherelm.data.rows.RowSettings", "field", needs={"field": WITH_PERPLEXITY})],
    lengths: Annotated[tuple[int, ...], WITH_PERPLEXITY] = (),
    plan: PlanFlags,
    rope_base: Annotated[float | None, WITH_PERPLEXITY] = None,
    rope_scaling: Annotated[str | None, WITH_PERPLEXITY] = None,
    translate: Annotated[Path | None, Needs("--reference")] = None,
    reference: Annotated[tuple[Path, ...], WITH_TRANSLATE] = (),
    write: Annotated[Path | None, WITH_TRANSLATE] = None,
    beams: BeamFlags,
    json: Path | None = None,
    machine: OnMachine,
) -> None:
    """Score a run: accuracy on downstream tasks, perplexity of your texts, or its translations.

    Example: spherelm eval runs/mine --perplexity book.txt --lengths 256,512

    Args:
        run: A run directory, or one of its checkpoints.
        tasks: Tasks of lm-evaluation-harness (spherelm list tasks). If left out, the paper's five, or none where
            --perplexity or --translate is given.
        perplexity: Measure perplexity on these text files, of any kind that data prepare reads.
        lengths: Context lengths in tokens, which may exceed the length trained on; that length if left out.
        rope_base: Use this base of the rotary embedding instead of the one trained with.
        rope_scaling: Stretch positions by a factor: linear:4 or yarn:4.
        translate: Translate each line of this file; scored by BLEU, chrF and error rates.
        reference: Files of reference translations, one for each line of --translate.
        write: Write the translations to this new file.
        json: Write all results to this new file as JSON.
    """
    from spherelm.data.output import check_new_file, write_json
    from spherelm.train.evaluation import origin_of

    if json is not None:
        check_new_file(json, "--json")
    results: dict[str, Any] = {}
    with computing(machine):
        if translate is not None:
            results["translation"] = translated(run, translate, reference, beams, write)
        if perplexity:
            results["perplexity"] = measured(run, perplexity, rows, lengths, plan, rope_base, rope_scaling)
        if tasks or not results:
            results |= scored(run, tasks, settings)
    if json is not None:
        write_json(json, origin_of(run) | results)
    print("\n\n".join(tables(results)))


def translated(
    run: Path, source: Path, reference: tuple[Path, ...], beams: Given, written: Path | None
) -> dict[str, Any]:
    """The scores of translations."""
    from spherelm.generation.beam import BeamSettings
    from spherelm.train.evaluation import translation_of_run

    return translation_of_run(run, source, reference, BeamSettings(**beams), written)


def measured(
    run: Path,
    files: tuple[Path, ...],
    rows: Given,
    lengths: tuple[int, ...],
    plan: Given,
    rope_base: float | None,
    rope_scaling: str | None,
) -> dict[str, Any]:
    """The perplexity at each length."""
    from spherelm.data.rows import RowSettings
    from spherelm.evaluate.lengths import LengthPlan
    from spherelm.evaluate.positions import parse_positions
    from spherelm.train.evaluation import perplexity_of_run, trained_length

    positions = parse_positions(rope_base, rope_scaling)
    chosen = tuple(sorted(set(lengths))) or (trained_length(run),)
    return perplexity_of_run(run, files, LengthPlan(chosen, **plan), positions, RowSettings(skip_bad=None, **rows))


def scored(run: Path, tasks: tuple[str, ...], settings: Given) -> dict[str, Any]:
    """The scores on tasks."""
    from spherelm.evaluate.harness import PAPER_TASKS, TaskSettings
    from spherelm.train.evaluation import tasks_of_run

    return tasks_of_run(run, tasks or PAPER_TASKS, TaskSettings(**settings))


def tables(results: dict[str, Any]) -> list[str]:
    """The results as tables of text."""
    found = [length_table(results["perplexity"])] if "perplexity" in results else []
    found += [translation_table(results["translation"])] if "translation" in results else []
    return found + ([task_table(results)] if "tasks" in results else [])


def task_table(results: dict[str, Any]) -> str:
    """A line for each task and metric, and the paper's average."""
    lines = [f"{'task':<24} {'metric':<12} {'value':>10} {'stderr':>9} {'chance':>7} {'documents':>10}"]
    for name, record in results["tasks"].items():
        for metric, score in record["metrics"].items():
            chance = record["chance"] if metric.startswith("acc") else None
            lines.append(f"{name:<24} {metric:<12} {pair(score)} {number(chance, 7, 3)} {record['documents']:>10,}")
    for metric, score in results.get("average", {}).items():
        lines.append(f"{'average of the five':<24} {metric:<12} {pair(score)}")
    return "\n".join(lines)


def translation_table(found: dict[str, Any]) -> str:
    """A line for each score, under what was scored."""
    search = f"{found['beams']} beams, length penalty {found['length_penalty']:g}"
    lines = [f"{counted(found['texts'], 'text')} of {found['source']}; {search}; intervals of 95 % over texts"]
    for name, label in (("bleu", "BLEU"), ("chrf", "chrF")):
        score = found[name]
        lines.append(f"{label:<16} {score['value']:>7.2f} ± {score['interval']:.2f}  {score['signature']}")
    for name in ("word_error_rate", "text_error_rate"):
        lines.append(f"{name.replace('_', ' '):<16} {100 * found[name]:>7.2f} %")
    return "\n".join(lines)


def pair(score: dict[str, float | None]) -> str:
    """A value and its standard error."""
    return f"{number(score['value'], 10, 4)} {number(score['stderr'], 9, 4)}"


def number(value: float | None, width: int, digits: int) -> str:
    """A number in a column, a dash for none; without decimals where it is large."""
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:>{width},.{digits}f}" if value < 10_000 else f"{value:>{width}.3g}"


def length_table(found: dict[str, Any]) -> str:
    """A line for each length, under what was read."""
    windows = "disjoint windows" if found["stride"] is None else f"windows sliding by {found['stride']}"
    head = (
        f"{counted(found['tokens'], 'token')} of {counted(found['documents'], 'document')} "
        f"({found['documents_left_out']:,} too short), the same "
        f"at each length; {windows}; positions {found['positions']}; standard errors over {found['clusters']}"
    )
    lines = [
        head,
        f"{'length':>8} {'loss':>8} {'stderr':>8} {'change':>9} {'stderr':>8} {'perplexity':>11} {'bits/byte':>10}",
    ]
    for row in found["lengths"]:
        numbers = (number(row["loss"], 8, 4), number(row["loss_se"], 8, 4), number(row["change"], 9, 4))
        rest = (number(row["change_se"], 8, 4), number(row["perplexity"], 11, 2), number(row["bits_per_byte"], 10, 4))
        lines.append(" ".join((f"{row['length']:>8}", *numbers, *rest)))
    return "\n".join(lines)
