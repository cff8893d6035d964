"""Hybrids through the trainer that all models go through:
learning, resuming, several processes, compilation, counting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cases import ARMS
from configs import make_config
from torch import Tensor

from spherelm import departure, load_model
from spherelm.data.loader import Loader
from spherelm.data.shards import open_tokens
from spherelm.models import LanguageModel, build
from spherelm.recipes import make_run
from spherelm.runs.config import RunConfig, read_config
from spherelm.runs.group import Group
from spherelm.runs.metrics import read_metrics
from spherelm.train.counting import flops_per_token, training_flops
from spherelm.train.estimate import activation_memory, estimate
from spherelm.train.parallel import distributed
from spherelm.train.precision import compile_blocks
from spherelm.train.trainer import train
from spherelm.train.update import gradients_of_batch

PATTERN = "MA-"
MIXER = {"mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk": 8}
both_arms = pytest.mark.parametrize("arm", ARMS)


def run_config(arm: str, data: Path | None, pattern: str = PATTERN, **overrides: Any) -> RunConfig:
    """A run of six steps in float32."""
    sizes = {"d_model": 16, "n_heads": 2, "d_ff": 24, "seq_len": 16, "batch_size": 4, "steps": 6, **MIXER}
    rest = {"eval_every": 2, "eval_windows": 6, "compile": False, "dtype": "float32", "lr": 5e-3}
    where = None if data is None else str(data)
    given = {**sizes, **rest, "pattern": pattern, **overrides}
    return make_run(arm, "hybrid", vocab_size=tiny.VOCAB, data=where, **given)


@both_arms
def test_a_run_learns_and_its_record_can_be_read(arm: str, data: Path, tmp_path: Path) -> None:
    config = run_config(arm, data, steps=30, diagnose_every=10, mask_documents=True)
    loss = train(config, tmp_path / "run", show_progress=False)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert loss < 0.8 * next(r["loss"] for r in records if r["kind"] == "val")
    model = load_model(tmp_path / "run")
    assert isinstance(model, LanguageModel)
    assert "".join(block.letters for block in model.blocks) == PATTERN
    assert departure(model) < 1e-6
    assert read_config(tmp_path / "run" / "config.json") == config
    alphas = [found for r in records if (found := {n: len(v) for n, v in r.items() if n.startswith("alpha_")})]
    assert bool(alphas) == (arm == "ngpt")
    names = {"alpha_A": "A", "alpha_M": "-", "alpha_mixer": "M"}
    assert all(alpha == {n: PATTERN.count(letter) for n, letter in names.items()} for alpha in alphas)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(data: Path, tmp_path: Path) -> None:
    """Of the baseline; of nGPT, `test_support.py` runs it."""
    tiny.assert_resumes(run_config("gpt", data, save_every=2), tmp_path)


@both_arms
def test_operations_by_rule_are_fewer_than_those_of_a_step(arm: str) -> None:
    """Layers of one letter are counted once; the rule leaves out what a state space computes between its matrices."""
    config = run_config(arm, None, "MAM-").model
    model = build(config)
    attention = 12 * 16 * 16
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert flops_per_token(model, 16) == 6 * matrices + attention
    assert 1 < training_flops(config, 2, 16) / (2 * 16 * flops_per_token(model, 16)) < 2


@both_arms
def test_a_dry_run_tells_what_layers_of_several_kinds_take(arm: str) -> None:
    config = run_config(arm, None)
    found = estimate(config)
    assert found["parameters"] == sum(p.numel() for p in build(config.model).parameters())
    one, two = (
        activation_memory(run_config(arm, None, pattern).model, 4, 16, torch.float32)["activations"]
        for pattern in ("MA-", "MA-MA-")
    )
    h = 4 * 16 * 16 * 4
    assert two - h == 2 * (one - h)


@tiny.compiles
def test_a_mixer_compiled_in_bfloat16_computes_what_an_eager_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    """At sizes of whole tiles, where a compiler's transposed reads of 16 bits gave garbage;
    with and without gradients.
    """
    from torch._inductor import config as inductor

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "pattern": "M",
        "n_layers": 1,
        "d_model": 64,
        "n_heads": 1,
        "max_seq_len": 128,
        "vocab_size": 64,
    }
    model = build(make_config("ngpt", **shape))
    model.runtime.compute_dtype = torch.bfloat16
    tokens = torch.randint(64, (2, 129))

    def loss() -> Tensor:
        return model.loss(tokens[:, :-1], tokens[:, 1:])

    def without_gradients() -> float:
        with torch.no_grad():
            return loss().item()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    eager, wanted = without_gradients(), gradients()
    with inductor.patch(compile_threads=1):
        compile_blocks(model, gradients)
        compiled, found = without_gradients(), gradients()
    torch.compiler.reset()
    assert capsys.readouterr().err == "", "it did compile"
    assert compiled == pytest.approx(eager, rel=2e-3)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 0.2 * gradient.norm(), name


@tiny.compiles
def test_a_compiled_mixer_has_the_gradients_of_an_eager_one(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import config as inductor

    model = build(run_config("ngpt", data, "M").model)
    loader = Loader(open_tokens(data, "train"), seq_len=16, batch_size=4, seed=0)
    losses, found = [], []
    for compiled in (False, True):
        with inductor.patch(compile_threads=1):
            if compiled:
                compile_blocks(model, lambda: gradients_of_batch(distributed(model, Group()), loader, 0))
            model.zero_grad()
            losses.append(gradients_of_batch(distributed(model, Group()), loader, 1).sum().item())
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.compiler.reset()
    assert capsys.readouterr().err == "", "it did compile"
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-8, name
