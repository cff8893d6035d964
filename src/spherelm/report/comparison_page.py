"""The page that a comparison ends with: `write_report(DIR)` turns run directories
and `summary.json` into `DIR/report.html`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup

from spherelm.analysis.weights import measure
from spherelm.counting import counted
from spherelm.experiments.record import Arm, Comparison, read_comparison, read_samples
from spherelm.models import ARM_NAMES
from spherelm.progress import say
from spherelm.report.drawing import Figure
from spherelm.report.loss_figures import loss_figures
from spherelm.report.pages import render
from spherelm.report.walk import trace_walks, walk_page
from spherelm.report.weight_figures import weight_figures
from spherelm.report.wording import caveats, mean_and_error, number, optimizer_name, si, verdict
from spherelm.runs.config import read_record
from spherelm.runs.loading import load_model

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Caption, header and rows."""


def write_report(directory: Path) -> Path:
    """Write `directory/report.html` from the runs, `summary.json` and `samples.json` in it; returns its path.

    The same bytes for the same runs. Beside it walk.html, linked from it. Missing checkpoints, samples or seeds are
    stated in words, as is why there is no walk, on stderr too. Raises `NotFoundError` for a missing summary or run,
    `UserError` for a damaged one or a missing matplotlib.
    """
    comparison = read_comparison(directory)
    weights, missing = _weights(comparison)
    html = render(
        "comparison.html",
        kicker="spherelm compare",
        title=" and ".join(ARM_NAMES[arm] for arm in comparison.arms) + " side by side",
        subtitle=_subtitle(comparison),
        verdict=verdict(comparison),
        caveats=caveats(comparison),
        key_numbers=_key_numbers(comparison),
        notes=comparison.disagreements,
        tables=[_arm_table(comparison), *_end_table(comparison)],
        losses=loss_figures(comparison),
        weights=weights,
        weights_missing=missing,
        walk_missing=_write_walk(comparison),
        **_samples(comparison),
        **_reproduce(comparison),
    )
    target, partial = directory / "report.html", directory / "report.html.partial"
    partial.write_text(html, "utf-8")
    os.replace(partial, target)
    return target


def conclusion(directory: Path) -> str:
    """The sentence that the page of the comparison in `directory` begins with."""
    return verdict(read_comparison(directory))


def _weights(comparison: Comparison) -> tuple[list[Figure], str]:
    """The weight figures, or none and the reason."""
    try:
        weights = {
            name: [measure(load_model(comparison.directory / run.name)) for run in arm.runs]
            for name, arm in comparison.arms.items()
        }
    except (FileNotFoundError, ValueError) as error:
        return [], f"The weights cannot be shown: {error}."
    return weight_figures(weights), ""


def _write_walk(comparison: Comparison) -> str:
    """Write walk.html, the hidden states of each arm's first seed, beside the page;
    or say, and return, why there is none.
    """
    first = [comparison.directory / arm.runs[0].name for arm in comparison.arms.values()]
    try:
        walks, sentence = trace_walks(first)
    except (FileNotFoundError, ValueError) as error:
        missing = f"The walk on the sphere cannot be shown: {error}."
        say(missing)
        return missing
    (comparison.directory / "walk.html").write_text(walk_page(walks, sentence, "report.html"), encoding="utf-8")
    return ""


def _subtitle(comparison: Comparison) -> str:
    config = comparison.summary.get("config", {})
    parts = [f"preset {config['preset']}"] if config.get("preset") else []
    if config.get("steps") and config.get("batch_size") and config.get("seq_len"):
        parts.append(f"{counted(config['steps'], 'step')} of {config['batch_size']} × {config['seq_len']} tokens")
    parts.append(f"{si(comparison.arms[comparison.winner].tokens)} tokens per run")
    parts.append("one seed per arm" if comparison.seeds == 1 else f"{comparison.seeds} seeds per arm")
    return " · ".join([*parts, *(["quick mode"] if comparison.quick else [])])


def _key_numbers(comparison: Comparison) -> list[tuple[str, str]]:
    speedup, (baseline, normalized) = comparison.speedup, comparison.arms.values()
    one, other = ARM_NAMES[baseline.name], ARM_NAMES[normalized.name]
    sign = {"at least": "≥ ", "at most": "≤ "}.get(str(speedup.get("bound")), "")

    def times(value: float | None, sign: str) -> str:
        return "–" if value is None else f"{sign}{value:.2f}×"

    return [
        (times(speedup.get("tokens"), sign), f"{other}’s speedup in tokens"),
        (times(speedup.get("seconds"), sign), f"{other}’s speedup in seconds"),
        (times(comparison.summary.get("step_time_ratio"), ""), f"time of one step, {other} over {one}"),
        (
            number(normalized.final_loss - baseline.final_loss, "+.3f").replace("-", "−"),
            f"final loss, {other} less {one}, nats per token",
        ),
    ]


