"""The parts of the documents that state results, each a function of files in docs/results/ that returns Markdown.

`research/pages.py` writes them into the pages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.experiments.robustness import tolerated

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
NAMES = {"gpt": "GPT", "ngpt": "nGPT"}
BASELINES = ("gpt", "hybrid", "encdec", "encoder")
TEXTS = {"books": "books", "wiki": "encyclopedia"}


def read(name: str) -> Any:
    """A results file by its name without the ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def grid(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_and_error(losses: Sequence[float], digits: int = 3) -> str:
    """The mean over seeds and its standard error."""
    return f"{np.mean(losses):.{digits}f} ± {np.std(losses, ddof=1) / math.sqrt(len(losses)):.{digits}f}"


def times(value: float, edges: Sequence[float] | None) -> str:
    """A ratio and its 95 % interval."""
    return f"{value:.2f}" + (f" ({edges[0]:.2f} to {edges[1]:.2f})" if edges else "")


def short(count: float) -> str:
    """A count as thousands or millions."""
    return f"{count / 1e6:.2g} million" if count >= 1e6 else f"{count / 1e3:.0f} thousand"


# ------------------------------------------------------------------------------------------------------------ the demo


def pair(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The baseline and the normalized arm of a comparison, whatever they were called when it was made."""
    arms = found["arms"]
    (baseline,) = (arms[name] for name in arms if name in BASELINES)
    (normalized,) = (arms[name] for name in arms if name not in BASELINES)
    return baseline, normalized


def headline() -> str:
    """The README's sentence about its picture."""
    found = read("demo")
    speedup, tokens = found["speedup"], found["config"]["tokens"]
    return (
        f"**In this run nGPT reaches GPT's final loss with {speedup['tokens']:.2f} times fewer tokens.** "
        f"That is a small model ({found['arms']['ngpt']['parameters'] / 1e6:.1f}M parameters) on little text "
        f"({tokens / 1e3:.0f}k tokens). The paper's factors of 4 to 20 come from runs over hundreds of billions of tokens, "
        "and no such run has been made with this code."
    )


def comparison_rows() -> list[tuple[str, dict[str, Any]]]:
    """Every comparison of `spherelm compare` that is kept, with what it compares."""
    experts = read("experts-compare")
    return [
        ("decoder (`make demo`)", read("demo")),
        ("hybrid `MAM-MAM-`", read("hybrid-compare")),
        ("experts `AOAOAOAO`", experts["moe"]),
        ("hybrid with experts `MAMOMAMO`", experts["hybrid-moe"]),
    ]


def comparisons() -> str:
    """The final losses of both arms and the speedups of `spherelm compare`, one architecture a row."""
    rows = []
    for name, found in comparison_rows():
        arms, speedup = pair(found), found["speedup"]
        ends = [mean_and_error(arm["final_loss_by_seed"]) for arm in arms]
        tokens = times(speedup["tokens"], speedup["tokens_interval"])
        rows.append([name, *ends, tokens, times(speedup["seconds"], speedup["seconds_interval"])])
    return grid(["architecture", "GPT", "nGPT", "times fewer tokens", "times fewer seconds"], rows)


def translation() -> str:
    """English to French: loss, BLEU and chrF of both arms."""
    rows = []
    for row in sorted(read("translation-fr")["rows"], key=lambda row: (row["arm"], row["steps"])):
        numbers = [mean_and_error(row["loss"]["by_seed"])]
        numbers += [mean_and_error(row[score]["by_seed"], 2) for score in ("bleu", "chrf")]
        rows.append(["nGPT" if row["arm"].startswith("n") else "GPT", row["steps"], *numbers])
    return grid(["arm", "updates", "validation loss", "BLEU", "chrF"], rows)


# ---------------------------------------------------------------------------------------------------------- the ladder


def points(baseline: str, contender: str = "ngpt-muon") -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every point of the ladder where `baseline` met `contender`: the text, the speedup, and the ends of both."""
    found = []
    for summary in read("ladder")["texts"]:
        ends = {(*place(row), row["contender"]): row for row in summary["measured"]}
        for row in summary["speedups"]:
            if (row["baseline"], row["contender"]) == (baseline, contender):
                both = {name: ends[(*place(row), name)] for name in (baseline, contender)}
                found.append((TEXTS[summary["text"]["train"]], row, both))
    return found


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Size, context and tokens of a point."""
    return row["size"], row["context"], row["tokens"]


def ladder(baseline: str) -> str:
    """Where both arms end at every point, and how many fewer tokens and seconds nGPT needs."""
    rows = []
    order = sorted(points(baseline), key=lambda found: (found[0], found[1]["context"], *size_order(found[1])))
    for text, row, ends in order:
        losses = [mean_and_error(end["test"]) for end in ends.values()]
        where = [f"`{row['size']}`", row["context"], text, short(row["tokens"]), f"{row['budget']:.3g}"]
        rows.append([*where, *losses, times(row["speedup"], row["interval"]), f"{row['seconds']:.2f}"])
    heads = ["size", "context", "text", "tokens", "per block parameter", "GPT", "nGPT", "times fewer tokens"]
    return grid([*heads, "times fewer seconds"], rows)


def size_order(row: dict[str, Any]) -> tuple[float, float]:
    """Small sizes before large ones, short runs before long ones."""
    return row["block_parameters"], row["tokens"]


def ladder_muon() -> str:
    """Best against best: Muon in both arms."""
    return ladder("gpt-muon")


def ladder_adamw() -> str:
    """The paper's baseline."""
    return ladder("gpt-adamw")


def speedup_at(baseline: str, **wanted: Any) -> dict[str, float]:
    """The speedups on books by their budgets, of the points that `wanted` describes."""
    found = [row for text, row, _ in points(baseline) if text == "books"]
    return {row["budget"]: row["speedup"] for row in found if all(row[key] == wanted[key] for key in wanted)}


def lead_grows() -> bool:
    """Whether nGPT's speedup rises with every longer budget at the size and context with the most budgets."""
    by_budget = speedup_at("gpt-muon", size="0.3m", context=256)
    values = [by_budget[budget] for budget in sorted(by_budget)]
    return values == sorted(values)


def ladder_findings() -> str:
    """The tables of the ladder."""
    found = points("gpt-muon")
    ahead = sum(row["speedup"] > 1 for _, row, _ in found)
    unsure = ", ".join(f"`{row['size']}`" for _, row, _ in found if row["interval"][0] <= 1)
    muon, adamw = (speedup_at(name, size="0.3m", context=256) for name in ("gpt-muon", "gpt-adamw"))
    long = speedup_at("gpt-muon", size="0.3m", context=1024)
    growth = read("ladder")["texts"][0]["growth"]["gpt-muon -> ngpt-muon"]
    first, last = min(muon), max(muon)
    verb = "grows" if lead_grows() else "does not grow steadily"
    fit = "; ".join(
        f"{what}^{growth['power'][name]:.2f} ± {growth['error'][name]:.2f}"
        for name, what in (
            ("budget", "tokens per block parameter"),
            ("context", "context"),
            ("block_parameters", "size"),
        )
    )
    lines = [
        f"nGPT is ahead at {ahead} of {len(found)} points. The interval contains 1 at {unsure or 'none of them'}.",
        f"**The speedup {verb} with the length of the run**: from {muon[first]:.2f} at {first:g} tokens per block "
        f"parameter to {muon[last]:.2f} at {last:g}. Over GPT with AdamW it goes from {adamw[min(adamw)]:.2f} to "
        f"{adamw[max(adamw)]:.2f}.",
        f"It is larger at a context of 1024 than at 256: {long[first]:.2f} instead of {muon[first]:.2f} at {first:g} tokens "
        f"per block parameter, {long[max(long)]:.2f} instead of {muon[max(long)]:.2f} at {max(long):g}.",
        f"A fit of powers to the {growth['points']} points on books gives {fit} (standard errors). Do not extrapolate it: the "
        "paper's runs have hundreds of billions of tokens, ours at most a few million.",
    ]  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


def robustness() -> str:
    """The final loss of both arms over a range of peak learning rates."""
    tables, ranges = [], []
    for sweep in read("rate-range")["sweeps"]:
        rows = sorted(sweep["rows"], key=lambda row: row["choice"]["lr"])
        best = min(row["mean"] for row in rows)
        losses = [f"**{row['mean']:.3f}**" if row["mean"] == best else f"{row['mean']:.3f}" for row in rows]
        arm = NAMES[rows[0]["choice"]["arm"]]
        tables.append(grid([f"{arm}, peak rate", *(f"{row['choice']['lr']:g}" for row in rows)], [["loss", *losses]]))
        ranges.append(f"{arm} {tolerated([(row['choice']['lr'], row['mean']) for row in rows])}")
    tables.append(f"Rates within 2 % of the arm's own best loss: {'; '.join(ranges)}.")
    return "\n\n".join(tables)


# -------------------------------------------------------------------------------------------------- scores and lengths


def tasks() -> str:
    """Accuracies of the demo's runs on downstream tasks, with standard errors."""
    found = read("eval-demo")
    runs = [found["gpt-0"], found["ngpt-0"]]
    rows = []
    for task, first in runs[0]["tasks"].items():
        for metric in ("acc", "acc_norm"):
            if metric in first["metrics"]:
                scores = [score(run["tasks"][task]["metrics"][metric]) for run in runs]
                chance = "-" if first["chance"] is None else f"{first['chance']:.3f}"
                rows.append([f"{task}, {metric}", first["documents"], chance, *scores])
    for metric in ("acc", "acc_norm"):
        rows.append([f"average of the five, {metric}", "", "", *(score(run["average"][metric]) for run in runs)])
    return grid(["task", "documents", "chance", "GPT", "nGPT"], rows)


def score(found: dict[str, float]) -> str:
    """A value and its standard error."""
    return f"{found['value']:.3f} ± {found['stderr']:.3f}"


def lengths_findings() -> str:
    """The table of losses over length, of the models as they were trained."""
    found = read("length")["results"]
    arms = {arm: rises(found, arm) for arm in NAMES}
    lengths = [row["length"] for row in next(iter(found.values()))["lengths"]]
    flatter = int((arms["ngpt"][:, -1] < arms["gpt"][:, -1]).sum())
    gains = int((np.concatenate([*arms.values()])[:, 1:] < 0).sum())
    start = {arm: np.mean([loss[0] for loss in losses_over_length(found, arm)]) for arm in NAMES}
    lower = min(start, key=lambda arm: start[arm])
    rise = " and ".join(f"{rise.mean(axis=0)[-1]:.3f} in {NAMES[arm]}" for arm, rise in arms.items())
    lead = abs(start["gpt"] - start["ngpt"])
    lines = [
        f"At {lengths[-1] // lengths[0]} times the trained length the loss is higher than at {lengths[0]} tokens by {rise}. "
        f"nGPT's rise is the smaller one in {flatter} of {len(arms['gpt'])} pairs of seeds.",
        f"{NAMES[lower]} has the lower loss on these books at {lengths[0]} tokens, by {lead:.3f} nats.",
        "No window that is longer than the trained one lowers the loss of any run."
        if gains == 0
        else f"A window that is longer than the trained one lowers the loss in {gains} of {3 * 2 * len(arms['gpt'])} cases.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def losses_over_length(found: dict[str, Any], arm: str) -> list[list[float]]:
    """The losses of each seed at each length, as trained, on disjoint windows."""
    runs = (run for name, run in found.items() if name.startswith(f"{arm}-") and name.endswith("as trained, disjoint"))
    return [[row["loss"] for row in run["lengths"]] for run in runs]


def rises(found: dict[str, Any], arm: str) -> Any:
    """The changes from the shortest length, [seeds, lengths]."""
    losses = np.array(losses_over_length(found, arm))
    return losses - losses[:, :1]


def lengths_hybrid() -> str:
    """The change of a hybrid's loss over the length of the window, with rotary positions and without."""
    runs = read("length-hybrid")["runs"]
    rows = []
    for arm, rope in dict.fromkeys((run["arm"], run["rope"]) for run in runs):
        values = np.array(
            [[row["loss"] for row in run["lengths"]] for run in runs if (run["arm"], run["rope"]) == (arm, rope)]
        )
        changes = values[:, 1:] - values[:, :1]
        spread = changes.std(axis=0, ddof=1) / math.sqrt(len(values))
        cells = [f"{mean:+.4f} ± {error:.4f}" for mean, error in zip(changes.mean(axis=0), spread, strict=True)]
        name = "nGPT" if arm.startswith("n") else "GPT"
        rows.append([name, "rotary" if rope == "standard" else rope, f"{values[:, 0].mean():.4f}", *cells])
    lengths = [row["length"] for row in runs[0]["lengths"]]
    heads = ["arm", "positions", f"loss at {lengths[0]}", *(f"at {length:,}" for length in lengths[1:])]
    return grid(heads, sorted(rows, key=lambda row: (row[0] == "nGPT", row[1] == "none")))
