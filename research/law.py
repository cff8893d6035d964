"""The runs behind the law (docs/recipes.md): those that its constants were fitted on, and others that test them.

    python research/law.py prepare --shared ../shared/data --out data/law
    python research/law.py run test spot --data data/law --out runs/law --minutes 110
    python research/law.py run architecture --data data/enfr --out runs/law
    python research/law.py table
    python research/law.py draw

A point is a shape, a text and a length. `run test` trains both arms at the law's peak rate, at half and at double of
it, the cheapest points first; `run spot` moves the rate of one role at a time at the points of `SPOT`, and `run fit` at
those of `FIT`. GPT takes three seeds where one decides nothing. `run architecture` trains the presets that are no plain
decoders, `pairs` on the data directory that is given (docs/experiments.md has its command). Runs resume, and every
finished one is a line of docs/results/law.json. `table` prints how far the law's rate is from the best of the three at
each point, and what single roles do.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from run_queue import Key, do, lines, number

from spherelm.data.sources import parse_data
from spherelm.experiments.jobs import Job, do_job
from spherelm.recipes import make_run
from spherelm.recipes.law import CONSTANTS

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "law.json"


@dataclass(frozen=True)
class Point:
    """A shape, a text and a length. tokens: of an update. vocabulary: 256, 4k or 32k, of the tokenizers of
    `prepare`.
    """

    d_model: int
    n_layers: int
    vocabulary: str
    tokens: int
    steps: int
    context: int
    text: str

    @property
    def name(self) -> str:
        """All of it in a word."""
        return "-".join(str(value) for value in asdict(self).values())

    @property
    def cost(self) -> float:
        """Roughly the operations of a run."""
        vocabulary = {"256": 256, "4k": 4096, "32k": 32000}[self.vocabulary]
        block = 16 * self.n_layers * self.d_model**2 + 2 * self.n_layers * self.d_model * self.context
        return float(self.steps * self.tokens * (block + self.d_model * vocabulary))


TEST = (
    Point(64, 4, "4k", 1024, 240, 256, "wiki"),
    Point(64, 3, "256", 2048, 480, 512, "books"),
    Point(128, 3, "4k", 1024, 320, 256, "books"),
    Point(256, 3, "4k", 1024, 240, 256, "books"),
    Point(64, 16, "256", 1024, 160, 256, "wiki"),
    Point(64, 12, "256", 1024, 320, 256, "books"),
    Point(64, 5, "256", 1024, 480, 256, "books"),
    Point(64, 2, "32k", 1024, 160, 256, "wiki"),
    Point(256, 2, "256", 1024, 240, 512, "wiki"),
    Point(64, 2, "256", 8192, 240, 256, "books"),
    Point(64, 2, "4k", 2048, 320, 2048, "wiki"),
    Point(64, 3, "4k", 4096, 240, 512, "wiki"),
    Point(64, 3, "4k", 1024, 2000, 256, "books"),
    Point(64, 2, "256", 32768, 160, 512, "books"),
    Point(512, 2, "4k", 1024, 160, 256, "books"),
    Point(512, 2, "256", 1024, 160, 256, "wiki"),
    Point(64, 2, "256", 1024, 10000, 128, "books"),
)
"""Points that are not among those of `FIT`, nor among `FORMER`."""

FORMER = (
    Point(64, 4, "4k", 1024, 160, 256, "books"),
    Point(64, 2, "256", 2048, 640, 512, "wiki"),
    Point(64, 16, "4k", 1024, 160, 128, "wiki"),
    Point(64, 6, "256", 1024, 640, 256, "wiki"),
    Point(256, 2, "256", 1024, 160, 1024, "books"),
    Point(64, 2, "256", 16384, 160, 256, "wiki"),
    Point(64, 4, "4k", 4096, 320, 512, "books"),
    Point(64, 2, "4k", 1024, 2560, 256, "wiki"),
    Point(256, 4, "4k", 1024, 160, 256, "wiki"),
    Point(256, 3, "256", 1024, 160, 512, "wiki"),
    Point(512, 2, "256", 1024, 160, 256, "books"),
)
"""Points of earlier tests, where GPT missed: the first six chose the rates of scales and gains, the next two the power
of the vocabulary for GPT's output embedding and gains, the last three the unit of its input embedding's rate."""

CENTER = Point(64, 2, "4k", 1024, 160, 256, "books")
FIT = (
    CENTER,
    Point(64, 2, "4k", 4096, 160, 256, "books"),
    Point(256, 2, "4k", 1024, 160, 256, "books"),
    Point(64, 2, "4k", 1024, 640, 256, "books"),
    Point(64, 2, "256", 1024, 160, 256, "books"),
    Point(64, 2, "32k", 1024, 160, 256, "books"),
    Point(64, 8, "4k", 1024, 160, 256, "books"),
    Point(64, 4, "4k", 1024, 320, 256, "books"),
)
"""Points that the constants were fitted on: a center, and from it one step in each direction."""

SPOT = (TEST[0], TEST[6], TEST[7], TEST[9])
"""Points of `TEST` where each role's rate is moved alone."""

