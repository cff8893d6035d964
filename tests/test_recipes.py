"""Named runs: the paper's sizes are the paper's, each field reaches its config, and what is unknown is named."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from configs import fields_by_path

from spherelm import recipes
from spherelm.layers.moe import idle_weights
from spherelm.models import NGPTConfig, Variant, build, parameter_count
from spherelm.optim import OptimConfig, RateMultipliers, ScheduleConfig, build_optimizer
from spherelm.optim.rules import AdamW, GatedAdamW
from spherelm.optim.schedule import factor
from spherelm.optim.transfer import BaseShape
from spherelm.recipes import (
    ABLATIONS,
    PRESETS,
    RECIPES,
    WAYS,
    Choices,
    Preset,
    changed,
    distinct,
    make_run,
    recipe_names,
    run_from,
)
from spherelm.runs.config import from_dict, to_dict

both_arms = pytest.mark.parametrize("arm", tiny.ARMS)


@pytest.mark.parametrize(
    ("size", "arm", "millions"),
    [("0.5b", "gpt", 468.2), ("0.5b", "ngpt", 468.4), ("1b", "gpt", 1025.7), ("1b", "ngpt", 1026.1)],
)
def test_the_papers_models_have_the_papers_parameter_counts(size: str, arm: str, millions: float) -> None:
    """The paper cuts its numbers off after one digit."""
    count = parameter_count(make_run(arm, f"{size}-1k", "paper").model)
    assert count // 100_000 == round(10 * millions)


@pytest.mark.parametrize(("context", "tokens"), [("1k", 1024), ("4k", 4096), ("8k", 8192)])
@pytest.mark.parametrize("size", ["0.5b", "1b"])
def test_the_papers_runs_have_the_papers_batches(size: str, context: str, tokens: int) -> None:
    train = make_run("ngpt", f"{size}-{context}", "paper").train
    assert (train.seq_len, train.batch_size) == (tokens, 512)
    assert train.steps * 512 * tokens == pytest.approx(52e9, rel=1e-3)


@both_arms
def test_the_papers_recipe_is_tables_2_and_3(arm: str) -> None:
    run = make_run(arm, "0.5b-1k", "paper")
    warmup = 2000 if arm == "gpt" else 0
    assert run.schedule == ScheduleConfig("cosine", warmup_steps=warmup, final=0.0)
    assert run.optim == OptimConfig(1e-3, AdamW(betas=(0.9, 0.95), eps=1e-8), weight_decay=None, grad_clip=1.0)
    if arm == "ngpt":
        names = ("alpha", "s_qk", "s_u", "s_v", "s_z")
        assert [getattr(run.model, name).init for name in names] == [0.05, 1, 1, 1, 1]
        assert [getattr(run.model, name).scale for name in names] == [None, None, 1, 1, None]


@pytest.mark.parametrize(
    ("preset", "total", "active"), [("1.2b-8k", (1.2e9, 1.3e9), 0), ("30b-8k", (30e9, 33e9), (3e9, 4.1e9))]
)
def test_the_four_bit_papers_shapes_are_as_large_as_they_are_called(preset: str, total: Any, active: Any) -> None:
    """And the run as long: a trillion tokens of 122 million sequences."""
    run = make_run("ngpt", preset, "nvfp4-paper")
    count = parameter_count(run.model)
    assert total[0] < count < total[1]
    assert run.train.steps * run.train.batch_size == pytest.approx(122e6, rel=1e-5)
    assert run.train.steps * run.train.batch_size * run.train.seq_len == pytest.approx(1e12, rel=1e-3)
    if active:
        with torch.device("meta"):
            assert active[0] < count - idle_weights(build(run.model)) < active[1]
    else:
        assert (run.model.d_k, run.model.kv_heads, run.model.ff_width) == (128, 4, 6144)


@pytest.mark.parametrize(("preset", "peak"), [("1.2b-8k", 3e-4), ("30b-8k", 5e-4)])
def test_the_four_bit_papers_recipe(preset: str, peak: float) -> None:
    """Constant to 85 % of the run, then 1 - sqrt down to 1.2e-5 from 3e-4; Adam without decay, clipped at 1."""
    run = make_run("ngpt", preset, "nvfp4-paper")
    model: Any = run.model
    assert run.optim == OptimConfig(peak, AdamW(betas=(0.9, 0.95)), weight_decay=None, grad_clip=1.0)
    assert model.variant == Variant(inner_norm=True)
    assert (model.alpha.init, model.s_u.scale) == (0.05, 1)
    stored = [model.learned(spec, 1).scale for spec in (model.alpha, model.s_qk, model.s_z)]
    assert stored == pytest.approx([model.d_model**-0.5] * 3)
    rates = [peak * factor(run.schedule, step, 1000) for step in (0, 849, 850, 1000)]
    assert rates == pytest.approx([peak, peak, peak, peak * 1.2e-5 / 3e-4])
    halfway = run.schedule.final + (1 - run.schedule.final) * (1 - 0.5**0.5)
    assert factor(run.schedule, 925, 1000) == pytest.approx(halfway)
    gpt = make_run("gpt", preset, "nvfp4-paper")
    assert (gpt.model.activation, gpt.model.ff_width) == (model.activation, model.ff_width), "the same shape"


def test_a_run_that_begins_with_weights_keeps_their_shape_under_any_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset that says more of a shape than its sizes does not reach into the model that is there."""
    model = make_run("ngpt", "demo", vocab_size=9).model
    monkeypatch.setattr("spherelm.recipes.named.read_model_config", lambda source: model)
    run = run_from(Path("there"), None, "1.2b-8k")
    assert run.model == dataclasses.replace(model, max_seq_len=run.train.seq_len)


