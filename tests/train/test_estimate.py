"""A dry run's estimate against a real step: operations by rule, bytes by the allocator's own account."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from cases import D_FF, E, config_of, hybrid_config, model_with_experts
from torch.profiler import ProfilerActivity, profile

from spherelm.layers.loss import linear_cross_entropy
from spherelm.models import Config, build, parameter_count
from spherelm.optim import RULES, build_optimizer
from spherelm.recipes import changed, make_run
from spherelm.train import counting
from spherelm.train.counting import block_costs, counted_flops, flops_per_token, readout_cost, training_flops
from spherelm.train.estimate import (
    Assumed,
    activation_memory,
    compute_dtype,
    estimate,
    estimate_table,
    memory_per_device,
    micro_batches,
    parameters_by_role,
)

both_arms = pytest.mark.parametrize("arm", tiny.ARMS)
SHAPES: list[dict[str, Any]] = [
    {"n_layers": 3, "d_model": 64, "n_heads": 4, "seq_len": 128, "vocab_size": 512},
    {"n_layers": 6, "d_model": 64, "n_heads": 4, "seq_len": 128, "vocab_size": 4096},
    {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "seq_len": 64, "vocab_size": 1000},
]


def model_config(arm: str, **fields: Any) -> Config:
    return make_run(arm, "demo", lr=1e-3, **fields).model


def sums(arm: str, config: Config) -> int:
    """Operations a token that the rule leaves out: gradients of nGPT's alphas are sums over tokens,
    done as products with 1.
    """
    return 4 * config.n_layers * config.d_model if arm == "ngpt" else 0


@both_arms
@pytest.mark.parametrize("fields", SHAPES)
def test_operations_are_those_of_the_rule(arm: str, fields: dict[str, Any]) -> None:
    """6N + 12 L d T (Chowdhery et al. 2022, appendix B), where N counts the weights of matrix products."""
    config, seq = model_config(arm, **fields), fields["seq_len"]
    d, layers, d_k = config.d_model, config.n_layers, config.d_model // config.n_heads
    kv = (config.n_kv_heads or config.n_heads) * d_k
    products = layers * (2 * d * d + 2 * d * kv + 3 * d * 4 * d) + d * config.vocab_size
    rule = 6 * products + 12 * layers * d * seq
    assert training_flops(config, 5, seq) == 5 * seq * (rule + sums(arm, config))
    assert flops_per_token(build(config), seq) == rule


@both_arms
@pytest.mark.parametrize("kind", ["decoder", "encdec", "encoder", "hybrid"])
def test_operations_are_those_of_a_real_step(arm: str, kind: str) -> None:
    """Counted while real numbers are computed, backward too, with the loss that is its own autograd function."""
    config = hybrid_config(arm) if kind == "hybrid" else config_of(arm, kind, n_layers=3)
    read = [torch.randint(37, (2, 16)) for _ in range(3 if kind == "encdec" else 2)]
    with counted_flops() as counter:
        build(config).loss(*read).backward()
    assert counter.get_total_flops() == training_flops(config, 2, 16)


@both_arms
def test_encoder_decoders_are_counted_where_both_are_equally_deep(arm: str) -> None:
    config = config_of(arm, "encdec", n_encoder_layers=None)
    assert training_flops(config_of(arm, "encdec", n_encoder_layers=2), 2, 16) == training_flops(config, 2, 16)
    for n in (1, 3):
        with pytest.raises(ValueError, match="only for encoder-decoders with n_encoder_layers=n_layers"):
            training_flops(config_of(arm, "encdec", n_encoder_layers=n), 2, 16)


@both_arms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_experts_those_count_that_a_token_meets(arm: str, dtype: torch.dtype) -> None:
    """Whether torch's kernel multiplies their matrices, or the loop."""
    model, tokens = model_with_experts(arm, top_k=2).to(dtype), torch.randint(23, (2, 8))
    with counted_flops() as counter:
        model.loss(tokens, tokens).backward()
    d, d_ff, n_experts, layers, vocab = 16, D_FF, E, 2, 23
    products = layers * (4 * d * d + 2 * 3 * d * d_ff + n_experts * d) + d * vocab
    rule = 6 * products + 12 * layers * d * 8
    assert flops_per_token(model, 8) == rule
    assert counter.get_total_flops() == 16 * (rule + (4 * layers * d if arm == "ngpt" else 0))