ROLES = {
    "matrix": {"gpt": "matrix", "ngpt": "matrix"},
    "input": {"gpt": "input_embedding", "ngpt": "input_embedding"},
    "output": {"gpt": "output_embedding", "ngpt": "output_embedding"},
    "vector": {"gpt": "gain", "ngpt": "scale"},
}
"""What the law gives a rate of its own, and the optimizer's name for it in each arm. Vectors: learned scales and gains
of norms.
"""


ARMS = ("gpt", "ngpt")
ARCHITECTURES = ("hybrid", "hybrid-moe", "moe", "encoder", "pairs")
"""Presets of other architectures."""


def seeds(point: Point, arm: str) -> tuple[int, ...]:
    """Seeds of a test: three of GPT where the vocabulary is bytes, but for the longest run.

    They differ by up to 1.8 % there (64-3-256-2048-480), elsewhere by 0.1 to 0.2 % (docs/results/ladder.json).
    """
    return (0, 1, 2) if arm == "gpt" and point.vocabulary == "256" and point.steps < 1000 else (0,)


def spot_seeds(point: Point, arm: str) -> tuple[int, ...]:
    """Seeds of a role that is moved alone: a third of a percent is asked for, and GPT's differ by that; over bytes
    nGPT's too.
    """
    return (0, 1, 2) if arm == "gpt" or point.vocabulary == "256" else (0,)


def wanted(kinds: list[str]) -> Iterator[Key]:
    """The key of each run, the first seeds and the cheapest points first; the role "all" is the peak rate."""
    whole, alone = [("all", 1.0), ("all", 0.5), ("all", 2.0)], [*itertools.product(ROLES, (0.5, 2.0))]
    if "architecture" in kinds:
        for preset, arm in itertools.product(ARCHITECTURES, ARMS):
            yield {"kind": "architecture", "point": preset, "arm": arm, "role": "all", "factor": 1.0, "seed": 0}
    for seed, kind in itertools.product((0, 1, 2), [kind for kind in kinds if kind != "architecture"]):
        for point in sorted({"test": TEST, "fit": FIT, "spot": SPOT}[kind], key=lambda point: point.cost):
            for arm in ARMS:
                moved = {"test": whole, "fit": [whole[0], *alone[:-2]], "spot": alone}[kind]
                of = {"point": point.name, "arm": arm}
                if seed in {"test": seeds(point, arm), "fit": (0,), "spot": spot_seeds(point, arm)}[kind]:
                    if kind == "spot" and seed not in seeds(point, arm):
                        yield {"kind": "test", **of, "role": "all", "factor": 1.0, "seed": seed}
                    yield from ({"kind": kind, **of, "role": r, "factor": f, "seed": seed} for r, f in moved)