@pytest.mark.parametrize(("steps", "warmup"), [(100_000, 2000), (20_000, 2000), (19_990, 1999), (300, 30), (9, 0)])
def test_a_short_run_warms_up_over_a_tenth(steps: int, warmup: int) -> None:
    for recipe in ("paper", "law"):
        assert make_run("gpt", "demo", recipe, vocab_size=9, steps=steps).schedule.warmup_steps == warmup
        assert make_run("ngpt", "demo", recipe, vocab_size=9, steps=steps).schedule.warmup_steps == 0


def differences(one: Any, other: Any) -> set[str]:
    """The fields in which two configs differ."""
    ours, theirs = fields_by_path(one), fields_by_path(other)
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


@pytest.mark.row("Sizes")
@pytest.mark.row("Recipes")
@both_arms
def test_every_named_run_can_be_made(arm: str) -> None:
    for preset, recipe in product(PRESETS, WAYS):
        run = make_run(arm, preset, recipe, vocab_size=PRESETS[preset].vocab_size or 4096)
        assert (run.arm, run.preset, run.recipe) == (arm, preset, recipe)
        assert run.model.max_seq_len == run.train.seq_len


@pytest.mark.parametrize("recipe", WAYS)
@both_arms
def test_a_preset_is_a_shape_and_a_length_and_nothing_else(arm: str, recipe: str) -> None:
    """No choice is looked up by a preset's name: one preset with the sizes of another makes the other's run."""
    size = PRESETS["1m"]
    sizes = {name: getattr(size, name) for name in ("d_model", "n_layers", "n_heads", "seq_len", "batch_size", "steps")}
    own, other = (
        make_run(arm, preset, recipe, vocab_size=9, **fields) for preset, fields in (("1m", {}), ("demo", sizes))
    )
    assert (own.model, own.optim, own.schedule, own.base) == (other.model, other.optim, other.schedule, other.base)


