"""What the law costs where rates were tuned one by one: its losses beside those of docs/results/ladder.json.

    spherelm data prepare --input ../shared/data/books/train-*.jsonl.xz --val ../shared/data/books/val-000.jsonl.xz \\
        --tokenizer default --out data/ladder
    python research/law_costs.py --data data/ladder --out runs/law-costs --minutes 60

Each run has the seed, the text and the length of a tuned run, and the law's choices. Runs resume, and every finished
one is a line of docs/results/law-costs.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spherelm.experiments.jobs import Job, run_jobs
from spherelm.recipes import make_run
from spherelm.runs.record import write_json

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"

POINTS = (("0.3m", 256, 320, 2), ("0.3m", 1024, 320, 2), ("1m", 256, 320, 2), ("0.3m", 256, 1280, 1),
          ("4m", 256, 320, 1), ("0.3m", 256, 5120, 1))  # fmt: skip
"""(size, context, updates of 1024 tokens, seeds) of the ladder's runs on books, the cheapest first."""


def tuned() -> dict[tuple[str, int, int, str], list[float]]:
    """The ladder's validation losses at its tuned rates, by size, context, updates and arm, one a seed."""
    books = json.loads((RESULTS / "ladder.json").read_text(encoding="utf-8"))["texts"][0]["measured"]
    rows = [row for row in books if row["recipe"] == "muon"]
    return {(row["size"], row["context"], row["steps"], row["arm"]): row["validation"] for row in rows}


def runs_so_far() -> list[dict[str, Any]]:
    """The lines of the results file."""
    path = RESULTS / "law-costs.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return found


def wanted() -> Iterator[dict[str, Any]]:
    """Every run, but for its loss."""
    for size, context, steps, seeds in POINTS:
        for seed in range(seeds):
            for arm in ("gpt", "ngpt"):
                yield {"size": size, "context": context, "steps": steps, "arm": arm, "seed": seed}


def table() -> str:
    """Each point's loss by the law over the tuned loss of the same seeds, and how the lead of nGPT changes."""
    of_tuned, found = tuned(), runs_so_far()
    heads = "| size | context | updates | seeds | GPT tuned | GPT, law | nGPT tuned | nGPT, law | lead, changed by |"
    rows = [heads, "|---|---|---|---|---|---|---|---|---|"]
    for size, context, steps, seeds in POINTS:
        place, cells, changes = (size, context, steps), [], []
        for arm in ("gpt", "ngpt"):
            here = dict(zip(("size", "context", "steps", "arm"), (*place, arm), strict=True))
            losses = [run["loss"] for run in found if here.items() <= run.items()]
            if len(losses) < seeds:
                break
            before, now = statistics.mean(of_tuned[(*place, arm)][:seeds]), statistics.mean(losses)
            changes.append(now - before)
            cells += [f"{before:.3f}", f"{now:.3f} ({100 * (now / before - 1):+.2f} %)"]
        else:
            lead = f"{changes[0] - changes[1]:+.3f}"
            rows.append(f"| `{size}` | {context} | {steps} | {seeds} | {' | '.join(cells)} | {lead} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    until = time.time() + 60 * asked.minutes
    left = [one for one in wanted() if one not in [{k: run[k] for k in one} for run in runs_so_far()]]
    while left and time.time() < until:
        now, left = left[: asked.workers], left[asked.workers :]
        jobs = []
        for one in now:
            run = make_run(one["arm"], one["size"], vocab_size=4096, data=str(asked.data), steps=one["steps"], eval_every=0,
                           seq_len=one["context"], batch_size=1024 // one["context"], seed=one["seed"],
                           compile=one["steps"] >= 640)  # fmt: skip
            jobs.append(Job(run, asked.out / "-".join(map(str, one.values()))))
        losses = run_jobs(jobs, asked.workers, "")
        done = [
            {**one, "loss": loss, "lr": job.config.optim.lr} for one, job, loss in zip(now, jobs, losses, strict=True)
        ]
        write_json(RESULTS / "law-costs.json", {"runs": [*runs_so_far(), *done]})
    print(table())


if __name__ == "__main__":
    main()