def _arm_table(comparison: Comparison) -> Table:
    several = comparison.seeds > 1
    rows: list[tuple[str, str, Callable[[Arm], str]]] = [
        ("Final validation loss", "nats per token", lambda arm: mean_and_error(arm.final_losses)),
        ("", "per seed", lambda arm: ", ".join(number(loss, ".3f") for loss in arm.final_losses)),
        ("Bits per byte", "", lambda arm: number(arm.bits_per_byte, ".3f")),
        ("Training speed", "tokens/s", lambda arm: number(arm.tokens_per_second, ",.0f")),
        ("Full run", "seconds", lambda arm: number(arm.seconds, ",.0f")),
        ("Peak learning rate", "", lambda arm: number(arm.lr, "g")),
        ("Recipe", "", lambda arm: arm.recipe),
        ("Optimizer", "", lambda arm: optimizer_name(arm.optimizer)),
        ("Parameters", "", lambda arm: number(arm.parameters, ",d")),
    ]
    spread = (
        f"Losses are means over {comparison.seeds} seeds ± standard error."
        if several
        else "One seed: no spread can be given."
    )
    caption = Markup(f"<b>Table 1.</b> Both arms at the end of their full schedules. {spread}")
    unit = Markup('{} <span class="unit">{}</span>')
    body = [
        [unit.format(label, what), *map(value, comparison.arms.values())]
        for label, what, value in rows
        if label or several
    ]
    return caption, ["", *(ARM_NAMES[arm] for arm in comparison.arms)], body


def _end_table(comparison: Comparison) -> list[Table]:
    """The ends of the winner's full schedules, shortest first; nothing where only one length was trained."""
    winner, loser = comparison.arms[comparison.winner], comparison.arms[comparison.loser]
    if not comparison.ends or not winner.whole_runs:
        return []
    rows = [(end.steps, end.tokens, end.seconds, list(end.losses)) for end in comparison.ends]
    rows.append((int(winner.whole_runs[0].steps[-1]), winner.tokens, winner.seconds, winner.final_losses))
    body = [
        (f"{steps:,}", si(tokens), f"{seconds:,.0f}", mean_and_error(losses)) for steps, tokens, seconds, losses in rows
    ]
    caption = Markup(
        f"<b>Table 2.</b> {ARM_NAMES[winner.name]} at the ends of whole schedules of growing length. "
        f"The speedup is where these reach {ARM_NAMES[loser.name]}’s final loss, {number(loser.final_loss, '.3f')}."
    )
    return [(caption, ["Steps", "Tokens", "Seconds", "Final validation loss"], body)]


def _samples(comparison: Comparison) -> dict[str, Any]:
    found = read_samples(comparison.directory) or {}
    prompt = str(found.get("prompt", ""))
    columns = [
        (arm, ARM_NAMES[arm], [str(text).removeprefix(prompt) for text in found.get(arm) or []])
        for arm in comparison.arms
    ]
    return {"prompt": prompt, "samples": columns if any(texts for _, _, texts in columns) else []}


def _reproduce(comparison: Comparison) -> dict[str, Any]:
    summary = comparison.summary
    versions = ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())
    commit, seconds = str(summary.get("git_commit") or ""), summary.get("wall_seconds")
    facts = [
        f"Versions: {versions}." if versions else "Versions were not recorded.",
        f"Git commit {commit[:12]}." if commit else "Not run from a git checkout.",
        "" if seconds is None else f"All runs took {timedelta(seconds=round(float(seconds)))} (h:mm:ss).",
        "Losses and times of runs are recomputed from the run directories beside this page; step times and tokens per "
        "second were measured apart from the runs, one arm after the other.",
    ]
    configs = {"Configuration of the comparison": summary.get("config", {})}
    for arm in comparison.arms.values():
        path = comparison.directory / arm.runs[0].name / "config.json"
        if path.is_file():
            configs[f"Configuration of {arm.runs[0].name}/config.json"] = read_record(path)
    return {
        "command": str(summary.get("command") or "spherelm compare"),
        "facts": " ".join(fact for fact in facts if fact),
        "configs": {name: json.dumps(value, indent=2, ensure_ascii=False) for name, value in configs.items()},
    }
