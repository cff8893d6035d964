"""The law: what it holds fixed, what it carries over, and that each of its numbers has a source."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from configs import fields_by_path

from spherelm import build, build_optimizer, recipe
from spherelm.data.output import write_json
from spherelm.errors import UserError
from spherelm.layers.linear import unit_modules
from spherelm.recipes import PRESETS, law, make_run
from spherelm.recipes.law import CONSTANTS, numbers
from spherelm.runs.config import to_dict
from spherelm.train.estimate import parameters_by_role

both_arms = pytest.mark.parametrize("arm", ["gpt", "ngpt"])


def rates(arm: str, **fields: Any) -> dict[str, float]:
    """The peak rate of each role in a run of the smallest size with these fields."""
    run = make_run(arm, "0.3m", vocab_size=64, **fields)
    return {role: run.optim.lr * multiplier for role, multiplier in vars(run.optim.multipliers).items()}


@both_arms
def test_every_number_has_constants_and_every_constant_is_used(arm: str) -> None:
    used = {
        name
        for kind in ("gpt", "ngpt")
        for preset in (PRESETS["demo"], PRESETS["hybrid"])
        for number in numbers(kind, preset).values()
        for name in number.constants
    }
    assert used == set(CONSTANTS)
    assert len(CONSTANTS) <= 20
    assert all(number.constants for number in numbers(arm, PRESETS["demo"]).values())
    assert all(constant.source and constant.means for constant in CONSTANTS.values())


def test_the_law_is_a_page() -> None:
    assert len(Path(law.__file__).read_text(encoding="utf-8").splitlines()) <= 120


@both_arms
def test_rates_carry_over_by_powers(arm: str) -> None:
    """Three runs give the exponents of steps; what holds between them holds from any run to any other."""
    short, middle, long = (rates(arm, steps=steps) for steps in (100, 400, 1600))
    small, large = (rates(arm, batch_size=batch) for batch in (4, 64))
    for role in ("matrix", "input_embedding", "output_embedding"):
        assert short[role] / middle[role] == pytest.approx(middle[role] / long[role])
        assert short[role] > long[role]
        assert large[role] / small[role] == pytest.approx(large["matrix"] / small["matrix"])
    assert short["matrix"] / long["matrix"] > short["input_embedding"] / long["input_embedding"]


def test_on_the_sphere_a_rate_is_an_angle_at_every_width() -> None:
    """The first update turns unit vectors by the same angle at 64 and 256 channels,
    and output rows by half: logits sum.
    """
    turned = {}
    for d_model in (64, 256):
        run = make_run("ngpt", "0.3m", vocab_size=1024, d_model=d_model, d_k=64, n_layers=1, common_start=0.0)
        torch.manual_seed(0)
        model = build(run.model)
        before = {name: module.weight.detach().clone() for name, module, _ in unit_modules(model)}
        tokens = torch.randperm(1024).view(4, 256)
        optimizer = build_optimizer(model, run.optim)
        model.loss(tokens, tokens.roll(-1, 1)).backward()
        optimizer.step()
        cosines = {
            name: (before[name] * module.weight.detach()).sum(axis).clamp(-1, 1)
            for name, module, axis in ((n, m, 1 if a is None else a) for n, m, a in unit_modules(model))
        }
        turned[d_model] = {name: cosine.acos().square().mean().sqrt().item() for name, cosine in cosines.items()}
    for name, angle in turned[64].items():
        assert turned[256][name] == pytest.approx(angle / 2 if name == "head.linear" else angle, rel=0.25), name
    assert max(turned[64].values()) < 0.2


@pytest.mark.parametrize("steps", [100, 1000, 10_000])
def test_a_baselines_weights_decay_by_the_same_part_in_every_run(steps: int) -> None:
    """The rate of a role does not matter: rate times decay, summed over a run at the peak, is the law's constant."""
    run = make_run("gpt", "0.3m", vocab_size=64, steps=steps)
    optimizer = build_optimizer(build(run.model), run.optim)
    decays = {group["role"]: steps * group["lr"] * group["weight_decay"] for group in optimizer.param_groups}
    assert decays.pop("gain") == 0
    assert set(decays) == {"input_embedding", "output_embedding", "matrix"}
    assert all(decay == pytest.approx(CONSTANTS["decay.gpt"].value) for decay in decays.values())