def test_overrides_reach_their_configs() -> None:
    run = make_run(
        "ngpt", vocab_size=99, data="text", lr=0.5, steps=7, seq_len=32, batch_size=6, micro_batch_size=3, seed=4,
        dtype="bfloat16", compile=True, eval_every=9, save_every=8, keep=5, n_layers=2, d_model=64, n_heads=4,
        n_kv_heads=2, d_ff=77, tie_embeddings=True, grad_clip=2.0, weight_decay=0.3, betas=(0.8, 0.9), **{"s_qk.scale": 0.5},
    )  # fmt: skip
    train, optim = run.train, run.optim
    model: Any = run.model
    assert (train.steps, train.seq_len, train.batch_size, train.micro_batch_size, train.seed) == (7, 32, 6, 3, 4)
    assert (train.dtype, train.compile, train.eval_every, train.save_every, train.keep) == ("bfloat16", True, 9, 8, 5)
    assert (model.vocab_size, model.n_layers, model.d_model, model.n_heads, model.n_kv_heads) == (99, 2, 64, 4, 2)
    assert (model.d_ff, model.tie_embeddings, model.max_seq_len, model.s_qk.scale) == (77, True, 32, 0.5)
    assert run.optim.optimizer.momentum == 0.75, "the recipe sees the length that was asked for"  # type: ignore[union-attr]
    assert (optim.lr, optim.grad_clip, optim.weight_decay, optim.optimizer.betas) == (0.5, 2.0, 0.3, (0.8, 0.9))
    assert run.data == "text"


