"""The report's HTML: one self-contained page from a comparison, its figures and its samples. Everything is escaped here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from spherelm.counting import counted
from spherelm.experiments.record import Comparison, standard_error
from spherelm.models import NAMES
from spherelm.report import svg
from spherelm.report.figures import Figure
from spherelm.report.wording import caveats, number, optimizer_name, si, verdict


def page(
    comparison: Comparison,
    loss_figures: Sequence[Figure],
    weight_figures: Sequence[Figure],
    weights_missing: str,
    samples: Mapping[str, Any] | None,
    run_configs: Mapping[str, Any],
    walk_missing: str,
) -> str:
    """The whole page. `run_configs` are shown by name.

    weights_missing, walk_missing: why there are no weight figures, and no walk.html beside the page; nothing where they are.
    """
    resources = files("spherelm.report")
    template = Template(resources.joinpath("report.html").read_text("utf-8"))
    weights = figure_list(weight_figures, 1 + len(loss_figures)) if weight_figures else _missing(weights_missing)
    return template.substitute(
        title=" and ".join(NAMES[arm] for arm in comparison.arms) + " side by side",
        subtitle=_subtitle(comparison),
        palette=svg.palette(":root", ':root[data-theme="dark"]', ':root:not([data-theme="light"])'),
        css=resources.joinpath("report.css").read_text("utf-8").strip(),
        verdict=escape(verdict(comparison)),
        caveats="\n".join(f"<p>{escape(text)}</p>" for text in caveats(comparison)),
        key_numbers=_key_numbers(comparison),
        notes="\n".join(f'<p class="note">{escape(text)}.</p>' for text in comparison.disagreements),
        arm_table=_arm_table(comparison),
        end_table=_end_table(comparison),
        loss_figures=figure_list(loss_figures, 1),
        weight_figures=weights + _inside(walk_missing),
        samples=_samples(samples, list(comparison.arms)),
        reproduce=_reproduce(comparison, run_configs),
    )


def _subtitle(comparison: Comparison) -> str:
    config = comparison.summary.get("config", {})
    parts = [f"preset {config['preset']}"] if config.get("preset") else []
    if config.get("steps") and config.get("batch_size") and config.get("seq_len"):
        parts.append(f"{counted(config['steps'], 'step')} of {config['batch_size']} × {config['seq_len']} tokens")
    parts.append(f"{si(comparison.arms[comparison.winner].tokens)} tokens a run")
    parts.append("one seed an arm" if comparison.seeds == 1 else f"{comparison.seeds} seeds an arm")
    parts.append("quick mode" if comparison.quick else "")
    return escape(" · ".join(part for part in parts if part))


def _key_numbers(comparison: Comparison) -> str:
    speedup, (baseline, normalized) = comparison.speedup, comparison.arms.values()
    one, other = NAMES[baseline.name], NAMES[normalized.name]
    sign = {"at least": "≥ ", "at most": "≤ "}.get(str(speedup.get("bound")), "")
    items = [
        (f"{sign}{number(speedup.get('tokens'), '.2f')}×", f"{other}’s speedup in tokens"),
        (f"{sign}{number(speedup.get('seconds'), '.2f')}×", f"{other}’s speedup in seconds"),
        (f"{number(comparison.summary.get('step_time_ratio'), '.2f')}×", f"time of one step, {other} over {one}"),
        (
            number(normalized.final_loss - baseline.final_loss, "+.3f").replace("-", "−"),
            f"final loss, {other} less {one}, nats per token",
        ),
    ]
    cells = (f"<div><dt>{escape(text)}</dt><dd>{escape(value.replace('–×', '–'))}</dd></div>" for value, text in items)
    return f'<dl class="numbers">{"".join(cells)}</dl>'


def _arm_table(comparison: Comparison) -> str:
    several = comparison.seeds > 1
    rows = [
        ("Final validation loss", "nats per token", lambda arm: _mean_and_error(arm.final_losses)),
        ("", "per seed", lambda arm: ", ".join(number(loss, ".3f") for loss in arm.final_losses)),
        ("Bits per byte", "", lambda arm: number(arm.bits_per_byte, ".3f")),
        ("Training speed", "tokens/s", lambda arm: number(arm.tokens_per_second, ",.0f")),
        ("Full run", "seconds", lambda arm: number(arm.seconds, ",.0f")),
        ("Peak learning rate", "", lambda arm: number(arm.lr, "g")),
        ("Recipe", "", lambda arm: arm.recipe),
        ("Optimizer", "", lambda arm: optimizer_name(arm.optimizer)),
        ("Parameters", "", lambda arm: number(arm.parameters, ",d")),
    ]
    body = "".join(
        f"<tr><td>{label} <span class='unit'>{unit}</span></td>"
        + "".join(f"<td>{escape(value(arm))}</td>" for arm in comparison.arms.values())
        + "</tr>"
        for label, unit, value in rows
        if label or several
    )
    spread = (
        f"Losses are means over {comparison.seeds} seeds ± standard error."
        if several
        else "One seed: no spread can be given."
    )
    return _table(
        f"<b>Table 1.</b> Both arms at the end of their full schedules. {spread}", ["", *comparison.arms], body
    )


def _mean_and_error(values: Sequence[float]) -> str:
    """ "2.994 ± 0.002" on one line; without the error for a single value."""
    error = standard_error(values)
    return number(sum(values) / len(values), ".3f") + (
        "" if error is None or math.isnan(error) else f"\u00a0±\u00a0{error:.3f}"
    )


def _end_table(comparison: Comparison) -> str:
    """The ends of the winner's full schedules, shortest first; nothing where only one length was trained."""
    winner, loser = comparison.arms[comparison.winner], comparison.arms[comparison.loser]
    if not comparison.ends or not winner.whole_runs:
        return ""
    rows = [(end.steps, end.tokens, end.seconds, list(end.losses)) for end in comparison.ends]
    rows.append((int(winner.whole_runs[0].steps[-1]), winner.tokens, winner.seconds, winner.final_losses))
    body = ""
    for steps, tokens, seconds, losses in rows:
        cells = (f"{steps:,}", si(tokens), f"{seconds:,.0f}", _mean_and_error(losses))
        body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    caption = (
        f"<b>Table 2.</b> {NAMES[winner.name]} at the ends of whole schedules of growing length. "
        f"{NAMES[loser.name]}&rsquo;s final loss, {number(loser.final_loss, '.3f')}, is looked for between these."
    )
    return _table(caption, ["Steps", "Tokens", "Seconds", "Final validation loss"], body)


