"""What products in four bits cost GPT and nGPT (docs/precision.md):
short runs by the law, float32 beside emulated NVFP4.

    python research/precision.py run --out runs/precision --minutes 60       # the same command again continues
    python research/precision.py weights --out runs/precision                # weights rounded or moved, after training
    python research/precision.py table
    python research/precision.py draw                                        # docs/images/precision.svg

A run is 160 updates of 1024 tokens of the shipped text, on one thread, the cheapest ones first. Every finished one is a
line of docs/results/precision.json. `weights` measures the models that were trained in float32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_tables import grid, read
from run_queue import Key, add, do, left, lines, name_of, number
from torch import Tensor

from spherelm import load_model
from spherelm.analysis.rounding import measure_rounding
from spherelm.analysis.sharpness import PERTURBATION_SIZES, measure_sharpness
from spherelm.data.sources import parse_data
from spherelm.experiments.jobs import Job, do_job
from spherelm.layers.linear import Linear
from spherelm.layers.low_precision import to_nvfp4
from spherelm.models import Decoder
from spherelm.recipes import make_run
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.runs.config import read_config
from spherelm.train.batches import open_data, total_loss, validation_losses

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "precision.json"
WIDTHS, SEEDS = (64, 128, 256, 512), (0, 1, 2)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT": ("gpt", {}),
    "nGPT": ("ngpt", {}),
    "FNGPT": ("ngpt", {"variant.inner_norm": True}),
}
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "amax and Hadamard": {"precision": "nvfp4", "precision.amax": "measured", "precision.hadamard": True},
    "amax": {"precision": "nvfp4", "precision.amax": "measured"},
    "neither": {"precision": "nvfp4", "precision.amax": "one"},
}
"""How the operands of the blocks' products are rounded:
as GPT needs it according to the paper, down to what nGPT needs.
"""


def wanted() -> Iterator[Key]:
    """The key of each run: first one seed of the smallest width, then a second one and the next width."""
    points = [(place, width, seed) for place, width in enumerate(WIDTHS) for seed in SEEDS]
    for _, width, seed in sorted(points, key=lambda point: (point[0] + point[2], point[0])):
        for model in MODELS:
            yield from ({"width": width, "seed": seed, "model": model, "format": form} for form in FORMATS)


def run_of(width: int, seed: int, model: str, form: str) -> Any:
    """The run by the law; all runs of a width and a seed start from the same weights, of FNGPT from nGPT's."""
    arm, fields = MODELS[model]
    size: dict[str, Any] = {
        "d_model": width, "n_heads": width // 64, "n_layers": 4, "steps": 160, "seq_len": 256, "batch_size": 4, "seed": seed,
        "dtype": "float32", "compile": False, "threads": 1, "eval_every": 0, "eval_windows": 128, "save_every": 10**9,
    }  # fmt: skip
    return make_run(arm, "0.3m", vocab_size=parse_data(None).vocab_size, **size, **fields, **FORMATS[form])


def measure(key: Key, out: Path) -> dict[str, Any]:
    """Do the run of a key."""
    run = run_of(key["width"], key["seed"], key["model"], key["format"])
    return {"loss": number(do_job(Job(run, out)))}


def is_plain(key: Key) -> bool:
    """Whether a run is one in float32, whose directory stays for `weights`."""
    return bool(key["format"] == "float32")


def run(asked: argparse.Namespace) -> None:
    """Do the runs that are left."""
    keys = (key for key in wanted() if key["width"] <= asked.widest)
    do(keys, measure, RESULTS, asked.out, asked.minutes, asked.workers, is_plain)


def whole_numbers(bits: int, weight: Tensor, axis: int) -> Tensor:
    """`weight` as whole numbers of so many bits, one step size for each vector along `axis`, read back."""
    most = 2 ** (bits - 1) - 1
    step = weight.abs().amax(axis, keepdim=True) / most
    return (weight / step).round().clamp(-most, most) * step


KINDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "int8": lambda weight, axis: whole_numbers(8, weight, axis),
    "int4": lambda weight, axis: whole_numbers(4, weight, axis),
    "nvfp4": lambda weight, axis: to_nvfp4(weight),
}


@torch.no_grad()
def round_weights(model: Decoder, kind: str, renormalize: bool) -> None:
    """Round the blocks' matrices; renormalize: give every vector along d_model the length back that it had."""
    for module in model.modules():
        if isinstance(module, Linear) and module.role == "matrix":
            axis = 0 if module.writes else 1
            before = module.weight.norm(dim=axis, keepdim=True)
            module.weight.copy_(KINDS[kind](module.weight, axis))
            if renormalize:
                module.weight.mul_(before / module.weight.norm(dim=axis, keepdim=True))


def weights(asked: argparse.Namespace) -> None:
    """Measure the models trained in float32: their products in NVFP4, and losses with rounded or moved matrices."""
    torch.set_num_threads(1)
    for whole in filter(is_plain, wanted()):
        out, key = asked.out / name_of(whole), {name: whole[name] for name in ("width", "seed", "model")}
        if whole in left(wanted(), RESULTS) or latest_checkpoint(out) is None:
            continue
        if any(key.items() <= line.items() for line in lines(RESULTS, "weights")):
            continue
        data = open_data(read_config(out / "config.json"))
        model, tokens = load_model(out), data.held_out[0].batch[0][:8]
        found, around = measure_rounding(model, tokens), measure_sharpness(model, tokens)
        line: dict[str, Any] = {
            **key, **{what: float(np.mean([*by.values()])) for what, by in vars(found).items()}, "losses": {},
            "sharpness": {"sizes": around.sizes.tolist(), "rise": around.rise.tolist()},
        }  # fmt: skip
        for kind in (None, *KINDS):
            for renormalize in (False, True)[: 1 + (kind is not None)]:
                model = load_model(out)
                if kind is not None:
                    round_weights(model, kind, renormalize)
                label = f"{kind}{', lengths restored' * renormalize}" if kind else "float32"
                line["losses"][label] = total_loss(data, validation_losses(model, data, 16))
        add(RESULTS, line, "weights")
        print(json.dumps(line), flush=True)


