"""Loss, perplexity, error of the logits, departure from the sphere
and memory of trained models in smaller number formats.

python benchmarks/quantization.py runs/demo/gpt-0 runs/demo/ngpt-0 --json docs/results/quantization.json

Held-out text: evenly spaced windows of the shipped validation text. In bfloat16 and float16 weights and computation are
in that format; int8 weights are computed with in float32. "renormalized" puts the rounded vectors back on the sphere:
for int8 in the step sizes, for the others by `retract`, whose result is rounded again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from spherelm import departure, load_model, retract
from spherelm.data.corpus import shipped_directory
from spherelm.data.loader import validation_windows
from spherelm.data.shards import open_tokens
from spherelm.evaluate.perplexity import mean_loss
from spherelm.generation.quantization import quantized, weight_bytes
from spherelm.layers.linear import unit_modules
from spherelm.models import Decoder


def variants(run: Path) -> Iterator[tuple[str, bool, Decoder]]:
    """(format, whether renormalized, model) of what is compared; the first is the model as it was trained."""
    model = load_model(run)
    has_unit_weights = any(True for _ in unit_modules(model))
    yield "float32", False, model
    yield "int8", False, quantized(model, renormalize=False)
    if has_unit_weights:
        yield "int8", True, quantized(model)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        yield name, False, load_model(run, dtype)
        if has_unit_weights:
            rounded = load_model(run, dtype)
            retract(rounded)
            yield name, True, rounded


@torch.no_grad()
def measure(run: Path, tokens: Tensor, targets: Tensor) -> Iterator[dict[str, object]]:
    """One record for each variant. The logits are compared on the first 8 windows."""
    exact: Tensor | None = None
    for name, renormalized, model in variants(run):
        logits = model(tokens[:8]).float()
        exact = logits if exact is None else exact
        loss = mean_loss(model, tokens, targets, 8)
        yield {
            "run": run.name,
            "format": name,
            "renormalized": renormalized,
            "loss": loss,
            "perplexity": math.exp(loss),
            "logit_error_max": (logits - exact).abs().max().item(),
            "logit_error_rms": (logits - exact).square().mean().sqrt().item(),
            "departure": departure(model),
            "weight_bytes": weight_bytes(model),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    length = load_model(arguments.runs[0]).config.max_seq_len
    tokens, targets = validation_windows(open_tokens(shipped_directory(), "val"), length, arguments.windows)
    rows = []
    for run in arguments.runs:
        for row in measure(run, tokens, targets):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json:
        record = {"torch": torch.__version__, "windows": arguments.windows, "window_tokens": length, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