def test_none_is_a_value_of_a_field_that_may_have_none() -> None:
    run = make_run("ngpt", recipe="training-ngpt", vocab_size=9, max_angle=None, grad_clip=None, angle_follows_lr=False)
    assert (run.optim.max_angle, run.optim.grad_clip) == (None, None)
    for name, kind in (
        ("steps", "a valid integer"),
        ("dtype", "'auto'.*"),
        ("compile", "a valid boolean"),
        ("rho", "a valid number"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*{kind}, got None"):
            make_run("ngpt", vocab_size=9, **{name: None})


@pytest.mark.parametrize(
    ("arm", "recipe", "fields", "needed"),
    [
        (
            "gpt",
            "law",
            {"max_angle": 0.1},
            "max_angle has no effect in gpt by 'law': it needs an arm on the sphere",
        ),
        (
            "ngpt",
            "law",
            {"hyperball": True},
            "hyperball has no effect in ngpt by 'law': it needs an arm that is not on the",
        ),
        (
            "ngpt",
            "paper",
            {"hyperball": True},
            "hyperball is a field of the optimizer muon, and this run has adamw: leave it out",
        ),
        ("ngpt", "paper", {"angle_follows_lr": True}, "it needs a max_angle"),
        ("ngpt", "paper", {"momentum": 0}, "momentum is a field of the optimizer muon, and this run has adamw"),
        ("gpt", "nugpt", {"base_steps": 9}, "it needs recipe 'nugpt' and an arm on the sphere"),
        ("ngpt", "paper", {"base_steps": 9}, "it needs recipe 'nugpt' and an arm on the sphere"),
        ("ngpt", "law", {"eps_gate": 1e-6}, "eps_gate is a field of the optimizer gated_adamw, and this run has muon"),
        ("ngpt", "paper", {"rho": 0.3}, "it needs schedule=log"),
        ("ngpt", "training-ngpt", {"decay_fraction": 0.3}, "it needs schedule=wsd"),
        (
            "ngpt",
            "paper",
            {"gain_rate": 2},
            "gain_rate has no effect in ngpt by 'paper': it needs parameters of the role gain",
        ),
        ("gpt", "paper", {"scale_rate": 2}, "it needs parameters of the role scale"),
        ("gpt", "paper", {"router_rate": 2}, "it needs parameters of the role router"),
        (
            "gpt",
            "paper",
            {"pattern": "AO", "balance": "loss", "balance_rate": 0.1},
            "a pattern with O and balance=bias",
        ),
        ("ngpt", "paper", {"balance_rate": 0.1}, "it needs a pattern with O and balance=bias"),
    ],
)
def test_a_field_that_would_change_nothing_is_refused(
    arm: str, recipe: str, fields: dict[str, Any], needed: str
) -> None:
    with pytest.raises(ValueError, match=needed):
        make_run(arm, "demo", recipe, vocab_size=9, lr=0.01, **fields)


@pytest.mark.parametrize(("batch_size", "largest"), [(2, 2), (12, 6), (20, 5), (11, 1), (512, 8)])
def test_the_micro_batch_of_a_preset_is_an_upper_limit(batch_size: int, largest: int) -> None:
    run = make_run("gpt", "0.5b-1k", "paper", batch_size=batch_size, lr=1e-3)
    assert run.train.micro_batch_size == largest
    assert changed(make_run("gpt", "0.5b-1k", "paper"), {"batch_size": batch_size}) == run
    with pytest.raises(ValueError, match=f"micro_batch_size=1024 does not divide batch_size={batch_size}"):
        make_run("gpt", "0.5b-1k", "paper", batch_size=batch_size, micro_batch_size=1024)


def test_a_choice_that_is_switched_off_is_let_pass_where_it_could_not_act() -> None:
    off: dict[str, Any] = {"hyperball": False, "max_angle": None}
    assert make_run("gpt", vocab_size=9, **off) == make_run("gpt", vocab_size=9)


def test_hyperball_changes_the_matrices_of_the_baseline_alone() -> None:
    """They turn by nGPT's angle, without decay; every other role keeps its rate and its decay."""
    found = {}
    for arm, recipe in (("gpt", "law"), ("gpt", "hyperball"), ("ngpt", "law")):
        run = make_run(arm, "0.3m", recipe, vocab_size=9, steps=2000)
        groups = build_optimizer(build(run.model), run.optim).param_groups
        found[arm, recipe] = {group["role"]: (group["lr"], group["lr"] * group["weight_decay"]) for group in groups}
    law, ball = found["gpt", "law"], found["gpt", "hyperball"]
    assert ball.pop("matrix") == pytest.approx((found["ngpt", "law"]["matrix"][0], 0.0))
    for role, rates in ball.items():
        assert rates == pytest.approx(law[role]), role
    assert make_run("ngpt", "demo", "hyperball", vocab_size=9).optim == make_run("ngpt", "demo", vocab_size=9).optim


def test_the_baseline_of_the_ablations_is_trained_once() -> None:
    choices = [
        {"arm": arm, "recipe": recipe} for recipe in ("paper", "no-qk-norm", "riemannian") for arm in ("gpt", "ngpt")
    ]
    left = [(choice["arm"], choice["recipe"]) for choice in distinct(choices)]
    assert left == [("gpt", "paper"), ("ngpt", "paper"), ("ngpt", "no-qk-norm"), ("ngpt", "riemannian")]
    alone = distinct([{"arm": "gpt", "recipe": "riemannian"}])
    assert alone == [{"arm": "gpt", "recipe": "paper"}], "it is the paper's baseline, under its name"


def test_an_explicit_init_beats_the_recipes() -> None:
    model: Any = make_run("ngpt", vocab_size=9, **{"alpha.init": 0.123}).model
    assert model.alpha.init == 0.123


@pytest.mark.parametrize(
    ("arm", "preset", "recipe", "fields", "message"),
    [
        ("bert", "demo", "law", {}, "unknown arm 'bert': choose one of gpt, ngpt"),
        ("gpt", "huge", "law", {}, "unknown preset 'huge': choose one of demo, encoder, pairs, "),
        ("gpt", "demo", "secret", {}, "unknown recipe 'secret': choose one of law, paper"),
        ("gpt", "demo", "law", {"colour": "red", "zeal": 1}, "no field is called colour, zeal"),
        (
            "gpt",
            "pairs",
            "law",
            {"pattern": "A-"},
            "pattern is a field of the architecture decoder, and this run has",
        ),
        (
            "gpt",
            "demo",
            "law",
            {"alpha.init": 0.1},
            "alpha.init is no field of gpt, only of ngpt: leave it out for gpt",
        ),
        ("ngpt", "demo", "law", {"n_layers": 0}, "n_layers must be more than 0, got 0"),
        ("ngpt", "demo", "law", {"lr": "abc"}, "lr must be a valid number, got 'abc'"),
        ("ngpt", "hybrid", "law", {"pattern": 5}, "pattern must be a valid string, got 5"),
        ("ngpt", "demo", "law", {"n_layers": "many"}, "n_layers must be a valid integer, got 'many'"),
        ("ngpt", "demo", "law", {"d_model": -64}, "d_model must be more than 0, got -64"),
        ("ngpt", "demo", "law", {"seq_len": 12.5}, "seq_len must be a valid integer, got 12.5"),
        ("ngpt", "demo", "law", {"steps": 0}, "steps must be more than 0, got 0"),
        ("ngpt", "demo", "law", {"n_heads": 3, "d_model": 128}, "n_heads=3 does not divide d_model=128"),
        ("gpt", "demo", "law", {"lr": 0.0}, "lr must be more than 0, got 0.0"),
        ("gpt", "demo", "law", {"lr": -1.0}, "lr must be more than 0, got -1.0"),
    ],
)
def test_what_is_unknown_or_impossible_is_named(
    arm: str, preset: str, recipe: str, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_run(arm, preset, recipe, vocab_size=9, **fields)  # type: ignore[arg-type]


def test_a_recipe_is_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """How docs/contributing.md adds one: a function and an entry."""

    def warm(arm: str, preset: Preset) -> Choices:
        schedule = ScheduleConfig("wsd", warmup_steps=preset.steps // 2)
        return Choices(0.1, {"rope_base": 5e5}, {"eps": 1e-9}, schedule)

    monkeypatch.setitem(recipes.RECIPES, "warm", warm)
    run = make_run("gpt", recipe="warm", vocab_size=9, steps=10)
    assert (run.optim.lr, run.model.rope_base, run.optim.optimizer.eps) == (0.1, 5e5, 1e-9)
    assert (run.schedule.warmup_steps, run.recipe) == (5, "warm")
    assert make_run("gpt", recipe="warm", vocab_size=9, lr=0.2).optim.lr == 0.2


def test_nugpt_at_its_base() -> None:
    """Alpha from 0.05 at ten layers, scales stored at 0.03, cosine to a tenth, eps 1e-16,
    half a rate for the output.
    """
    run = make_run("ngpt", "0.3m", "nugpt", vocab_size=9, steps=320)
    model: Any = run.model
    assert model.alpha.init == pytest.approx(0.05 * 10 / 4)
    assert model.s_z.init == pytest.approx(math.sqrt(64))
    assert (model.alpha.scale, model.s_qk.scale) == (0.03, 0.03)
    assert model.s_z.init / model.s_z.scale == pytest.approx(1 / 0.03), "an update moves it as far as from 1 at 0.03"
    assert (model.s_u.scale, model.s_v.scale, model.s_qk.init) == (1, 1, 1)
    assert run.schedule == ScheduleConfig("cosine", warmup_steps=0, final=0.1)
    assert run.optim == OptimConfig(run.optim.lr, AdamW(eps=1e-16), multipliers=RateMultipliers(output_embedding=0.5))


def test_nugpt_carries_one_rate_to_four_times_the_width_twice_the_depth_and_eight_times_the_length() -> None:
    """m_width 4, m_depth 2, m_data 8, worked out by hand; `lr` itself stays the base's."""
    base, run = (
        make_run("ngpt", "0.3m", "nugpt", vocab_size=9, lr=0.02, **{"steps": 320, **fields})
        for fields in ({}, {"d_model": 256, "n_heads": 4, "n_layers": 8, "steps": 8 * 320})  # type: ignore[arg-type]
    )
    model, start = run.model, base.model
    assert isinstance(model, NGPTConfig)
    assert isinstance(start, NGPTConfig)
    assert run.optim.lr == 0.02
    rates = run.optim.multipliers
    assert rates.scale == pytest.approx(1 / 2)  # 8^(-1/3)
    assert rates.input_embedding == pytest.approx(1 / 2 / 2)  # and 4^(-1/2)
    assert rates.matrix == pytest.approx(1 / 2 * 4**-0.75)
    assert rates.output_embedding == pytest.approx(1 / 2 * 4**-0.75 / 2)
    assert model.alpha.init == pytest.approx(start.alpha.init / 2)
    assert model.s_z.init == pytest.approx(start.s_z.init * 2)
    assert model.s_z.scale == start.s_z.scale


def test_the_base_stays_where_the_shape_is_another() -> None:
    own, longer, wider = (
        make_run("ngpt", "hybrid", "nugpt", vocab_size=9, **fields)
        for fields in ({}, {"steps": 8 * 240}, {"d_model": 512, "n_heads": 8})  # type: ignore[arg-type]
    )
    assert longer.optim.multipliers.matrix == pytest.approx(own.optim.multipliers.matrix / 2)
    assert wider.optim.multipliers.input_embedding == pytest.approx(own.optim.multipliers.input_embedding / 2)
    assert len({run.base for run in (own, longer, wider)}) == 1
    assert make_run("ngpt", "demo", "law", vocab_size=9).base is None


@pytest.mark.parametrize("recipe", WAYS)
def test_only_the_papers_recipe_leaves_the_embeddings_of_source_and_target_apart(recipe: str) -> None:
    shared = {
        vars(make_run(arm, "pairs", recipe, vocab_size=9, lr=1e-2).model.architecture)["share_embeddings"]
        for arm in tiny.ARMS
    }
    assert shared == {recipe != "paper"}


def test_another_base_can_be_given() -> None:
    by_field = make_run("ngpt", "demo", "nugpt", vocab_size=9, base_d_model=32, base_n_layers=4, base_steps=240)
    assert by_field == make_run("ngpt", "demo", "nugpt", vocab_size=9, base=BaseShape(32, 4, 240))
    assert from_dict(to_dict(by_field)) == by_field
    base = BaseShape(d_model=32, n_layers=4, steps=240)
    rates = make_run("ngpt", "demo", "nugpt", vocab_size=9, base=base).optim.multipliers
    assert rates.input_embedding == pytest.approx(1 / 2)
    sizes = {"n_layers": 3, "d_model": 30, "n_heads": 3}
    alone = make_run("ngpt", "demo", "nugpt", vocab_size=9, base=BaseShape(30, 3, 240), **sizes)  # type: ignore[arg-type]
    assert alone.optim.multipliers == RateMultipliers(output_embedding=0.5)


def test_training_ngpt_has_the_rate_that_it_was_tuned_with() -> None:
    results = Path(__file__).parents[1] / "docs" / "results" / "training-tuning.json"
    (search,) = (
        one for one in json.loads(results.read_text())["searches"] if one["fixed"].get("recipe") == "training-ngpt"
    )
    best = min(search["runs"], key=lambda run: run["loss"])
    assert make_run("ngpt", "demo", "training-ngpt", vocab_size=4096).optim.lr == pytest.approx(best["lr"], rel=0.15)


def test_training_ngpt_is_four_choices() -> None:
    new, law = (make_run("ngpt", "demo", recipe, vocab_size=9, lr=0.01) for recipe in ("training-ngpt", "law"))
    assert differences(new.model, law.model) == {"logit_preconditioning"}
    rule = new.optim.optimizer
    assert isinstance(rule, GatedAdamW)
    assert rule.betas == law.optim.optimizer.betas
    assert (rule.gate_sharpness, new.optim.max_angle, new.optim.angle_follows_lr) == (0.5, 0.2, True)
    assert (new.schedule.kind, new.schedule.warmup_steps) == ("log", 24)
    gpt, plain = (make_run("gpt", "demo", recipe, vocab_size=9, lr=0.01) for recipe in ("training-ngpt", "paper"))
    assert differences(gpt, plain) == {"recipe", "schedule"}


def test_each_choice_of_a_recipe_is_a_field_too() -> None:
    fields = {
        "logit_preconditioning": 1.0, "schedule": "log", "warmup_steps": 24, "rho": 0.9, "optimizer": "gated_adamw",
        "eps": 1e-16, "eps_gate": 1e-8, "max_angle": 0.2, "angle_follows_lr": True,
        **{f"{role}_rate": 1.0 for role in ("input_embedding", "output_embedding", "scale")},
    }  # fmt: skip
    by_field = make_run("ngpt", "demo", "law", vocab_size=9, lr=0.01, **fields)  # type: ignore[arg-type]
    by_name = make_run("ngpt", "demo", "training-ngpt", vocab_size=9, lr=0.01)
    assert differences(by_field, by_name) <= {"recipe", "optim"}
    assert differences(by_field.optim, by_name.optim) <= {"multipliers"}
    run = make_run(
        "ngpt", vocab_size=9, matrix_rate=3.0, output_embedding_rate=0.25, final=0.2, schedule="wsd", decay_fraction=0.5
    )
    assert (run.optim.multipliers.matrix, run.optim.multipliers.output_embedding) == (3.0, 0.25)
    assert (run.schedule.final, run.schedule.decay_fraction) == (0.2, 0.5)


def test_heads_of_one_width_follow_the_model() -> None:
    for d_model, n_heads in ((64, 1), (128, 2), (320, 5)):
        assert make_run("ngpt", vocab_size=9, d_model=d_model, d_k=64).model.n_heads == n_heads
    assert make_run("ngpt", vocab_size=9, d_k=32).model.n_heads == 4, "of the preset's width"
    for fields in (
        {"d_k": "wide"},
        {"d_k": 48, "d_model": 64},
        {"d_k": 0, "d_model": 64},
        {"d_k": 8, "d_model": 64, "n_heads": 8},
    ):
        with pytest.raises(ValueError, match=r"d_k=.+ must divide d_model=\d+, with no n_heads beside it"):
            make_run("ngpt", vocab_size=9, **fields)  # type: ignore[arg-type]


R = 1 / math.sqrt(128)
TABLE_4: dict[str, dict[str, Any]] = {
    "s_qk-from-1-at-1": {"s_qk.scale": 1},
    "s_qk-from-0.33-at-rsqrt": {"s_qk.init": 0.33},
    "s_qk-from-0.33-at-1": {"s_qk.init": 0.33, "s_qk.scale": 1},
    "s_qk-from-0.05-at-rsqrt": {"s_qk.init": 0.05},
    "s_qk-from-0.05-at-1": {"s_qk.init": 0.05, "s_qk.scale": 1},
    "s_uv-from-1-at-rsqrt": {"s_u.scale": R, "s_v.scale": R},
    "s_uv-from-rsqrt-at-rsqrt": {"s_u.init": R, "s_v.init": R, "s_u.scale": R, "s_v.scale": R},
    "s_uv-from-rsqrt-at-1": {"s_u.init": R, "s_v.init": R},
    "s_z-from-1-at-1": {"s_z.scale": 1},
    "s_z-from-sqrt-at-rsqrt": {"s_z.init": math.sqrt(128)},
    "s_z-from-sqrt-at-1": {"s_z.init": math.sqrt(128), "s_z.scale": 1},
}
"""Table 4 of the nGPT paper at 128 channels: what differs from its base, whose scales start at 1 and are stored at
1/sqrt(d_model), those of u and v at 1."""


def test_every_start_of_table_4_has_a_name() -> None:
    assert set(TABLE_4) == {name for name in ABLATIONS if "-from-" in name}


def test_all_ablations_go_by_one_name() -> None:
    assert recipe_names(["law", "ablations", "paper", "riemannian"]) == ["law", "paper", *ABLATIONS]
    assert recipe_names(["riemannian"]) == ["riemannian"]


def test_the_page_about_recipes_names_every_one() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    listed = re.findall(r"`([^`]+)`", "".join(line for line in page.splitlines() if line.startswith("|")))
    assert set(RECIPES) <= set(listed)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_the_papers_recipe_with_one_change(name: str) -> None:
    """Said with the numbers themselves, which `None` fields of the config stand for."""
    run, base = (make_run("ngpt", "demo", recipe, vocab_size=9) for recipe in (name, "paper"))
    assert differences(run, base) == {"recipe", "model"}
    unsaid = {f"{scale}.scale": R for scale in ("alpha", "s_qk", "s_z")}
    plain, paper = (
        {k: unsaid[k] if v is None and k in unsaid else v for k, v in fields_by_path(r.model).items()}
        for r in (run, base)
    )
    found = {k: v for k, v in plain.items() if v != paper[k]}
    scale, _, form = name.partition("-")
    if name in TABLE_4:
        assert found == pytest.approx(TABLE_4[name])
    elif form in ("scalar", "fixed"):
        assert found == {f"{each}.form": form for each in (("s_u", "s_v") if scale == "s_uv" else (scale,))}
    else:
        assert [path.startswith("variant.") for path in found] == [True]
    assert make_run("gpt", "demo", name, vocab_size=9).model == make_run("gpt", "demo", "paper", vocab_size=9).model