@pytest.mark.parametrize(("d_model", "n_heads"), [(64, 1), (256, 4)])
def test_logits_start_with_the_spread_that_the_law_names(d_model: int, n_heads: int) -> None:
    """nGPT's, at every width: the standard deviation of the logits over the vocabulary. GPT starts as GPT-2 does."""
    spreads = []
    for arm in ("gpt", "ngpt"):
        torch.manual_seed(1)
        model = build(make_run(arm, "0.3m", vocab_size=4096, d_model=d_model, n_heads=n_heads).model)
        with torch.no_grad():
            spreads.append(model(torch.randint(4096, (2, 64))).std(-1).mean().item())
    gpt, ngpt = spreads
    assert ngpt == pytest.approx(CONSTANTS["spread"].value, rel=0.15)
    assert gpt == pytest.approx(0.02 * math.sqrt(d_model), rel=0.15)


@both_arms
def test_memories_follow_the_run(arm: str) -> None:
    """Adam's second moment remembers as many tokens as the paper's; the first and Muon's the root of the updates."""
    batches = (4, 64, 512, 2048)
    seconds = [
        make_run(arm, "0.3m", vocab_size=9, seq_len=1024, batch_size=b).optim.optimizer.betas[1] for b in batches
    ]
    assert seconds == [0.99, 0.99, 0.95, 0.95]
    for steps, first in ((100, 0.5), (961, 0.8), (100_000, 0.9)):
        rule: Any = make_run(arm, "0.3m", vocab_size=9, steps=steps).optim.optimizer
        assert rule.betas[0] == pytest.approx(first, abs=1e-3)
        assert 1 / (1 - rule.momentum) == pytest.approx(2 / (1 - rule.betas[0]))


@pytest.mark.parametrize("preset", ["demo", "hybrid-moe"])
@both_arms
def test_a_dry_run_prints_every_number_with_its_constants(arm: str, preset: str, command: Command) -> None:
    """Of roles that the model has; each of its roles has a number of the law."""
    answer = command("train", "--arm", arm, "--preset", preset, "--out", "unused", "--steps", 700, "--dry-run")
    run = make_run(arm, preset, vocab_size=4096, steps=700)
    roles = set(parameters_by_role(run.model))
    found = numbers(arm, replace(PRESETS[preset], steps=700, vocab_size=4096))
    assert {f"{role}_rate" for role in roles - {"matrix"}} <= set(found)
    for name, number in found.items():
        lines = [line for line in answer.out.splitlines() if re.match(rf"  {re.escape(name)} +[\d.e-]+ +from ", line)]
        assert len(lines) == (name.removesuffix("_rate") in roles or not name.endswith("_rate"))
        for line in lines:
            assert f" {number.value:.4g} " in line
            assert line.endswith(", ".join(number.constants))
        for constant in number.constants if lines else ():
            assert f"  {constant} " in answer.out
            assert CONSTANTS[constant].source in answer.out


def test_a_dry_run_says_where_the_run_has_another_number(command: Command) -> None:
    flags = ["--lr", "0.25", "--set", "matrix_rate=2", "s_z.init=3", "betas=[0.3,0.99]"]
    answer = command("train", "--arm", "ngpt", "--out", "unused", "--dry-run", *flags)
    said = [line for line in answer.out.splitlines() if "; this run has " in line]
    assert [line.split()[0] for line in said] == ["lr", "first_beta", "s_z.init"]
    assert [line.rpartition(" ")[2] for line in said] == ["0.5", "0.3", "3"]


