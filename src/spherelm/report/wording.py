"""Numbers as text, and the result of a comparison as sentences. Plain text, no markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spherelm.experiments.record import Arm, Comparison, standard_error
from spherelm.experiments.speedup import OPPOSITE
from spherelm.models import ARM_NAMES

OPTIMIZERS = {"adamw": "AdamW", "gated_adamw": "GatedAdamW", "muon": "Muon for block matrices, AdamW for the rest"}


def optimizer_name(optimizer: str | None) -> str:
    """The name in a text of an optimizer of `OptimConfig`."""
    return "unknown" if optimizer is None else OPTIMIZERS.get(optimizer, optimizer)


def si(value: float) -> str:
    """A count with three digits and a unit: 1.64M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def number(value: Any, form: str) -> str:
    """`value` in the given format; a dash where there is none."""
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, form)


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def each(values: Mapping[str, float], form: str = ".3g") -> str:
    """ "3.2 for GPT and 1.1 for nGPT", of values by arm."""
    return listed([f"{format(value, form)} for {ARM_NAMES[arm]}" for arm, value in values.items()])


def mean_and_error(values: Sequence[float]) -> str:
    """ "2.994 ± 0.002" on one line; without the error for a single value."""
    error = standard_error(values)
    mean = number(sum(values) / len(values), ".3f")
    return mean if error is None or math.isnan(error) else f"{mean}\u00a0±\u00a0{error:.3f}"


def verdict(comparison: Comparison) -> str:
    """The result in one sentence: who wins, by what factor in tokens, with its interval."""
    winner, loser = comparison.arms[comparison.winner], comparison.arms[comparison.loser]
    factor, reached = comparison.speedup.get("tokens"), comparison.speedup.get("tokens_to_reach")
    name, other = ARM_NAMES[winner.name], ARM_NAMES[loser.name]
    if any(run.diverged for run in (*winner.runs, *loser.runs)):
        gone = listed([run.name for run in (*winner.runs, *loser.runs) if run.diverged])
        return f"There is no speedup to report, since {gone} diverged: lower that arm’s learning rate."
    inverse = winner.name == comparison.baseline
    times = (1 / factor if inverse else factor) if factor else None
    if _is_tie(winner, loser) or f"{times or 0:.2f}" == "1.00":
        ends = [f"{ARM_NAMES[arm.name]} ends at {mean_and_error(arm.final_losses)}" for arm in (winner, loser)]
        return f"No arm is ahead here, as far as these seeds can tell: {listed(ends)} nats per token."
    level = f"{other}’s final validation loss ({number(loser.final_loss, '.3f')} nats per token)"
    if not times:
        return f"{name} did not reach {level} within {si(winner.tokens)} tokens, so there is no speedup to report."
    spread = _interval(comparison, "tokens_interval", inverse)
    counts = (
        "" if reached is None else f": {_bound(bound_on_tokens(comparison))}{si(reached)} instead of {si(loser.tokens)}"
    )
    sentence = (
        f"{name} reaches {level} with {_bound(_bound_on_factor(comparison))}{times:.2f}× fewer tokens{spread}{counts}."
    )
    return f"{name} wins here. {sentence}" if inverse else sentence


def _is_tie(winner: Arm, loser: Arm) -> bool:
    """Whether the means differ by no more than the standard error of their difference; never with one seed."""
    errors = [standard_error(arm.final_losses) for arm in (winner, loser)]
    return None not in errors and loser.final_loss - winner.final_loss <= math.hypot(*(e or 0.0 for e in errors))


def caveats(comparison: Comparison) -> list[str]:
    """The sentences that belong beside the verdict: time, doubt, method, and how far it reaches."""
    return [text for text in (_time(comparison), _doubt(comparison), _method(comparison), _reach(comparison)) if text]


REACH = (
    "The paper reports that the gain grows with the length of the context and of the run, and runs of small models show the "
    "same (docs/evidence.md). Read it as a measurement of these runs, not as a forecast for others."
)


def _reach(comparison: Comparison) -> str:
    """Size, context and budget that the factor was measured at, and how it changes with them."""
    config, parameters = comparison.summary.get("config", {}), comparison.arms[comparison.baseline].parameters
    tokens, context = comparison.arms[comparison.loser].tokens, config.get("seq_len")
    known = [
        "this size" if parameters is None else f"{si(parameters)} parameters",
        "this context length" if context is None else f"a context of {context:,} tokens",
        "this budget" if math.isnan(tokens) else f"a budget of {si(tokens)} tokens",
    ]
    return f"This factor was measured at {listed(known)}. {REACH}"


def _time(comparison: Comparison) -> str:
    factor, ratio = comparison.speedup.get("seconds"), comparison.summary.get("step_time_ratio")
    baseline, normalized = ARM_NAMES[comparison.baseline], ARM_NAMES[comparison.normalized]
    cost = (
        ""
        if ratio is None
        else f"One {normalized} step takes {ratio:.2f}× as long as a {baseline} step on this machine. "
    )
    if not factor:
        return cost.strip()
    bound, inverse = comparison.speedup.get("bound"), factor < 1
    name, times = (baseline, 1 / factor) if inverse else (normalized, factor)
    spread = _interval(comparison, "seconds_interval", inverse) if comparison.speedup.get("seconds_interval") else ""
    qualifier = _bound(OPPOSITE.get(bound or "") if inverse else bound)
    return f"{cost}Counted in seconds, {name} gets there {qualifier}{times:.2f}× faster{spread}."


def _doubt(comparison: Comparison) -> str:
    interval = comparison.speedup.get("tokens_interval")
    if interval and interval[0] <= 1 <= interval[1]:
        return "The interval contains 1: these seeds do not tell the arms apart."
    return ""


def _method(comparison: Comparison) -> str:
    if comparison.quick:
        return (
            "Quick mode: the crossing is read off the curve inside one schedule. A run whose learning rate has not decayed yet "
            "is not comparable with one that has, so take it as a hint; without --quick, whole schedules are compared."
        )
    return (
        f"{ARM_NAMES[comparison.winner]} was also trained at shorter budgets, each with its whole schedule, and the "
        "crossing is interpolated between the ends of these runs: a run with a decaying learning rate is only "
        "comparable at its end."
    )


def bound_on_tokens(comparison: Comparison) -> str | None:
    """The bound on the tokens that the winner needs: "at most", "at least", or None where they are known."""
    bound = comparison.speedup.get("bound")
    # summary.json bounds the baseline's tokens over the other's: with those below the line, the bound on them is the
    # other one.
    return OPPOSITE.get(bound or "") if comparison.winner == comparison.normalized else bound


def _bound_on_factor(comparison: Comparison) -> str | None:
    """The bound on how many times fewer tokens the winner needs."""
    return OPPOSITE.get(bound_on_tokens(comparison) or "")


def _bound(bound: str | None) -> str:
    return f"{bound} " if bound else ""


def _interval(comparison: Comparison, key: str, inverse: bool) -> str:
    """The interval in parentheses, or why there is none."""
    if comparison.seeds == 1:
        return " (one seed, so no interval)"
    interval = comparison.speedup.get(key)
    if not interval:
        return " (no interval, since not every seed crosses within these budgets)"
    low, high = (1 / interval[1], 1 / interval[0]) if inverse else interval
    return f" (95% interval over {comparison.seeds} seeds: {low:.2f} to {high:.2f})"
