"""An update waits for nothing that a device computes, and what is read late loses nothing."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spherelm.layers.linear import retract, unit_modules
from spherelm.models import build
from spherelm.optim import GatedAdamW, Muon, OptimConfig
from spherelm.optim.gated_adamw import ENTRIES_AT_ONCE
from spherelm.optim.groups import parameter_groups
from spherelm.optim.muon import TOGETHER
from spherelm.optim.rules import AdamW, Rule
from spherelm.recipes import make_run
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.runs.group import Group
from spherelm.train import diagnostics
from spherelm.train import trainer as module
from spherelm.train.guard import Diverged
from spherelm.train.trainer import Trainer

META = torch.device("meta")
RULES: dict[str, Rule] = {
    "adamw": AdamW(),
    "gated": GatedAdamW(),
    "muon": Muon(),
    "hyperball": Muon(hyperball=True),
}
"""Every optimizer."""
CASES = [(arm, rule) for arm in tiny.ARMS for rule in RULES if (arm, rule) != ("ngpt", "hyperball")]
"""With every arm, but for what has no effect on the sphere."""


class AtHome:
    """In place of `Arriving`, for tensors without numbers: ones of their shapes."""

    def __init__(self, *tensors: Tensor) -> None:
        self.shapes = [(tensor.shape, tensor.device) for tensor in tensors]

    def read(self) -> list[Tensor]:
        assert all(device == META for _, device in self.shapes)
        return [torch.ones(shape) for shape, _ in self.shapes]


@pytest.mark.row("Optimizers")
@pytest.mark.parametrize(("arm", "rule"), CASES)
def test_no_update_waits_for_the_device(
    arm: str, rule: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's own loop on the meta device, where whoever asks for a number raises:
    every part, and micro-batches.
    """
    monkeypatch.setattr(module, "Arriving", AtHome)
    monkeypatch.setattr(module, "peak_memory_mb", lambda device: 0.0)
    monkeypatch.setattr(diagnostics, "matmul_flops", lambda *_: 1.0)
    shape = {"pattern": "M-AO", "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk": 8, "n_experts": 4}
    shape |= {
        "d_model": 16,
        "n_heads": 2,
        "d_ff": 24,
        "seq_len": 16,
        "batch_size": 4,
        "micro_batch_size": 2,
        "steps": 6,
    }
    rules = {"optimizer": RULES[rule].kind} | ({"hyperball": True} if rule == "hyperball" else {})
    rules |= {"max_angle": 0.1} if arm == "ngpt" else {}
    rest: dict[str, Any] = {"dtype": "float32", "compile": False, "eval_every": 0, "lr": 1e-3, **rules}
    config = make_run(arm, "hybrid", vocab_size=tiny.VOCAB, data=str(data), **shape, **rest)
    run = Trainer(config, tmp_path / "run", group=Group(device=META))
    run.threads = None
    assert run.reads_late
    with run.held:
        for _ in range(2):
            run._step()
        run._catch_up()
    run.metrics.close()
    assert [record["step"] for record in tiny.metrics(tmp_path / "run")] == [1, 2]


def late(run: Trainer) -> Trainer:
    """The run, read as on a GPU."""
    run.reads_late = True
    return run


@pytest.mark.parametrize("fields", [{"diagnose_every": 3}, {"micro_batch_size": 2}], ids=str)
def test_what_is_read_late_is_what_is_read_at_once(fields: dict[str, Any], data: Path, tmp_path: Path) -> None:
    config = tiny.run_config("ngpt", data, save_every=3, **fields)
    loss = Trainer(config, tmp_path / "at once").run(show_progress=False)
    assert late(Trainer(config, tmp_path / "late")).run(show_progress=False) == loss
    assert tiny.metrics(tmp_path / "late") == tiny.metrics(tmp_path / "at once")
    for step in ("step-00000003", "step-00000006"):
        tiny.assert_bitwise(*(tmp_path / name / "checkpoints" / step for name in ("late", "at once")))


@pytest.mark.parametrize("saved", [1, 3])
def test_a_loss_that_is_no_number_stops_a_run_that_reads_late(
    saved: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update later at most, named by its own step; with a checkpoint due at the bad update itself, too."""
    begun, real = [], module.gradients_of_batch

    def bad_at_third(model: Any, loader: Any, step: int, *rest: Any) -> Tensor:
        begun.append(step)
        return real(model, loader, step, *rest) * (math.nan if step == 2 else 1.0)

    monkeypatch.setattr(module, "gradients_of_batch", bad_at_third)
    run = late(Trainer(tiny.run_config("ngpt", data, save_every=saved, eval_every=0), tmp_path / "run"))
    with pytest.raises(Diverged, match="the loss is nan at step 3 "):
        run.run(show_progress=False)
    assert begun == [0, 1, 2], "a checkpoint was due, which reads first"
    last = latest_checkpoint(tmp_path / "run")
    assert (last.name if last else None) == {1: "step-00000002", 3: None}[saved]
    kinds = [(record["kind"], record["step"]) for record in tiny.metrics(tmp_path / "run") if record["step"]]
    assert kinds == [("train", 1), ("train", 2), ("stop", 3)]


class Counted(TorchDispatchMode):
    """Counts the operations on a device that are begun in it: neither views, nor what makes an optimizer's state."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        on_device = any(isinstance(x, Tensor) and x.device == META for x in tree_leaves((args, kwargs)))
        if on_device and not func.is_view and name not in ("zeros_like", "promote_types", "_unsafe_view"):
            self.begun[name] += 1
        return func(*args, **(kwargs or {}))


@lru_cache
def of_0_5b(arm: str) -> nn.Module:
    """The paper's model of 0.5B parameters, with gradients."""
    with torch.device(META):
        model = build(make_run(arm, "0.5b-1k").model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    return model


def test_retraction_begins_three_operations_for_a_weight() -> None:
    """A length in two and a product; all the rest is done of all weights at once.
    Nothing is read or written twice for it.
    """
    model = of_0_5b("ngpt")
    weights = len(list(unit_modules(model)))
    assert weights == 24 * 7 + 2
    with Counted() as counted:
        retract(model)
    assert counted.begun.total() <= 3 * weights + 10


@pytest.mark.parametrize(("arm", "rule"), CASES)
def test_an_optimizer_begins_few_operations(arm: str, rule: str) -> None:
    """Some 20 for each group that it updates at once, and of a chunk of matrices of one shape
    that Muon turns some 40.
    """
    config = OptimConfig(lr=1e-3, optimizer=RULES[rule])
    model = of_0_5b(arm)
    optimizer = config.optimizer.build(model, parameter_groups(model, config), config.lr)  # without its hooks
    for group in optimizer.param_groups:
        group["foreach"] = True  # as torch does on a GPU where it cannot fuse
    with Counted() as counted:
        optimizer.step()
    bound, chunks = 0, 0
    for group in optimizer.param_groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        if group.get("muon"):
            axes = zip(group["params"], group["unit_axes"], strict=True)
            alike = Counter((parameter.shape, axis) for parameter, axis in axes)
            found = [math.ceil(count / (TOGETHER // shape.numel())) for (shape, _), count in alike.items()]
            chunks += sum(found)
            bound += 40 * sum(found) + (15 * len(sizes) if rule == "hyperball" else 0)
        else:
            bound += 20 * (2 * sum(sizes) // ENTRIES_AT_ONCE + 1 if rule == "gated" else 1)
    assert counted.begun.total() <= bound
    assert chunks < 12, "of 168 matrices"
