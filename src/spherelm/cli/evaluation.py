"""Commands that measure trained models: `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from spherelm.cli.flags import Translation, TranslationFlags
from spherelm.cli.given import Needs, Sets
from spherelm.counting import counted
from spherelm.errors import UserError

OfTasks = Needs("--tasks", without=["--perplexity", "--translate"])
OfPerplexity = Needs("--perplexity")
TASKS, PLAN = "spherelm.evaluate.harness.TaskSettings", "spherelm.evaluate.lengths.Plan"
POSITIONS = "spherelm.evaluate.positions.Positions"


def eval_(
    run: Positional[Path],
    tasks: str | None = None,
    task_data: Annotated[Path | None, OfTasks, Sets(TASKS, "data")] = None,
    limit: Annotated[int | None, OfTasks, Sets(TASKS)] = None,
    few_shot: Annotated[int, OfTasks, Sets(TASKS)] = 0,
    batch_size: Annotated[int, OfTasks, Sets(TASKS)] = 16,
    perplexity: tuple[Path, ...] = (),
    field: Annotated[str | None, OfPerplexity] = None,
    lengths: Annotated[str | None, OfPerplexity] = None,
    stride: Annotated[int | None, OfPerplexity, Sets(PLAN)] = None,
    document_tokens: Annotated[int | None, OfPerplexity, Sets(PLAN)] = None,
    bins: Annotated[int, OfPerplexity, Sets(PLAN)] = 16,
    rope_base: Annotated[float | None, OfPerplexity, Sets(POSITIONS)] = None,
    rope_scaling: Annotated[str | None, OfPerplexity] = None,
    texts: TranslationFlags = Translation(),
    reference: Annotated[tuple[Path, ...], Needs("--translate")] = (),
    json: Path | None = None,
) -> None:
    """Score a run on tasks of the evaluation harness, its perplexity on texts at several lengths, or what it translates.

    Args:
        run: A run directory, or one of its checkpoints.
        tasks: Tasks of the harness by commas; the paper's five if left out, or none beside --perplexity and --translate.
        perplexity: Text files, of the kinds that `data prepare` reads, to measure perplexity on instead.
        field: Where the text of a row is in those files; "text" if left out, body.text for "text" within "body".
        lengths: Tokens of a window, by commas, also beyond the length trained on; that length if left out.
        rope_scaling: Stretch positions by a factor: linear:4 or yarn:4.
        reference: Files of what should be written, a line for each line of --translate.
        json: File to write everything to, as JSON.
    """
    from spherelm.data.output import check_new_file
    from spherelm.runs.record import write_json
    from spherelm.train.evaluation import about

    if json is not None:
        check_new_file(json, "--json")
    results = translated(run, texts, reference)
    if perplexity:
        results["perplexity"] = measured(
            run, perplexity, field, lengths, stride, document_tokens, bins, rope_base, rope_scaling
        )
    if tasks is not None or not (perplexity or results):
        results |= scored(run, tasks, task_data, limit, few_shot, batch_size)
    if json is not None:
        write_json(json, about(run) | results)
    print("\n\n".join(tables(results)))


def translated(run: Path, texts: Translation, reference: tuple[Path, ...]) -> dict[str, Any]:
    """The scores of translations, under that name; nothing where none are asked for."""
    if texts.translate is None:
        return {}
    from spherelm.generation.beam import BeamSettings
    from spherelm.train.evaluation import translation_of_run

    settings = BeamSettings(texts.beams, texts.length_penalty)
    return {"translation": translation_of_run(run, texts.translate, reference, settings, texts.write)}


def measured(
    run: Path,
    files: tuple[Path, ...],
    field: str | None,
    lengths: str | None,
    stride: int | None,
    document_tokens: int | None,
    bins: int,
    rope_base: float | None,
    rope_scaling: str | None,
) -> dict[str, Any]:
    """The perplexity at each length."""
    from spherelm.evaluate.lengths import Plan
    from spherelm.evaluate.positions import parse_positions
    from spherelm.train.evaluation import perplexity_of_run, trained_length

    positions = parse_positions(rope_base, rope_scaling)
    chosen = numbers(lengths) if lengths else (trained_length(run),)
    plan = Plan(chosen, stride, document_tokens, bins)
    return perplexity_of_run(run, files, plan, positions, field or "text")


def scored(
    run: Path, tasks: str | None, data: Path | None, limit: int | None, few_shot: int, batch_size: int
) -> dict[str, Any]:
    """The scores on tasks."""
    from spherelm.evaluate.harness import PAPER_TASKS, TaskSettings
    from spherelm.train.evaluation import split_names, tasks_of_run

    names = split_names(tasks) if tasks is not None else list(PAPER_TASKS)
    return tasks_of_run(run, names, TaskSettings(data, limit, few_shot, batch_size))


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers by commas, ascending, as `--lengths` has them."""
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise UserError(f"--lengths {text} must be whole numbers by commas, such as 256,512,1024") from None


def tables(results: dict[str, Any]) -> list[str]:
    """What was found, to be read."""
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
    """A number in a column, a dash for none; without digits behind the point where it is large."""
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