def _table(caption: str, header: Sequence[str], body: str) -> str:
    cells = "".join(
        f'<th scope="col"{f" class={name!r}" if name in NAMES else ""}>{NAMES.get(name, name)}</th>' for name in header
    )
    return f"<table><caption>{caption}</caption><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def figure_list(figures: Sequence[Figure], first: int) -> str:
    """Figures with their captions, numbered from `first`."""
    items = (
        f"<figure>{figure.svg}<figcaption><b>Figure {i}. {escape(figure.title)}.</b> {figure.caption}</figcaption></figure>"
        for i, figure in enumerate(figures, first)
    )
    return f'<div class="figures">{"".join(items)}</div>'


def _samples(samples: Mapping[str, Any] | None, arms: Sequence[str]) -> str:
    if not samples or not any(samples.get(arm) for arm in arms):
        return _missing("No text samples were written for this comparison.")
    prompt = str(samples.get("prompt", ""))
    columns = ""
    for arm in arms:
        texts = samples.get(arm) or []
        quotes = "".join(_quote(prompt, str(text)) for text in texts) or _missing("No sample.")
        columns += f'<section><h3 class="{arm}">{NAMES[arm]}</h3>{quotes}</section>'
    intro = "<p>Drawn from the first seed of each arm at the end of training, from the same prompt (grey). Not selected.</p>"
    return f'{intro}<div class="samples">{columns}</div>'


def _quote(prompt: str, text: str) -> str:
    return f'<blockquote><span class="prompt">{escape(prompt)}</span>{escape(text.removeprefix(prompt))}</blockquote>'


def _reproduce(comparison: Comparison, run_configs: Mapping[str, Any]) -> str:
    summary = comparison.summary
    command = escape(str(summary.get("command") or "spherelm compare"))
    parts = [
        f'<div class="command"><pre><code>{command}</code></pre><button class="copy" type="button" hidden>Copy</button></div>'
    ]
    versions = ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())
    facts = [f"Versions: {versions}." if versions else "Versions were not recorded."]
    facts.append(
        f"Git commit {str(summary['git_commit'])[:12]}."
        if summary.get("git_commit")
        else "Not run from a git checkout."
    )
    if summary.get("wall_seconds") is not None:
        facts.append(f"All runs took {_duration(float(summary['wall_seconds']))}.")
    facts.append(
        "Losses and times of runs are computed anew from the run directories beside this page; step times and tokens per "
        "second were measured apart from the runs, one arm after the other."
    )
    parts.append(f"<p>{escape(' '.join(facts))}</p>")
    configs = {"Configuration of the comparison": summary.get("config", {}), **run_configs}
    parts += [
        f"<details><summary>{escape(name)}</summary><pre>{escape(_json(value))}</pre></details>"
        for name, value in configs.items()
    ]
    return "\n".join(parts)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _inside(walk_missing: str) -> str:
    """Where to look further: the walk, or why there is none, and the command that draws the rest."""
    link = '<a href="walk.html">The walk on the sphere</a> follows one sentence through both models.'
    rest = "Everything else is drawn by <code>spherelm inspect . --out inside</code>, given where this page lies."
    return f"<p>{escape(walk_missing) or link} {rest}</p>"


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'
