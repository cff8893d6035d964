"""Results of encoder-decoder runs as one JSON: losses, BLEU and chrF by seed, mean and standard error over seeds.

    python research/translation_summary.py --runs final/* --scores scores/*.json --tuning tune/* --out translation.json

Runs that differ only in their seed are one row. `scores` are what `spherelm eval RUN --translate ... --json` wrote.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pairs_summary import read_json, shortened

from spherelm.runs.metrics import read_metrics


def spread(values: list[float]) -> dict[str, Any]:
    """Values by seed, their mean and its standard error (`None` for one seed)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"by_seed": values, "mean": mean(values), "standard_error": error}


def row(runs: list[Path], scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results of runs that differ only in their seed."""
    configs = [read_json(run / "config.json") for run in runs]
    curves = [[r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "val"] for run in runs]
    first = configs[0]
    found: dict[str, Any] = {
        "arm": first["arm"],
        "steps": first["train"]["steps"],
        "lr": first["optim"]["lr"],
        "seeds": [config["train"]["seed"] for config in configs],
        "loss": spread([curve[-1]["loss"] for curve in curves]),
        "curve": [[r["step"], mean(other[i]["loss"] for other in curves)] for i, r in enumerate(curves[0])],
        "commands": [shortened(config["command"]) for config in configs],
        "git_commit": first["git_commit"],
    }
    scored = [scores[run.name] for run in runs if run.name in scores]
    if scored:
        for name in ("bleu", "chrf"):
            values = [score["translation"][name] for score in scored]
            found[name] = spread([value["value"] for value in values]) | {
                "interval_over_texts": [value["interval"] for value in values],
                "signature": values[0]["signature"],
            }
        found["score_commands"] = [shortened(score["command"]) for score in scored]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses and scores of encoder-decoders, by arm and length.")
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--scores", type=Path, nargs="*", default=[])
    parser.add_argument("--tuning", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    scores = {Path(score["run"]).name: score for score in map(read_json, asked.scores)}
    groups: dict[str, list[Path]] = {}
    for run in sorted(asked.runs):
        groups.setdefault(run.name.rpartition("-")[0], []).append(run)
    config = read_json(asked.runs[0] / "config.json")
    result = {
        "rows": [row(runs, scores) for runs in groups.values()],
        "tuning": [row([run], {}) for run in sorted(asked.tuning)],
        "model": config["model"],
        "train": config["train"],
        "data_identity": config["data_identity"],
        "versions": config["versions"],
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for found in result["rows"]:
        scored = {name: found[name] for name in ("loss", "bleu", "chrf") if name in found}
        told = ", ".join(f"{n} {v['mean']:.3f} ± {v['standard_error'] or math.nan:.3f}" for n, v in scored.items())
        print(f"{found['arm']} {found['steps']} updates, lr {found['lr']:g}, {len(found['seeds'])} seeds: {told}")


if __name__ == "__main__":
    main()
