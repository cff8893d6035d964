"""Where the paper's factors of 4 to 20 come from: its pair of GPT and nGPT, with one thing changed at a time.

    python research/paper_pair.py --data data/mixed --test data/held --out runs/pair --budget 20 --minutes 110
    python research/paper_pair.py --table

Both arms are trained by `recipe="paper"`: GPT with AdamW, warm-up and decay, nGPT with Adam on the sphere. First each
arm's peak rate is searched by factors of two with one seed, on the validation text of --data. Then the baseline is
trained as it is and with each change, and nGPT, as it is, in whole schedules of 1, 1/2, ... of the length. A row's
speedup is the tokens of the baseline over those after which nGPT ends at the same loss on the text of --test. Runs
resume, and every finished one is a line of docs/results/paper-pair.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from result_tables import grid
from run_queue import Key, do, left, lines, number
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from spherelm.data.loader import validation_windows
from spherelm.data.shards import open_tokens
from spherelm.evaluate.perplexity import mean_loss
from spherelm.experiments.evidence_plan import GridPoint
from spherelm.experiments.jobs import Job, do_job
from spherelm.experiments.speedup import Saving, fewer_tokens, mean_curve, tokens_to_reach
from spherelm.recipes import make_run
from spherelm.runs.config import RunConfig
from spherelm.runs.loading import load_model
from spherelm.runs.metrics import read_metrics

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "paper-pair.json"
SIZE, CONTEXT = "0.3m", 256
LENGTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Parts of the whole length that nGPT is trained for."""

CHANGES: dict[str, dict[str, Any]] = {
    "as it is, at its own best rate": {},
    "matrices stored in bfloat16": {},
    "a third of its best rate": {"rate": 1 / 3},
    "three times its best rate": {"rate": 3.0},
    "with a norm of queries and keys": {"qk_norm": True},
    "without weight decay": {"weight_decay": 0.0},
    "warm-up of 2000 updates": {"warmup_steps": 2000},
}
"""What is changed in the baseline: fields of its run, and `rate`, a factor of the peak rate."""


