"""Products of an expert's rows as a router makes them, of new lengths at every step, against rows of even lengths.

    python benchmarks/grouped.py --json docs/results/grouped.json

Forward and backward of `spherelm.layers.grouped.grouped_product` on one thread; milliseconds, medians of rounds in
turn: as it is, without the rows of zeros that keep lengths few, and in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch

from spherelm.data.output import write_json
from spherelm.layers import grouped
from spherelm.runs.record import versions


def seconds(dtype: torch.dtype, ends: torch.Tensor, shape: tuple[int, int, int]) -> float:
    """Of one product and its backward pass, for groups that end at `ends`; shape: groups, out, in."""
    rows = torch.randn(int(ends[-1]), shape[2], dtype=dtype, requires_grad=True)
    weight = torch.randn(shape, dtype=dtype, requires_grad=True)
    start = time.perf_counter()
    result = grouped.grouped_product(rows, weight, ends)
    result.backward(result.detach())
    return time.perf_counter() - start


def main() -> None:
    """Time both products and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--d-ff", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (args.experts, args.d_ff, args.d_model)
    even = torch.arange(1, args.experts + 1, dtype=torch.int32) * (args.rows // args.experts)
    ways = {
        "bfloat16": (torch.bfloat16, True),
        "bfloat16, as it comes": (torch.bfloat16, False),
        "float32": (torch.float32, True),
    }
    times: dict[str, list[float]] = {f"{way}, {kind}": [] for way in ways for kind in ("new lengths", "even lengths")}
    for _ in range(args.rounds + 2):
        chosen = torch.multinomial(torch.rand(args.experts), args.rows, replacement=True)
        new = chosen.bincount(minlength=args.experts).cumsum(0).int()
        for way, (dtype, rounds_up) in ways.items():
            with patch.object(
                grouped, "wants_few_lengths", grouped.wants_few_lengths if rounds_up else lambda rows: False
            ):
                for kind, ends in (("new lengths", new), ("even lengths", even)):
                    times[f"{way}, {kind}"].append(1000 * seconds(dtype, ends, shape))
    found = {name: round(statistics.median(values[2:]), 3) for name, values in times.items()}
    for name, value in found.items():
        print(f"{name:40s} {value:8.2f} ms")
    if args.json:
        write_json(
            args.json, {"arguments": {**vars(args), "json": None}, "versions": versions(), "milliseconds": found}
        )


if __name__ == "__main__":
    main()