@both_arms
def test_a_dry_run_says_which_choices_without_constants_are_the_laws(arm: str, command: Command) -> None:
    words = ["train", "--arm", arm, "--out", "unused", "--dry-run"]
    flags = ["--set", "schedule=cosine", "warmup_steps=3", *(["qk_norm=false"] if arm == "gpt" else [])]
    own = {"schedule": "cosine", "warmup_steps": "3", **({"qk_norm": "false"} if arm == "gpt" else {})}
    law = {"optimizer": "muon", "schedule": "linear", "warmup_steps": "24" if arm == "gpt" else "0"}
    law |= {"qk_norm": "true"} if arm == "gpt" else {}
    for more, others in (([], {}), (flags, own)):
        lines = [line for line in command(*words, *more).out.splitlines() if re.match("  [a-z_]+ +[a-z0-9]+ ", line)]
        for name, value in law.items():
            (line,) = [line for line in lines if line.split()[0] == name]
            assert line.split()[1] == value
            said = f"; this run has {others[name]}" if name in others else " at most" if value == "24" else f" of {arm}"
            assert line.endswith(said)


def test_a_run_of_another_length_from_a_file_is_told_what_it_keeps(command: Command, tmp_path: Path) -> None:
    """A config.json holds numbers, not the law: at another length they are another run's."""
    write_json(tmp_path / "config.json", to_dict(make_run("gpt", "demo", vocab_size=4096)))
    words = ["train", "--config", tmp_path / "config.json", "--out", "unused", "--dry-run"]
    assert command(*words).err == ""
    (line,) = command(*words, "--steps", 10_000, "--lr", 0.01).shown
    assert "for this shape and length the law has others" in line
    assert "weight_decay, warmup_steps stay as in" in line
    assert command(*words, "--set", "betas=[0.1,0.9]", "matrix_rate=2", "warmup_steps=3").err == ""
    for steps, fitting in ((20, 2), (24, 2)):
        (line,) = command(*words, "--steps", steps).shown
        assert f"has 24 updates of warm-up, and the run only {steps} in all: give --set warmup_steps={fitting}" in line
    assert command(*words, "--steps", 20, "--set", "warmup_steps=2").code == 0


def test_rates_for_muon_are_not_adams() -> None:
    with pytest.raises(UserError, match="chooses rates for muon: give --lr with optimizer=adamw"):
        make_run("gpt", "demo", vocab_size=9, optimizer="adamw")
    with pytest.raises(UserError, match="chooses rates for adamw: give --lr with optimizer=muon"):
        make_run("gpt", "demo", "paper", vocab_size=9, optimizer="muon")
    assert make_run("gpt", "demo", vocab_size=9, optimizer="adamw", lr=1e-3).optim.optimizer.kind == "adamw"


@both_arms
def test_the_page_lists_every_difference_from_the_paper(arm: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `?(both|gpt|ngpt)`? \| .+ \| .+ \|$", page, re.MULTILINE)
    differing = set()
    for preset in ("demo", "1b-1k"):
        found = [
            {
                **{
                    f"{part}.{name}": value
                    for part in ("model", "optim", "schedule")
                    for name, value in of(run, part).items()
                },
                **{f"optim.multipliers.{role}": rate for role, rate in vars(run.optim.multipliers).items()},
            }
            for run in (make_run(arm, preset, recipe, vocab_size=50) for recipe in ("paper", "law"))
        ]
        names = {name for one in found for name in one}
        differing |= {name for name in names if found[0].get(name) != found[1].get(name)}
    without_effect = {"optim.multipliers", "optim.optimizer.hyperball"}
    assert differing - without_effect == {field for field, whose in rows if whose in ("both", arm)}


def of(run: Any, part: str) -> dict[str, Any]:
    """The fields of the model, the optimizer or the schedule of a run, by path."""
    return fields_by_path(getattr(run, part))


@both_arms
def test_the_public_recipe_is_the_run_that_the_command_makes(arm: str) -> None:
    """`spherelm.recipe` takes nothing from a preset but what training needs beside the shape and the length."""
    size = {"d_model": 96, "n_layers": 3, "n_heads": 2, "vocab_size": 300, "seq_len": 64, "batch_size": 8, "steps": 500}
    run, made = recipe(arm, **size), make_run(arm, "0.3m", **size)  # type: ignore[arg-type]
    assert (run.model, run.optim, run.schedule) == (made.model, made.optim, made.schedule)
    assert run.recipe == "law"
