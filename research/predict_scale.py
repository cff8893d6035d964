"""Print the table of docs/scale.md: what an update of nGPT 1B at 4k would cost on 8, 64 and 512 GPUs.
Nothing is measured.

    python research/predict_scale.py

Operations and memory are counted from the model's code as `spherelm train --dry-run` does; bytes sent follow from the
size of the weights; rates are those of data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spherelm.layers.linear import unit_modules
from spherelm.models import build
from spherelm.recipes import make_run
from spherelm.runs.config import RunConfig
from spherelm.train.estimate import Assumed, estimate

NODE = 8
"""GPUs of a node."""

NVLINK, NETWORK = 450e9, 50e9
"""Bytes a second that one GPU sends within its node (NVLink 4) and out of it (InfiniBand at 400
Gbit/s, one port a GPU).
"""

FLOAT32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in an update, within its node and out of it."""

    node: float
    network: float

    @property
    def seconds(self) -> float:
        """Of both, one after the other."""
        return self.node / NVLINK + self.network / NETWORK


def ring(size: float, members: int) -> float:
    """Bytes that each of `members` sends to gather, or to reduce and scatter, `size` bytes in a ring."""
    return size * (members - 1) / members


def traffic(strategy: str, gpus: int, weights: float, micro_batches: int) -> Traffic:
    """Traffic of an update: gradients are summed once;
    a model in parts is gathered forward and backward each micro-batch.
    """
    gathers = 2 * micro_batches
    if strategy == "hybrid":
        within = (gathers + 1) * ring(weights, NODE)
        return Traffic(within, 2 * ring(weights / NODE, gpus // NODE))
    times = 2 if strategy == "replicate" else gathers + 1
    sent = times * ring(weights, gpus)
    # A ring over several nodes goes at the pace of its slowest link.
    return Traffic(sent, 0.0) if gpus <= NODE else Traffic(0.0, sent)


def row(config: RunConfig, gpus: int, strategy: str) -> str:
    """One line of the table."""
    train = replace(config.train, strategy=strategy, shard_size=NODE)  # type: ignore[arg-type]
    found = estimate(replace(config, train=train), Assumed(gpus))
    sequences = found["sequences"]
    sent = traffic(strategy, gpus, FLOAT32 * found["parameters"], sequences["micro_batches_per_update"])
    compute = found["step_seconds"]
    cells = (
        f"{gpus}",
        strategy,
        f"{sequences['micro_batches_per_update']} x {sequences['micro_batch']}",
        f"{found['memory_per_device']['total'] / 2**30:.1f}",
        f"{sent.node / 1e9:.1f}",
        f"{sent.network / 1e9:.1f}",
        f"{compute:.3f}",
        f"{sent.seconds:.3f}",
        f"{max(compute, sent.seconds):.3f} to {compute + sent.seconds:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def retraction_bytes(config: RunConfig) -> int:
    """Numbers that all ranks would have to sum after each update if matrices with unit columns were
    cut across these.
    """
    with torch.device("meta"):
        model = build(config.model)
    return sum(FLOAT32 * module.weight.shape[1] for _, module, axis in unit_modules(model) if axis == 0)


def table() -> str:
    """The table and the line below it, in Markdown."""
    config = make_run("ngpt", "1b-4k", "paper", micro_batch_size=2)
    heads = ("GPUs", "strategy", "sequences a GPU", "GiB a GPU", "GB in node", "GB out of node")
    heads += ("s computing", "s sending", "s an update")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [row(config, gpus, strategy) for gpus in (8, 64, 512) for strategy in ("replicate", "shard", "hybrid")]
    other = retraction_bytes(config) / 1e6
    return "\n".join(
        [
            *lines,
            "",
            f"Assumed: {Assumed.peak_tflops:g} TFLOP/s, {100 * Assumed.mfu:g} % of it reached, "
            f"{NVLINK / 1e9:g} GB/s in a node of {NODE}, {NETWORK / 1e9:g} GB/s out of it.",
            f"Retraction: 0 bytes with the unit axis in one piece; {other:.2f} MB to sum over all ranks otherwise.",
        ]
    )


if __name__ == "__main__":
    print(table())