def run_of(key: Key, data: Path, vocabulary: int) -> RunConfig:
    """The run of a key: an arm, a part of the whole length, a factor of the recipe's peak rate, a change, a seed."""
    point = GridPoint(SIZE, CONTEXT, key["budget"])
    steps = max(1, round(point.steps * key["length"]))
    fields = {name: value for name, value in CHANGES.get(key["change"], {}).items() if name != "rate"}
    if "warmup_steps" in fields:
        fields["warmup_steps"] = min(fields["warmup_steps"], steps - 1)
    size: dict[str, Any] = {"steps": steps, "seq_len": CONTEXT, "batch_size": point.batch_size}
    rate = make_run(key["arm"], SIZE, "paper", vocab_size=vocabulary, **size).optim.lr
    return make_run(
        key["arm"], SIZE, "paper", vocab_size=vocabulary, data=str(data), lr=float(f"{rate * key['factor']:.3g}"),
        seed=key["seed"], compile=point.compiled, threads=1, eval_every=max(1, steps // 16), save_every=10**9, **size,
        **fields,
    )  # fmt: skip


def store_in_bfloat16(optimizer: Optimizer, *_: Any) -> None:
    """Round the block matrices and their moments to what a bfloat16 parameter and its moments would hold."""
    for group in optimizer.param_groups:
        if group["role"] == "matrix":
            for parameter in group["params"]:
                moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
                for tensor in (parameter.data, *moments):
                    tensor.copy_(tensor.to(torch.bfloat16))


def measure(data: Path, test: Path, key: Key, out: Path) -> dict[str, Any]:
    """Do the run of a key: its losses on validation and test text, and its validations along the run."""
    held = open_tokens(test, "val")
    run = run_of(key, data, held.vocab_size)
    with ExitStack() as stack:
        if key["change"] == "matrices stored in bfloat16":
            stack.callback(register_optimizer_step_post_hook(store_in_bfloat16).remove)
        loss = do_job(Job(run, out))
    along = [[one["tokens"], one["loss"]] for one in read_metrics(out / "metrics.jsonl") if one["kind"] == "val"]
    judged = math.nan if math.isnan(loss) else mean_loss(load_model(out), *validation_windows(held, CONTEXT, 256), 16)
    tokens = run.train.steps * run.train.batch_size * CONTEXT
    return {"loss": number(loss), "test": number(judged), "lr": run.optim.lr, "tokens": tokens, "along": along}


def search(budget: float, arm: str) -> tuple[list[Key], float | None]:
    """The runs that the search for an arm's peak rate still needs, and the best factor of the recipe's when none."""
    base: Key = {"budget": budget, "arm": arm, "length": 1.0, "change": next(iter(CHANGES)), "seed": 0}
    found = {line["factor"]: line["test"] and line["loss"] for line in lines(RESULTS) if base.items() <= line.items()}
    losses = {factor: math.inf if loss is None else loss for factor, loss in found.items()}
    wanted = [0.5, 1.0, 2.0]
    if all(factor in losses for factor in wanted):
        best = min(losses, key=lambda factor: losses[factor])
        wanted = [best / 2, best, best * 2]
    missing = [factor for factor in wanted if factor not in losses]
    return [{**base, "factor": factor} for factor in missing], None if missing else best


def wanted(budget: float, seeds: int) -> Iterator[Key]:
    """The key of each run, those of the search first; the others once it is done."""
    searches = {arm: search(budget, arm) for arm in ("gpt", "ngpt")}
    missing = [key for keys, _ in searches.values() for key in keys]
    yield from missing
    if missing:
        return
    own = next(iter(CHANGES))
    for seed in range(seeds):
        for arm, lengths, changes in (("ngpt", LENGTHS, (own,)), ("gpt", (1.0,), tuple(CHANGES))):
            for length in lengths:
                for change in changes:
                    factor = searches[arm][1] * CHANGES[change].get("rate", 1.0)
                    yield {
                        "budget": budget,
                        "arm": arm,
                        "length": length,
                        "change": change,
                        "seed": seed,
                        "factor": factor,
                    }


def curves(budget: float, along: bool = False) -> list[list[tuple[float, float]]]:
    """nGPT's test losses over the tokens of whole schedules, or the validations along its longest, seed by seed."""
    _, factor = search(budget, "ngpt")
    own = [one for one in lines(RESULTS) if (one["budget"], one["arm"], one["factor"]) == (budget, "ngpt", factor)]
    seeds = sorted({one["seed"] for one in own if one["length"] == min(LENGTHS)})
    if along:
        return [[(t, x) for t, x in one["along"] if t] for one in own if one["length"] == 1.0 and one["seed"] in seeds]
    return [[(one["tokens"], one["test"]) for one in own if one["seed"] == seed] for seed in seeds]


def in_words(saving: Saving) -> str:
    """A speedup with its bound and its interval."""
    edges = f" ({saving.interval[0]:.2f} to {saving.interval[1]:.2f})" if saving.interval else ""
    return f"{saving.bound or ''} {saving.value:.2f}{edges}".strip()


def rows_of(budget: float) -> Iterator[Sequence[object]]:
    """A row for each change: the baseline's loss, and how many times fewer tokens nGPT needs for it."""
    ends, inside = curves(budget), curves(budget, along=True)
    _, best = search(budget, "gpt")
    for change, fields in CHANGES.items():
        factor = best and best * fields.get("rate", 1.0)
        own = [one for one in lines(RESULTS) if (one["budget"], one["arm"], one["change"]) == (budget, "gpt", change)]
        runs = [one for one in own if one["factor"] == factor][: len(ends)]
        if not runs or len(runs) < len(ends):
            continue
        losses, tokens = [one["test"] for one in runs], runs[0]["tokens"]
        if any(loss is None for loss in losses):
            yield change, "diverged", ""
            continue
        error = f" ± {statistics.stdev(losses) / len(losses) ** 0.5:.3f}" if len(losses) > 1 else ""
        yield change, f"{statistics.fmean(losses):.3f}{error}", in_words(fewer_tokens(tokens, ends, losses))
        if not fields and factor == best and change == next(iter(CHANGES)):
            final = [one["loss"] for one in runs]
            said = in_words(fewer_tokens(tokens, inside, final))
            yield "as it is, against the middle of nGPT's schedule", f"{statistics.fmean(final):.3f} (validation)", said
            half = [min(one["along"], key=lambda point: abs(point[0] - tokens / 2)) for one in runs]
            reached = tokens_to_reach(mean_curve(inside), statistics.fmean(loss for _, loss in half))
            said = f"{reached.bound or ''} {half[0][0] / reached.tokens:.2f}".strip()
            loss = statistics.fmean(loss for _, loss in half)
            yield "both in the middle of their schedules", f"{loss:.3f} (validation)", said


def table() -> str:
    """The rows of every budget that was measured."""
    budgets = sorted({one["budget"] for one in lines(RESULTS)})
    rows = [[f"{budget:g}", *row] for budget in budgets for row in rows_of(budget)]
    return grid(
        ["tokens per block parameter", "the baseline", "its loss", "nGPT needs how many times fewer tokens"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    asked = parser.parse_args()
    while not asked.table and left(wanted(asked.budget, asked.seeds), RESULTS):
        before = len(lines(RESULTS))
        each = partial(measure, asked.data, asked.test)
        do(wanted(asked.budget, asked.seeds), each, RESULTS, asked.out, asked.minutes, asked.workers)
        if len(lines(RESULTS)) == before:
            break
    print(table())


if __name__ == "__main__":
    main()
