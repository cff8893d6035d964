"""docs/results/inside.json from what `spherelm inspect` wrote, and the text that `pages.py` makes of it.

spherelm inspect runs/demo --out runs/inside
python research/inside_summary.py runs/inside --summary docs/results/inside.json
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"gpt": "GPT", "ngpt": "nGPT"}
ATTENTION, MLP = ("Q", "K", "V", "W_o"), ("W_u", "W_v", "W_oMLP")


def summary(inspected: Path) -> dict[str, Any]:
    """The numbers of the tables, means over the seeds of each arm unless the name says otherwise."""

    def rows(table: str, arm: str, **wanted: Any) -> list[dict[str, str]]:
        with (inspected / "tables" / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))
        return [row for row in found if row["arm"] == arm and all(row[key] == wanted[key] for key in wanted)]

    def values(table: str, arm: str, **wanted: Any) -> Any:
        return np.array([float(row["value"]) for row in rows(table, arm, **wanted)])

    def by(axis: str, table: str, arm: str, **wanted: Any) -> list[float]:
        found = rows(table, arm, **wanted)
        places = sorted({int(row[axis]) for row in found})
        return [float(np.mean([float(row["value"]) for row in found if int(row[axis]) == place])) for place in places]

    def median(table: str, arm: str, names: tuple[str, ...]) -> float:
        return float(np.median(np.concatenate([values(table, arm, name=name) for name in names])))

    arms: dict[str, Any] = {}
    for arm in NAMES:
        eigenvalues = {name: by("rank", "embedding_eigenvalues", arm, name=name) for name in ("input", "output")}
        stops = ("lens_loss", "lens_agreement", "length", "effective_rank", "anisotropy")
        arms[arm] = {
            "embedding_norms": {
                name: np.quantile(values("embedding_norms", arm, name=name), (0.05, 0.95)).tolist()
                for name in ("input", "output")
            },
            "largest_over_median_eigenvalue": {
                name: float(max(found) / np.median(found)) for name, found in eigenvalues.items()
            },
            "condition": {"attention": median("condition_numbers", arm, ATTENTION),
                          "mlp": median("condition_numbers", arm, MLP)},
            "condition_unit": {"attention": median("condition_numbers_unit", arm, ATTENTION),
                               "mlp": median("condition_numbers_unit", arm, MLP)},
            "effective_rank_of_matrices": median("effective_ranks", arm, ATTENTION + MLP),
            "attention_entropy": float(np.median(values("attention_entropy", arm, name="over_largest"))),
            "degrees_of_steps": by("step", "angles", arm),
            **{name: by("stop", "stops", arm, name=name) for name in stops},
        }  # fmt: skip
    scales = {name: by("layer", "scales", "ngpt", name=name) for name in ("alpha_A", "alpha_M", "s_qk", "s_u", "s_v")}
    s_z = values("s_z", "ngpt")
    scales["s_z"] = [float(value) for value in np.quantile(s_z, (0.05, 0.5, 0.95))]
    departures = [float(row["largest_departure"]) for row in rows("off_sphere", "ngpt")]
    record = json.loads((inspected / "inspect.json").read_text(encoding="utf-8"))
    about = {name: record[name] for name in ("runs", "tokens", "text", "command", "git_commit", "versions")}
    return {**about, "arms": arms, "scales": scales, "negative_s_z": float((s_z < 0).mean()),
            "largest_departure": max(departures)}  # fmt: skip


def span(numbers: list[float], form: str = ".2f") -> str:
    """The least and the largest."""
    return f"{min(numbers):{form}} to {max(numbers):{form}}"


def table(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The paper's figures: which, what it shows, what our runs show, and whether that agrees."""
    arms, scales = found["arms"], found["scales"]

    def both(name: str, part: str) -> str:
        return ", ".join(f"{NAMES[arm]} {arms[arm][name][part]:.1f}" for arm in NAMES)

    def agrees(name: str) -> str:
        lower = [arms["ngpt"][name][part] < arms["gpt"][name][part] for part in arms["gpt"][name]]
        return "agrees" if all(lower) else "in part" if any(lower) else "**differs**"

    def medians(name: str) -> str:
        return f"medians: attention {both(name, 'attention')}; MLP {both(name, 'mlp')}"

    norms = {arm: {name: span(edges) for name, edges in arms[arm]["embedding_norms"].items()} for arm in arms}
    ratio, s_z = "largest_over_median_eigenvalue", scales["s_z"]
    of_gpt = f"GPT {norms['gpt']['input']} (input), {norms['gpt']['output']} (output)"
    s_qk = f"s_qk {scales['s_qk'][0]:.2f} in the first layer, {scales['s_qk'][-1]:.2f} in the last"
    most = f"median {s_z[1]:.1f}, nine in ten from {s_z[0]:.1f} to {s_z[2]:.1f}"
    return [
        ("4: norms of embeddings", "spread in GPT, 1 in nGPT",
         f"nine in ten: {of_gpt}; nGPT {norms['ngpt']['input']}", "agrees, by construction"),
        ("4: eigenvalues", "better conditioned in nGPT",
         f"largest over median: input {both(ratio, 'input')}; output {both(ratio, 'output')}", agrees(ratio)),
        ("5: condition numbers", "lower in nGPT", medians("condition"), agrees("condition")),
        ("5, dotted: vectors made unit", "", medians("condition_unit"), ""),
        ("6: eigen learning rates", "",
         f"attention {span(scales['alpha_A'])}, MLP {span(scales['alpha_M'])} over the layers", ""),
        ("6: s_qk, s_u, s_v", "", f"{s_qk}; s_u {span(scales['s_u'])}, s_v {span(scales['s_v'])}", ""),
        ("6: s_z", "", f"{most}; {100 * found['negative_s_z']:.1f} % are negative", ""),
    ]  # fmt: skip


