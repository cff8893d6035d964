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
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from run_queue import Key, do, lines, number

from spherelm.experiments.jobs import Job, do_job
from spherelm.recipes import make_run

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
COSTS = RESULTS / "law-costs.json"

POINTS = (("0.3m", 256, 320, 2), ("0.3m", 1024, 320, 2), ("1m", 256, 320, 2), ("0.3m", 256, 1280, 1),
          ("4m", 256, 320, 1), ("0.3m", 256, 5120, 1))  # fmt: skip
"""(size, context, updates of 1024 tokens, seeds) of the ladder's runs on books, the cheapest first."""


def tuned() -> dict[tuple[str, int, int, str], list[float]]:
    """The ladder's validation losses at its tuned rates, by size, context, updates and arm, one a seed."""
    books = json.loads((RESULTS / "ladder.json").read_text(encoding="utf-8"))["texts"][0]["measured"]
    rows = [row for row in books if row["recipe"] == "muon"]
    return {(row["size"], row["context"], row["steps"], row["arm"]): row["validation"] for row in rows}


def wanted() -> Iterator[Key]:
    """The key of each run."""
    for size, context, steps, seeds in POINTS:
        for seed in range(seeds):
            for arm in ("gpt", "ngpt"):
                yield {"size": size, "context": context, "steps": steps, "arm": arm, "seed": seed}


def measure(data: Path, key: Key, out: Path) -> dict[str, Any]:
    """Do the run of a key."""
    run = make_run(key["arm"], key["size"], vocab_size=4096, data=str(data), steps=key["steps"], eval_every=0,
                   seq_len=key["context"], batch_size=1024 // key["context"], seed=key["seed"],
                   compile=key["steps"] >= 640, threads=1)  # fmt: skip
    return {"loss": number(do_job(Job(run, out))), "lr": run.optim.lr}


def table() -> str:
    """Each point's loss by the law over the tuned loss of the same seeds, and how the lead of nGPT changes."""
    of_tuned, found = tuned(), lines(COSTS)
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
    do(wanted(), partial(measure, asked.data), COSTS, asked.out, asked.minutes, asked.workers)
    print(table())


if __name__ == "__main__":
    main()
