"""Time of the chunked cross-entropy (forward and backward) against torch's own and against the plain one, in turn.

python benchmarks/loss.py --json docs/results/loss.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from spherelm.layers.loss import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = ((1024, 128, 4096), (2048, 384, 8192), (2048, 512, 32000))


def torch_chunked(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(h, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def plain(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight), targets)


def seconds(loss: Loss, h: Tensor, weight: Tensor, targets: Tensor) -> float:
    h.grad = weight.grad = None
    start = time.perf_counter()
    loss(h, weight, targets).backward()
    return time.perf_counter() - start


def measure(tokens: int, d_model: int, vocab: int, repeats: int) -> dict[str, float]:
    """Median over `repeats` rounds of each loss's time over ours in the same round, and our own milliseconds."""
    h = torch.randn(tokens, d_model, requires_grad=True)
    weight = (torch.randn(vocab, d_model) * 0.02).requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    arms: dict[str, Loss] = {"ours": linear_cross_entropy, "torch_chunked": torch_chunked, "plain": plain}
    rounds = [{name: seconds(loss, h, weight, targets) for name, loss in arms.items()} for _ in range(repeats + 1)][1:]
    ratios = {f"{name}_over_ours": statistics.median(r[name] / r["ours"] for r in rounds) for name in list(arms)[1:]}
    return {"ours_ms": 1000 * statistics.median(r["ours"] for r in rounds), **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for tokens, d_model, vocab in SHAPES:
        row = {
            "tokens": tokens,
            "d_model": d_model,
            "vocab": vocab,
            **measure(tokens, d_model, vocab, arguments.repeats),
        }
        print(json.dumps(row))
        rows.append(row)
    if arguments.json:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32"}
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
