"""Two processes that train a sharded model, and what one process does with the same gradients;
run by `test_sharded.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

sys.path.append(str(Path(__file__).parents[1]))

from cases import model_with_experts

from spherelm.layers.linear import retract
from spherelm.models import GPTConfig, NGPTConfig, build
from spherelm.optim import GatedAdamW, Muon, OptimConfig, build_optimizer
from spherelm.optim.groups import RateMultipliers, set_rate
from spherelm.runs.group import Group
from spherelm.sharding import gathered, is_sharded
from spherelm.train.parallel import Ranks, distributed

CONFIG = NGPTConfig(vocab_size=23, n_layers=2, d_model=16, n_heads=2, d_ff=26, max_seq_len=8)
PLAIN = GPTConfig(vocab_size=23, n_layers=2, d_model=16, n_heads=2, d_ff=26, max_seq_len=8)
CAP: dict[str, Any] = {"max_angle": 0.03, "angle_follows_lr": True}
OPTIMS = {
    "adamw": OptimConfig(lr=0.1, **CAP),
    "gated": OptimConfig(lr=0.1, optimizer=GatedAdamW(eps_gate=0.5), **CAP),
    "muon": OptimConfig(lr=0.01, optimizer=Muon(), multipliers=RateMultipliers(matrix=5.0)),
    "muon, capped": OptimConfig(lr=0.01, optimizer=Muon(), multipliers=RateMultipliers(matrix=5.0), **CAP),
    "hyperball": OptimConfig(lr=0.01, optimizer=Muon(hyperball=True), multipliers=RateMultipliers(matrix=5.0)),
}
EXPERTS = {f"experts, {name}": OPTIMS[name] for name in ("adamw", "muon, capped")}
"""With a mixture of experts in place of each MLP:
six are cut between experts, of five with d_ff even each expert is.
"""
SPREADS = ("replicate", "shard", "shard, recompute", "shard, loss")
"""How two processes train a model with experts on a batch that one process sees whole."""
STEPS = 3


def gradient(step: int, index: int, shape: torch.Size) -> torch.Tensor:
    """The same on every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + index))


def is_plain(optim: OptimConfig) -> bool:
    """Whether it is an optimizer of matrices that are not on the sphere."""
    return isinstance(optim.optimizer, Muon) and optim.optimizer.hyperball


def weights_after(optim: OptimConfig, shard: bool, n_experts: int = 0) -> list[torch.Tensor]:
    """Whole weights after a few optimizer steps by made-up gradients."""
    torch.manual_seed(0)
    model = model_with_experts(n_experts=n_experts) if n_experts else build(PLAIN if is_plain(optim) else CONFIG)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if shard and n_experts:
        distributed(model, Ranks(dist.get_rank(), dist.get_world_size(), mesh=mesh))
    elif shard:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, optim)
    for step in range(STEPS):
        set_rate(optimizer, optim.lr / (step + 1))
        for index, p in enumerate(model.parameters()):
            g = gradient(step, index, p.shape)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if is_sharded(p) else g
        optimizer.step()
    before = [whole(p).clone() for p in model.parameters()]
    retract(model)
    assert all(torch.equal(a, whole(b)) for a, b in zip(before, model.parameters(), strict=True)), "retracted already"
    return before


def trained(how: str, alone: bool) -> dict[str, torch.Tensor]:
    """Weights, biases of routers and what they counted, after a few updates of a model with experts."""
    torch.manual_seed(0)
    rank, world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    mesh = None if alone or how == "replicate" else init_device_mesh("cpu", (world_size,))
    group = Group() if alone else Ranks(rank, world_size, mesh=mesh)
    model = model_with_experts(balance="loss" if "loss" in how else "bias", coefficient=0.0)
    laid = distributed(model, group, recompute="recompute" in how)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01, balance_rate=0.02), group.summed)
    tokens = torch.randint(23, (4, 9), generator=torch.Generator().manual_seed(1))[rank::world_size]
    for _ in range(STEPS):
        for number, part in enumerate(tokens.split(1)):
            with laid.last(number == len(tokens) - 1):
                (laid.loss(part[:, :-1], part[:, 1:]) / len(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name: whole(p) for name, p in model.named_parameters()}
    return found | {name: buffer.double() for name, buffer in model.named_buffers()}


def whole(p: torch.Tensor) -> torch.Tensor:
    return gathered(p).detach()


def work() -> dict[str, list[float]]:
    """In each of two processes: for each optimizer, the largest difference of any weight from that of one process."""
    found = {}
    for name, optim in OPTIMS.items():
        pairs = zip(weights_after(optim, shard=True), weights_after(optim, shard=False), strict=True)
        found[name] = [(a - b).abs().max().item() for a, b in pairs]
    for name, optim in EXPERTS.items():
        for n in (6, 5):
            pairs = zip(weights_after(optim, True, n), weights_after(optim, False, n), strict=True)
            found[f"{n} {name}"] = [(a - b).abs().max().item() for a, b in pairs]
    for how in SPREADS:
        ours, theirs = trained(how, alone=False), trained(how, alone=True)
        assert ours.keys() == theirs.keys()
        assert all(load.sum() == 2 * 4 * 8 for name, load in ours.items() if name.endswith("seen")), "all choices"
        found[how] = [(ours[name] - theirs[name]).abs().max().item() for name in ours]
    return found