def gaps(width: int, model: str, form: str, found: list[dict[str, Any]]) -> list[float]:
    """By how many percent the loss is above that in float32, seed by seed; infinite where the run diverged."""
    losses = {(r["seed"], r["format"]): r["loss"] for r in found if (r["width"], r["model"]) == (width, model)}
    both = [seed for seed in SEEDS if (seed, form) in losses and losses.get((seed, "float32"))]
    return [
        math.inf if losses[seed, form] is None else 100 * (losses[seed, form] / losses[seed, "float32"] - 1)
        for seed in both
    ]


def said(values: list[float]) -> str:
    """The mean and the standard error, where there are several."""
    if not values:
        return "not run"
    spread = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.2f}{spread} %" if np.isfinite(values).all() else "diverged"


def table() -> str:
    """The loss in float32, and how many percent above it each format ends."""
    found, rows = read("precision")["runs"], []
    for width in sorted({r["width"] for r in found}):
        for model in MODELS:
            plain = [r["loss"] for r in found if (r["width"], r["model"], r["format"]) == (width, model, "float32")]
            cells = [said(gaps(width, model, form, found)) for form in FORMATS if form != "float32"]
            rows.append([width, model, len(plain), f"{np.mean(plain):.4f}" if plain else "not run", *cells])
    heads = ["d_model", "model", "seeds", "loss in float32", *(form for form in FORMATS if form != "float32")]
    return grid(heads, rows)


def rounded_weights() -> str:
    """Of the models trained in float32: products in NVFP4, and how many percent the loss rises with
    rounded matrices.
    """
    found, rows = read("precision")["weights"], []
    for width in sorted({line["width"] for line in found}):
        for model in MODELS:
            own = [line for line in found if (line["width"], line["model"]) == (width, model)]
            if own:
                means = [
                    np.mean([line[what] for line in own]) for what in ("decibels", "correlation", "noise_correlation")
                ]
                cells = [
                    said([100 * (line["losses"][label] / line["losses"]["float32"] - 1) for line in own])
                    for label in own[0]["losses"]
                    if label != "float32"
                ]
                products = [f"{means[0]:.1f} dB", f"{1e3 * means[1]:.2f}", f"{1e3 * means[2]:.2f}"]
                rows.append([width, model, len(own), *products, *cells])
    labels = [label for label in found[0]["losses"] if label != "float32"]
    heads = [
        "d_model",
        "model",
        "seeds",
        "signal to noise",
        "correlation of products, 1e-3",
        "of errors, 1e-3",
        *labels,
    ]
    return grid(heads, rows)


def sharpness() -> str:
    """Of the models trained in float32: how many percent the loss rises where the matrices move at random."""
    found, rows = [line for line in read("precision")["weights"] if "sharpness" in line], []
    for width in sorted({line["width"] for line in found}):
        for model in MODELS:
            own = [line for line in found if (line["width"], line["model"]) == (width, model)]
            if own:
                rises = [100 * np.array(line["sharpness"]["rise"]) / line["losses"]["float32"] for line in own]
                all_ways = np.concatenate(rises)
                cells = [
                    f"{mean:+.4f} ± {spread:.4f} %"
                    for mean, spread in zip(all_ways.mean(axis=0), all_ways.std(axis=0, ddof=1), strict=True)
                ]
                rows.append([width, model, len(own), *cells])
    return grid(["d_model", "model", "seeds", *(f"{100 * size:g} %" for size in PERTURBATION_SIZES)], rows)


def draw(asked: argparse.Namespace) -> None:
    """The ratio of signal to noise over width, a dot a seed and a line through their means, into an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "precision"
    found = lines(RESULTS, "weights")
    widths = sorted({line["width"] for line in found})
    figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for model, marker in zip(MODELS, "os^", strict=True):
        points = {w: [r["decibels"] for r in found if (r["width"], r["model"]) == (w, model)] for w in widths}
        points = {width: ratios for width, ratios in points.items() if ratios}
        if points:
            (line,) = axis.plot(list(points), [np.mean(r) for r in points.values()], marker=marker, label=model)
            dots = [(width, ratio) for width, ratios in points.items() for ratio in ratios]
            axis.plot(*zip(*dots, strict=True), ".", color=line.get_color(), alpha=0.5)
    axis.set(xscale="log", xticks=widths, xticklabels=widths, xlabel="d_model", ylabel="signal to noise (dB)")
    axis.minorticks_off()
    axis.legend()
    figure.savefig(asked.out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--minutes", type=float, default=60.0)
    one.add_argument("--workers", type=int, default=2)
    one.add_argument("--widest", type=int, default=max(WIDTHS))
    one.set_defaults(do=run)
    one = commands.add_parser("weights")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(do=weights)
    one = commands.add_parser("table")
    one.set_defaults(do=lambda asked: print(table(), rounded_weights(), sharpness(), sep="\n\n"))
    one = commands.add_parser("draw")
    one.add_argument("--out", type=Path, default=RESULTS.parents[1] / "images" / "precision.svg")
    one.set_defaults(do=draw)
    asked = parser.parse_args()
    asked.do(asked)


if __name__ == "__main__":
    main()