def run_of(point: Point, arm: str, role: str, factor: float, data: Path, seed: int) -> Any:
    """The run by the law with one rate times a factor."""
    directory = data / f"{point.text}-{point.vocabulary}"
    size = parse_data(str(directory)).vocab_size
    fields: dict[str, Any] = {
        "d_model": point.d_model, "n_heads": max(1, point.d_model // 64), "n_layers": point.n_layers, "steps": point.steps,
        "seq_len": point.context, "batch_size": max(1, point.tokens // point.context), "eval_every": 0,
        "compile": point.steps * point.tokens > 2**21, "threads": 1,
        "eval_windows": 32768 // point.context, "stop_above": math.log(size) + 1, "save_every": 10**9, "seed": seed,
    }  # fmt: skip
    lawful = make_run(arm, "0.3m", vocab_size=size, data=str(directory), **fields)
    if role == "all":
        return make_run(arm, "0.3m", vocab_size=size, data=str(directory), **fields, lr=lawful.optim.lr * factor)
    name = ROLES[role][arm]
    moved = {f"{name}_rate": getattr(lawful.optim.multipliers, name) * factor}
    return make_run(arm, "0.3m", vocab_size=size, data=str(directory), **fields, **moved)


def measure(data: Path, key: Key, out: Path) -> dict[str, Any]:
    """Do the run of a key."""
    if key["kind"] == "architecture":
        place = str(data) if key["point"] == "pairs" else None
        size = parse_data(place).vocab_size
        run = make_run(key["arm"], key["point"], vocab_size=size, data=place, seed=key["seed"], threads=1)
    else:
        point = next(point for point in (*TEST, *FIT, *FORMER) if point.name == key["point"])
        run = run_of(point, key["arm"], key["role"], key["factor"], data, key["seed"])
    return {
        "loss": number(do_job(Job(run, out))),
        "lr": run.optim.lr,
        "multipliers": asdict(run.optim.multipliers),
    }


def run(asked: argparse.Namespace) -> None:
    """Do the remaining runs of `asked.kinds`."""
    do(wanted(asked.kinds), partial(measure, asked.data), RESULTS, asked.out, asked.minutes, asked.workers)


def prepare(asked: argparse.Namespace) -> None:
    """Data directories of books and encyclopedia by three tokenizers: bytes, the shipped one and Llama 2's."""
    tokenizers = {
        "256": "bytes",
        "4k": "default",
        "32k": str(asked.shared / "tokenizers" / "llama2" / "tokenizer.json"),
    }
    for text in ("books", "wiki"):
        for name, tokenizer in tokenizers.items():
            train = sorted((asked.shared / text).glob("train-*"))[: 1 if name == "256" else 4]
            words = [
                "--input",
                *train,
                "--val",
                asked.shared / text / "val-000.jsonl.xz",
                "--out",
                asked.out / f"{text}-{name}",
            ]
            subprocess.run(
                [sys.executable, "-m", "spherelm", "data", "prepare", *map(str, words), "--tokenizer", tokenizer],
                check=True,
            )


def tested(results: Path) -> Iterator[tuple[Point, str, dict[float, dict[int, float]]]]:
    """(point, arm, losses by factor and seed) of each test, the cheapest points first: the seeds that have all three
    rates.
    """
    runs = [one for one in lines(results) if one["kind"] == "test"]
    for point in sorted(TEST, key=lambda point: point.cost):
        for arm in ARMS:
            found: dict[float, dict[int, float]] = {0.5: {}, 1.0: {}, 2.0: {}}
            for one in (r for r in runs if (r["point"], r["arm"]) == (point.name, arm)):
                found[one["factor"]][one["seed"]] = one["loss"] or math.inf
            whole = [seed for seed in seeds(point, arm) if all(seed in losses for losses in found.values())]
            if whole:
                yield point, arm, {rate: {seed: found[rate][seed] for seed in whole} for rate in found}


def change(over: list[float]) -> str:
    """The mean of changes in percent, one a seed, with its standard error."""
    if not all(map(math.isfinite, over)):
        return "diverged"
    return f"{statistics.fmean(over):+.2f}{f' ± {error(over):.2f}' if len(over) > 1 else ''} %"


def error(over: list[float]) -> float:
    """The standard error of the mean; infinite of a single number."""
    return statistics.stdev(over) / len(over) ** 0.5 if len(over) > 1 else math.inf


def changes(losses: dict[int, float], base: dict[int, float]) -> list[float]:
    """By how many percent each seed's loss is above that of the same seed in `base`."""
    return [100 * (losses[seed] / loss - 1) for seed, loss in base.items()]


def points(results: Path = RESULTS) -> str:
    """How much of the loss each point gives away at the law's rate, in percent of the best of the three, by arm."""
    rows, lost = [], []
    for point, arm, found in tested(results):
        means = {factor: statistics.fmean(losses.values()) for factor, losses in found.items()}
        lost.append(100 * (means[1.0] / min(means.values()) - 1))
        beside = [change(changes(found[factor], found[1.0])) for factor in (0.5, 2.0)]
        shape = f"{point.d_model} | {point.n_layers} | {point.vocabulary} | {point.tokens} | {point.steps} | {point.context}"
        cells = [shape, point.text, arm, str(len(found[1.0])), f"{means[1.0]:.4f}", *beside, f"{lost[-1]:.2f} %"]
        rows.append(f"| {' | '.join(cells)} |")
    heads = "| d_model | layers | vocabulary | tokens | updates | context | text | arm | seeds | loss | half | double | lost |"
    within = ", ".join(f"{sum(x <= limit for x in lost)} within {limit} %" for limit in (0.1, 0.3))
    said = f"{len(lost)} of {2 * len(TEST)} tests are done: {within} of the best of the three rates."
    return "\n".join([said, "", heads, "|" + "---|" * 13, *rows])


def spots(results: Path = RESULTS) -> str:
    """By how much the loss changes where one role's rate alone is halved or doubled, over the seeds that have all."""
    runs = [one for one in lines(results) if one["kind"] in ("test", "spot")]
    of = {(r["point"], r["arm"], r["role"], r["factor"], r["seed"]): r["loss"] or math.inf for r in runs}
    moved, rows, cells = [*itertools.product(ROLES, (0.5, 2.0))], [], []
    for point in sorted(SPOT, key=lambda point: point.cost):
        for arm in ARMS:
            place, rates = (point.name, arm), [("all", 1.0), *moved]
            whole = [seed for seed in spot_seeds(point, arm) if all((*place, *rate, seed) in of for rate in rates)]
            if whole:
                base, *others = ({seed: of[(*place, *rate, seed)] for seed in whole} for rate in rates)
                own = [changes(losses, base) for losses in others]
                cells += own
                rows.append(f"| {point.name} | {arm} | {len(whole)} | {' | '.join(map(change, own))} |")
    heads = " | ".join(f"{role}, {'half' if factor < 1 else 'double'}" for role, factor in moved)
    better = [over for over in cells if statistics.fmean(over) < -0.3]
    sure = sum(statistics.fmean(over) + 2 * error(over) < -0.3 for over in better)
    said = (
        f"{len(cells)} of {16 * len(SPOT)} rates were moved: {len(better)} of them lower the loss by more than 0.3 % on the "
        f"mean, {sure} of these by two standard errors more."
    )
    return "\n".join([said, "", f"| point | arm | seeds | {heads} |", "|" + "---|" * 11, *rows])


def architectures(results: Path = RESULTS) -> str:
    """Final validation losses of other architectures by the law."""
    runs = [one for one in lines(results) if one["kind"] == "architecture" and "role" in one]
    of = {(run["point"], run["arm"]): f"{run['loss']:.3f}" for run in runs}
    rows = [f"| `{one}` | {' | '.join(of.get((one, arm), '') for arm in ARMS)} |" for one in ARCHITECTURES]
    return "\n".join(["| preset | GPT | nGPT |", "|---|---|---|", *rows])


def draw(asked: argparse.Namespace) -> None:
    """Loss over rate at every tested point, rates in units of the law's, into an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    shown = sorted(TEST, key=lambda point: point.cost)
    for point, arm, found in tested(asked.results):
        place, axis = shown.index(point), axes[ARMS.index(arm)]
        means = [statistics.fmean(losses.values()) for _, losses in sorted(found.items())]
        above = [100 * (mean / min(means) - 1) for mean in means]
        label = f"{point.d_model} wide, {point.n_layers} layers, {point.vocabulary}, {point.tokens} x {point.steps}"
        axis.plot(
            (0.5, 1, 2), above, marker="osv^"[place % 4], color=pyplot.cm.viridis(place / len(shown)), label=label
        )
    for axis, title in zip(axes, ("GPT", "nGPT"), strict=True):
        names = {"xticks": [0.5, 1, 2], "xticklabels": ["half", "the law's", "double"]}
        axis.set(xscale="log", **names, title=title, xlabel="peak rate", ylim=(-0.3, 6))
        axis.minorticks_off()
    axes[0].set_ylabel("loss over the lowest, %")
    handles, labels = axes[1].get_legend_handles_labels()
    named = {"title": "width, layers, vocabulary, tokens of an update x updates", "title_fontsize": 7}
    figure.legend(handles, labels, fontsize=6, ncols=3, loc="outside lower center", **named)
    figure.savefig(asked.out, metadata={"Date": None})


def constants() -> str:
    """The law's constants as a table of docs/recipes.md."""
    rows = [f"| `{name}` | {one.value:.3g} | {one.means} | {one.source} |" for name, one in CONSTANTS.items()]
    return "\n".join(["| constant | value | what it is | where it comes from |", "|---|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("prepare")
    one.add_argument("--shared", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(do=prepare)
    one = commands.add_parser("run")
    one.add_argument("kinds", nargs="+", choices=["test", "fit", "spot", "architecture"])
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--minutes", type=float, default=110.0)
    one.add_argument("--workers", type=int, default=2)
    one.set_defaults(do=run)
    one = commands.add_parser("table")
    one.set_defaults(do=lambda asked: print(points(), spots(), architectures(), sep="\n\n"))
    one = commands.add_parser("draw")
    one.add_argument("--results", type=Path, default=RESULTS)
    one.add_argument("--out", type=Path, default=Path("docs/images/law.svg"))
    one.set_defaults(do=draw)
    asked = parser.parse_args()
    asked.do(asked)


if __name__ == "__main__":
    main()