def allocated(run: Callable[[], None]) -> int:
    """The most bytes that `run` holds at once, by the account of torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert live == 0, "a step that adds to gradients leaves nothing behind"
    return peak


@pytest.mark.row("Dry runs")
@both_arms
@pytest.mark.parametrize("fields", SHAPES)
def test_memory_is_what_a_real_step_holds(arm: str, fields: dict[str, Any]) -> None:
    """Within 2 %: kernels take room of their own, of which nothing is known outside."""
    config = model_config(arm, **fields)
    model, tokens = build(config), torch.randint(fields["vocab_size"], (4, fields["seq_len"]))

    def step() -> None:
        model.loss(tokens, tokens).backward()

    step()
    expected = sum(activation_memory(config, 4, fields["seq_len"], torch.float32).values())
    assert expected == pytest.approx(allocated(step), rel=0.02)


@both_arms
def test_recomputed_blocks_hold_what_they_hold(arm: str) -> None:
    config = model_config(arm, **SHAPES[1])
    model, tokens = build(config), torch.randint(4096, (4, 128))

    def run(block: Any, *inputs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    def step() -> None:
        features, weight, pullback = model.readout(model.trunk(model.embedded(tokens), run=run))
        linear_cross_entropy(features.flatten(0, 1), weight, tokens.flatten(), pullback).backward()

    step()
    expected = sum(activation_memory(config, 4, 128, torch.float32, recompute=True).values())
    assert expected == pytest.approx(allocated(step), rel=0.05)


@both_arms
def test_the_straight_line_through_two_counts_is_the_count(arm: str) -> None:
    """Of the read-out, at a number of tokens that is counted whole as well."""
    config = model_config(arm, n_layers=1, d_model=64, n_heads=4, seq_len=64, vocab_size=32000)
    tokens = 7 * 131
    counted = counting._readout_cost(config, tokens, torch.bfloat16)
    assert vars(readout_cost(config, tokens, torch.bfloat16)) == pytest.approx(vars(counted), rel=1e-3)


@pytest.mark.row("Dry runs")
@pytest.mark.parametrize(
    ("arm", "preset"), [("gpt", "0.5b-1k"), ("ngpt", "0.5b-8k"), ("gpt", "1b-4k"), ("ngpt", "1b-1k")]
)
def test_a_run_of_the_paper_can_be_told_beforehand(arm: str, preset: str) -> None:
    config = make_run(arm, preset, "paper")
    found = estimate(changed(config, {"strategy": "hybrid", "recompute": True}), Assumed(64))
    assert json.loads(json.dumps(found)) == found
    assert sum(found["parameters_by_role"].values()) == found["parameters"]
    size, context = preset.split("-")
    assert found["parameters"] == parameter_count(config.model)
    assert found["tokens"] == pytest.approx(52e9, rel=1e-3)
    layers, d = (24, 1024) if size == "0.5b" else (36, 1280)
    rule = 6 * (16 * d * d * layers + 32000 * d) + 12 * layers * d * config.train.seq_len + sums(arm, config.model)
    assert found["flops"] == pytest.approx(rule * found["tokens"])
    assert found["hours"] == pytest.approx(found["flops"] / (64 * 989e12 * 0.4) / 3600)
    assert 2 < found["memory_per_device"]["total"] / 2**30 < 25
    assert f"{found['parameters']:,}" in estimate_table(found)
    assert context in estimate_table(found)


def test_the_base_of_nugpt_is_told_and_of_others_there_is_none() -> None:
    runs = [make_run("ngpt", "0.3m", recipe, vocab_size=64) for recipe in ("nugpt", "paper")]
    told, base = [estimate_table(estimate(run)) for run in runs], runs[0].base
    assert base is not None
    assert f"base: d_model={base.d_model}, n_layers={base.n_layers}, steps={base.steps}" in told[0]
    assert "base:" not in told[1]


@pytest.mark.parametrize("optimizer", RULES)
def test_moments_are_what_the_optimizer_keeps(optimizer: str) -> None:
    run = make_run("ngpt", "demo", lr=1e-3, optimizer=optimizer, vocab_size=50, seq_len=8, n_layers=2, d_model=16)
    model = build(run.model)
    updater = build_optimizer(model, run.optim)
    model.loss(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
    updater.step()
    kept = [v for state in updater.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim]
    memory = memory_per_device(run)
    assert memory["moments"] == sum(v.numel() * v.element_size() for v in kept)
    assert memory["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert memory["gradients"] == memory["weights"]
    assert memory["total"] == sum(size for kind, size in memory.items() if kind != "total")


def test_spreading_divides_what_it_says() -> None:
    run = make_run("ngpt", "0.5b-1k", "paper")
    alone, replicated, sharded, hybrid = (
        memory_per_device(changed(run, {"strategy": strategy}), devices)
        for devices, strategy in ((1, "replicate"), (64, "replicate"), (64, "shard"), (64, "hybrid"))
    )
    assert replicated == alone
    for kind in ("weights", "gradients", "moments"):
        assert sharded[kind] == pytest.approx(alone[kind] / 64, abs=1)
        assert hybrid[kind] == pytest.approx(alone[kind] / 8, abs=1)
    assert "gathered" not in replicated
    assert hybrid["gathered"] == sharded["gathered"] > 0
    assert {m["activations"] for m in (alone, replicated, sharded, hybrid)} == {alone["activations"]}
    assert micro_batches(run.train, 64) == (8, 1)
    assert micro_batches(run.train, 8) == (8, 8)
    assert micro_batches(run.train, 512) == (1, 1)
    assert micro_batches(replace(run.train, batch_size=24, micro_batch_size=8), 2) == (6, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: Assumed(0), "world_size must be more than 0, got 0"),
        (
            lambda run: memory_per_device(changed(run, {"strategy": "hybrid"}), 12),
            "--shard-size 8 does not divide the 12",
        ),
        (lambda run: estimate(run, Assumed(3)), "batch_size=512 cannot be shared by 3 processes"),
        (lambda run: Assumed(mfu=40), r"--mfu must lie in \(0, 1\].*got 40"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(make_run("ngpt", "0.5b-1k", "paper"))


def test_counting_costs_no_memory_and_no_randomness() -> None:
    config, before = model_config("ngpt", **SHAPES[0]), torch.get_rng_state()
    parameters_by_role(config)
    block_costs(config, 3, 32, compute_dtype("auto"))
    assert torch.equal(torch.get_rng_state(), before)
