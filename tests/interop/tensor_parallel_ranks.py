"""Two processes that share the matrices of a model, and what one process does; run by `test_tensor_parallel.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from spherelm.interop.tensor_parallel import tensor_parallel
from spherelm.layers.linear import UnitLinear, retract
from spherelm.models import GPTConfig, NGPTConfig, build
from spherelm.models.config import ScaleSpec
from spherelm.optim import Muon, OptimConfig, build_optimizer
from spherelm.optim.groups import RateMultipliers, clip_gradients
from spherelm.sharding import gathered

SHAPE: dict[str, Any] = {"vocab_size": 23, "n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 24, "max_seq_len": 8}
ADAM, MUON = OptimConfig(lr=0.02), OptimConfig(lr=0.01, optimizer=Muon(), multipliers=RateMultipliers(matrix=2.0))
CASES = {
    "ngpt": (NGPTConfig(**SHAPE), ADAM),
    "ngpt, two key heads, tied, muon": (NGPTConfig(**SHAPE, n_kv_heads=2, tie_embeddings=True), MUON),
    "ngpt, scalars, relu2": (
        NGPTConfig(
            **SHAPE, activation="relu2", s_qk=ScaleSpec(1.0, 0.25, "scalar"), alpha=ScaleSpec(0.05, 0.25, "scalar")
        ),
        ADAM,
    ),
    "gpt": (GPTConfig(**SHAPE), ADAM),
    "gpt, qk_norm": (GPTConfig(**SHAPE, qk_norm=True, n_kv_heads=2), ADAM),
}
CUTS = {f"unit axis {axis}, cut along {cut}": (axis, cut) for axis in (0, 1) for cut in (0, 1)}


def trained(config: Any, optim: OptimConfig, mesh: Any) -> dict[str, Tensor]:
    """First logits and gradients, and the weights after three updates, all whole."""
    torch.manual_seed(0)
    model = build(config)
    if mesh is not None:
        tensor_parallel(model, mesh)
    optimizer = build_optimizer(model, optim)
    tokens = torch.randint(config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))
    found: dict[str, Tensor] = {}
    for step in range(3):
        logits = gathered(model(tokens[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        norm = clip_gradients(model, 0.5)
        if step == 0:
            found |= {"logits": logits.detach(), "norm": norm}
            found |= {f"{name}.grad": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: whole(p) for name, p in model.named_parameters()}


def whole(x: Any) -> Tensor:
    return gathered(x).detach().clone()


def retracted(axis: int, cut: int, mesh: Any) -> dict[str, Tensor]:
    """How far a weight of which each process has a part is from the one that was retracted whole, and from itself."""
    torch.manual_seed(0)
    plain, shared = (UnitLinear(6, 10, writes=axis == 0) for _ in range(2))
    weight = 3 * torch.randn(10, 6)
    plain.weight = nn.Parameter(weight.clone())
    shared.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(cut)]))
    for module in (plain, shared):
        retract(module)
    once = whole(shared.weight)
    retract(shared)
    lengths = torch.linalg.vector_norm(once.double(), dim=axis)
    return {"length": lengths - 1, "weight": once - plain.weight.detach(), "again": 1e3 * (whole(shared.weight) - once)}


def work() -> dict[str, dict[str, float]]:
    """In each of two processes: for each case the largest difference of each tensor from that of one process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    found = {}
    for name, (config, optim) in CASES.items():
        ours, theirs = trained(config, optim, mesh), trained(config, optim, None)
        assert ours.keys() == theirs.keys()
        found[name] = {key: (ours[key] - theirs[key]).abs().max().item() for key in ours}
    for name, (axis, cut) in CUTS.items():
        found[name] = {key: x.abs().max().item() for key, x in retracted(axis, cut, mesh).items()}
    return found