def findings(found: dict[str, Any]) -> list[str]:
    """Results that the paper does not show, one paragraph each."""

    def of_each(say: Callable[[dict[str, Any]], str]) -> str:
        return "; ".join(f"{NAMES[arm]} {say(measured)}" for arm, measured in found["arms"].items())

    def turned(measured: dict[str, Any]) -> str:
        degrees = measured["degrees_of_steps"]
        return f"{sum(degrees):.0f}, a step {span(degrees, '.0f')}"

    def earlier(measured: dict[str, Any]) -> str:
        loss, same = measured["lens_loss"], measured["lens_agreement"]
        half = len(loss) // 2
        return f"{loss[0]:.2f}, {loss[half]:.2f}, {loss[-1]:.2f} (half way {100 * same[half]:.0f} %)"

    def lie(measured: dict[str, Any]) -> str:
        rank, cosine, length = (measured[name] for name in ("effective_rank", "anisotropy", "length"))
        ends = f"effective rank {rank[0]:.0f} to {rank[-1]:.0f}, mean cosine {cosine[0]:.2f} to {cosine[-1]:.2f}"
        return f"{ends}, length {length[0]:.1f} to {length[-1]:.1f}"

    return [
        f"**How far a state is turned.** Sum of all steps, degrees: {of_each(turned)}.",
        "**If the model stopped earlier**, and the output matrix read the state there: loss at the embedding, half way and at "
        f"the end (and in how many positions the most probable token is the final one already): {of_each(earlier)}.",
        f"**How states lie**, from the first stop to the last: {of_each(lie)}.",
        "**Matrices and heads.** Effective rank of the matrices over the largest possible, median: "
        f"{of_each(lambda measured: format(measured['effective_rank_of_matrices'], '.2f'))}. Attention entropy over its "
        f"largest, median over heads: {of_each(lambda measured: format(measured['attention_entropy'], '.2f'))}.",
        f"**On the sphere.** The largest departure of any unit vector from length 1 is {found['largest_departure']:.1e}.",
    ]


def text(found: dict[str, Any]) -> str:
    """The table and the findings, as Markdown."""
    means = " and ".join(f"{NAMES[arm]} {measured['lens_loss'][-1]:.2f}" for arm, measured in found["arms"].items())
    about = (
        f"Means over {len(found['runs']) // 2} seeds per arm, on {found['tokens']:,} tokens of the {found['text']}, where "
        f"the loss is {means} nats per token."
    )
    rows = [f"| {' | '.join(row)} |" for row in table(found)]
    lines = [about, "\n".join(["| paper's figure | there | here | |", "|---|---|---|---|", *rows]), *findings(found)]
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inspected", type=Path, help="the directory that `spherelm inspect` wrote")
    parser.add_argument("--summary", type=Path, required=True)
    given = parser.parse_args()
    given.summary.write_text(json.dumps(summary(given.inspected), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
