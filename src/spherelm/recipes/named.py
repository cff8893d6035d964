"""Named runs: sizes (`presets`) and ways to train (recipes). A recipe is a function.

`make_run("ngpt", "demo", "law")` puts them together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spherelm.errors import UserError, unknown
from spherelm.interop.initial import read_model_config
from spherelm.layers.low_precision import Precision
from spherelm.models import CONFIGS
from spherelm.optim import RateMultipliers, ScheduleConfig
from spherelm.optim.groups import ROLES
from spherelm.optim.transfer import SCALE, BaseShape, transfer
from spherelm.recipes import ablations
from spherelm.recipes.choices import Choices, Recipe, depth, shared_embeddings
from spherelm.recipes.law import CONSTANTS, SHORTEST, law
from spherelm.recipes.overrides import (
    architecture_of,
    base_of,
    check_effects,
    heads_of,
    layers_of,
    model_config,
    model_fields,
    optim_config,
    optimizer_of,
    refuse_unknown,
    schedule_of,
    take,
    training_of,
)
from spherelm.recipes.presets import PRESET, PRESETS, Preset
from spherelm.runs.config import RunConfig, TrainConfig, part_of_batch

BASE = BaseShape(64, 4, 320)
"""Where the rate of "nugpt" was tuned."""


def paper_rate(arm: str, preset: Preset) -> float:
    """The peak rate of "paper": 1e-3 for 1024 channels and 99182 updates of 512 x 1024 tokens,
    as in the paper's ablations.

    It is carried over to other shapes, and is within a factor of 1.5 of what was tuned at 64 and 128 channels
    (docs/experiments.md); so its exponents are a fit to three points, and no more.
    """
    width = 1.5 if arm == "ngpt" else 0.75
    length, batch = preset.steps / 99182, preset.batch_size * preset.seq_len / (512 * 1024)
    return float(f"{1e-3 * (batch / length) ** (1 / 3) * (preset.d_model / 1024) ** -width:.3g}")


def paper(arm: str, preset: Preset) -> Choices:
    """The nGPT paper's recipe, exactly (Tables 2 and 3): every field at its default, cosine to 0.

    Baselines warm up over 2000 steps, or over a tenth of a run that is shorter than 20000; normalized
    arms do not warm up.
    """
    warmup = 0 if arm == "ngpt" else min(2000, preset.steps // 10)
    return Choices(paper_rate(arm, preset), {}, {}, ScheduleConfig("cosine", warmup_steps=warmup))


def nugpt(arm: str, preset: Preset) -> Choices:
    """nuGPT (arXiv 2604.27077): one peak learning rate, tuned at a base shape, for every width, depth and length.

    Its rules are `optim.transfer`; here are its constants: alpha from 0.05 at its 10 layers, the scales stored at 0.03,
    no warm-up, cosine to a tenth, eps 1e-16. Ours are the base, its rate, and the start of s_z there, sqrt(d_model)
    instead of 1; it is stored at as many times more, so that an update moves it as far as the paper's. The rule for
    length stands in the multipliers too, so that `lr` is the base's everywhere. Keep d_k and the batch size of
    the base. GPT has no such rules: it is trained by "paper".
    """
    if arm == "gpt":
        return dataclasses.replace(paper(arm, preset), model=shared_embeddings(preset.architecture))
    base = preset.base or BASE
    rules = transfer(base, preset.d_model, preset.n_layers, preset.steps)
    model: dict[str, Any] = {
        **shared_embeddings(preset.architecture),
        "alpha.init": 0.05 * 10 / depth(preset.architecture, base.n_layers) * rules.alpha_init,
        "s_z.init": math.sqrt(base.d_model) * rules.s_z_init,
        **{f"{name}.scale": SCALE for name in ("alpha", "s_qk")},
        "s_z.scale": SCALE * math.sqrt(base.d_model),
    }
    multipliers = RateMultipliers(**{role: rules.rate * getattr(rules.multipliers, role) for role in ROLES})
    return Choices(2e-2, model, {"eps": 1e-16, "multipliers": multipliers}, ScheduleConfig("cosine", final=0.1))


def training_ngpt(arm: str, preset: Preset) -> Choices:
    """The recipe of "Training nGPT" (arXiv 2608.01284): four choices, each a field of its own, on the law's starts.

    Logit gradient preconditioning (`logit_preconditioning`), logarithmic decay after a tenth of warm-up (`schedule`,
    `rho`), GatedAdamW (`optimizer`, `eps_gate`, `gated_step`), and the angular step cap (`max_angle`). rho, eps_gate,
    the cap and the rate, which is 0.131 radians at 1000 updates and follows the length as Adam's in "law", are ours,
    tuned at the demo (docs/experiments.md): the paper's are not known here. GPT is that of "paper" with this schedule;
    the rest is not about it.
    """
    schedule = ScheduleConfig("log", warmup_steps=preset.steps // 10, rho=0.9)
    if arm == "gpt":
        return dataclasses.replace(nugpt(arm, preset), schedule=schedule)
    choices = law(arm, preset)
    optim = {"optimizer": "gated_adamw", "eps": 1e-16, "eps_gate": 1e-8, "max_angle": 0.2, "angle_follows_lr": True}
    shorter = 1000 / max(SHORTEST, preset.steps)
    rate = 0.1312 / math.sqrt(preset.d_model) * shorter ** CONSTANTS["length.adam"].value
    model = {**choices.model, "logit_preconditioning": 1.0}
    return Choices(rate, model, {**optim, "betas": choices.optim["betas"]}, schedule)


def hyperball(arm: str, preset: Preset) -> Choices:
    """The baseline of "law" with MuonH (Hyperball, arXiv 2606.16899): its matrices keep the norm that they start with.

    They turn by the angle that nGPT's matrices turn by in "law", and start with a spread of 0.5 / sqrt(d_model): the
    best of three spreads and three angles at 64 channels (docs/experiments.md). nGPT is that of "law".
    """
    choices = law(arm, preset)
    if arm == "ngpt":
        return choices
    angle = law("ngpt", preset).lr
    part, rates = choices.lr / angle, choices.optim["multipliers"]
    optim = {
        "hyperball": True,
        "weight_decay": choices.optim["weight_decay"] * part,
        "multipliers": RateMultipliers(**{r: getattr(rates, r) * (1.0 if r == "matrix" else part) for r in ROLES}),
    }
    model = {**choices.model, "init_std": 0.5 / math.sqrt(preset.d_model)}
    return dataclasses.replace(choices, lr=angle, model=model, optim={**choices.optim, **optim})


def nvfp4_paper(arm: str, preset: Preset) -> Choices:
    """The recipe of "Normalized Architectures are Natively 4-Bit" (arXiv 2605.06067): FNGPT under Adam.

    WSD without warm-up from 3e-4, for a pattern of layers 5e-4, to a 25th of it; the last 15 % fall as `minus_sqrt`.
    The rates are those of its two shapes (presets "1.2b-8k" and "30b-8k"), and are carried to no other. How its GPT
    was trained is not known here: GPT is that of "paper" with this schedule behind its warm-up.
    """
    model, schedule = (
        shared_embeddings(preset.architecture),
        ScheduleConfig("wsd", final=0.04, decay_fraction=0.15, decay_shape="minus_sqrt"),
    )
    if arm == "gpt":
        choices = paper(arm, preset)
        schedule = dataclasses.replace(schedule, warmup_steps=choices.schedule.warmup_steps)
        return dataclasses.replace(choices, model=model, schedule=schedule)
    by_pattern = getattr(preset.architecture, "pattern", None) is not None
    return Choices(5e-4 if by_pattern else 3e-4, {**model, "variant.inner_norm": True}, {}, schedule)


def ablation(name: str) -> Recipe:
    """The paper's recipe with one change to nGPT, by its name in Tables 4 to 6; GPT is the paper's."""

    def recipe(arm: str, preset: Preset) -> Choices:
        choices = paper(arm, preset)
        if arm == "gpt":
            return choices
        return dataclasses.replace(choices, model={**choices.model, **ablations.fields_of(name, preset.d_model)})

    recipe.__doc__ = f"`paper` with {ablations.in_words(name)} in nGPT."
    return recipe


ABLATIONS: dict[str, Recipe] = {name: ablation(name) for name in ablations.NAMES}
"""Tables 4 to 6 of the nGPT paper, in its order; their base is "paper", whose learning rate they take."""

RECIPE = "law"
"""The recipe of a run for which none is named."""

WAYS: dict[str, Recipe] = {
    RECIPE: law, "paper": paper, "hyperball": hyperball, "nugpt": nugpt, "training-ngpt": training_ngpt,
    "nvfp4-paper": nvfp4_paper,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {**WAYS, **ABLATIONS}


def recipe_names(names: Sequence[str]) -> list[str]:
    """`names`, in which "ablations" stands for the base of the ablations and all of them, each once."""
    whole = {"ablations": ["paper", *ABLATIONS]}
    return list(dict.fromkeys(one for name in names for one in whole.get(name, [name])))


def distinct(choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`choices` of arms and recipes, each once: the ablations change nGPT,
    and GPT by any of them is the paper's GPT.
    """
    found = []
    for choice in choices:
        same = choice["recipe"] in ABLATIONS and choice["arm"] == "gpt"
        one = {**choice, "recipe": "paper"} if same else dict(choice)
        if not (same and one in found):
            found.append(one)
    return found


def _look_up(kind: str, name: str, among: Mapping[str, Any]) -> Any:
    if name not in among:
        raise unknown(kind, name, among)
    return among[name]


OF_TRAINING = (
    "steps", "seq_len", "batch_size", "micro_batch_size", "eval_every", "eval_windows", "compile", "label_smoothing"
)  # fmt: skip
"""The fields of a `TrainConfig` that its preset sets."""


def make_run(
    arm: str,
    preset: str = PRESET,
    recipe: str = RECIPE,
    *,
    vocab_size: int | None = None,
    data: str | None = None,
    lr: float | None = None,
    **overrides: Any,
) -> RunConfig:
    """The run of `arm` at the size `preset` by the recipe `recipe`.

    vocab_size: that of the data; by default the preset's. lr: the peak learning rate, by default the recipe's.
    overrides: fields of `TrainConfig` (`steps`, `seq_len`, ...), of the model's config (`d_model`, `alpha.init`, ...),
    of the optimizer's or the schedule's (`schedule` is its kind), and for each role's rate multiplier `matrix_rate` and
    the like; `d_k`, the width of a head, makes n_heads follow d_model, a `pattern` its n_layers; `base_d_model`,
    `base_n_layers` and `base_steps` are the preset's base. `None` is a valid value of fields that may have none. Raises
    `ValueError` naming an unknown arm, preset, recipe or field, or a field that would change nothing.
    """
    size: Preset = _look_up("preset", preset, PRESETS)
    size = dataclasses.replace(size, vocab_size=vocab_size or size.vocab_size)
    return _run(arm, size, preset, recipe, data, lr, overrides)


def _run(
    arm: str, size: Preset, preset: str, recipe: str, data: str | None, lr: float | None, overrides: Mapping[str, Any]
) -> RunConfig:
    """The run of `arm` at this size, which the preset called `preset` began as."""
    config_class = _look_up("arm", arm, CONFIGS)
    make: Recipe = _look_up("recipe", recipe, RECIPES)
    given = dict(overrides)
    given |= heads_of(given, size.d_model)
    size = dataclasses.replace(size, architecture=architecture_of(size.architecture, given))
    given |= layers_of(given, size.architecture)
    size = dataclasses.replace(size, **take(given, Preset, but=("architecture", "model", "base", "about")))
    if size.vocab_size is None:
        raise UserError(
            f"the vocabulary's size is not known, and the preset {preset!r} has none: give vocab_size=, that of your tokenizer "
            "(4096 for the one that ships with spherelm)"
        )
    base = base_of(given.pop("base", BASE), given)
    size = dataclasses.replace(size, base=base if recipe == "nugpt" and arm == "ngpt" else None)
    if "micro_batch_size" not in overrides:
        limit = size.micro_batch_size
        size = dataclasses.replace(size, micro_batch_size=limit and part_of_batch(limit, size.batch_size))
    choices = make(arm, size)
    suited = choices.optim.get("optimizer", "adamw")
    named = optimizer_of(given, choices.optim)
    if lr is None and named != suited and "muon" in (named, suited):
        raise UserError(f"recipe {recipe!r} chooses rates for {suited}: give --lr with optimizer={named}")
    optim = optim_config(choices.lr if lr is None else lr, choices.optim, given)
    train = {name: getattr(size, name) for name in OF_TRAINING}
    shape = {name: getattr(size, name) for name in ("n_layers", "d_model", "n_heads")}
    model = {"vocab_size": size.vocab_size, "max_seq_len": size.seq_len, **shape, **size.model, **choices.model}
    config = RunConfig(
        recipe=recipe,
        preset=preset,
        model=model_config(config_class, size.architecture, model, given),
        optim=optim,
        schedule=schedule_of(choices.schedule, given),
        train=TrainConfig(**(train | training_of(given, Precision()))),
        data=data,
        base=size.base,
    )
    refuse_unknown(given, config)
    check_effects(overrides, config, arm == "ngpt")
    return config


def run_from(
    source: Path,
    arm: str | None = None,
    preset: str = PRESET,
    recipe: str = RECIPE,
    *,
    data: str | None = None,
    lr: float | None = None,
    **overrides: Any,
) -> RunConfig:
    """A new run that starts from the model in `source`:
    a run directory, a checkpoint, or a folder of `spherelm export`.

    The model keeps its shape; preset and recipe choose optimizer, schedule and length for its shape. Arguments
    as for `make_run`. Raises `UserError`, naming it, for a field of the model that differs from the source's.
    """
    model = read_model_config(source)
    if arm not in (None, model.arm):
        raise UserError(f"--arm {arm} differs from the arm of {source}, {model.arm}: leave it out")
    for name, value in model_fields(overrides, model).items():
        if overrides[name] != value:
            raise UserError(
                f"{name}={overrides[name]!r} differs from the model in {source}, which has {value!r}: leave it out"
            )
        del overrides[name]
    shape = {name: getattr(model, name) for name in ("n_layers", "d_model", "n_heads", "vocab_size", "architecture")}
    size = dataclasses.replace(_look_up("preset", preset, PRESETS), model={}, **shape)
    run = _run(model.arm, size, preset, recipe, data, lr, overrides)
    longer = dataclasses.replace(model, max_seq_len=max(model.max_seq_len, run.train.seq_len))
    return dataclasses.replace(run, model=longer, init_from=str(source))


def recipe(
    arm: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    vocab_size: int,
    seq_len: int,
    batch_size: int,
    steps: int,
    name: str = RECIPE,
    **fields: Any,
) -> RunConfig:
    """Choose everything about a run from its shape and length: initial values, optimizer, rates, schedule.

        run = recipe("ngpt", d_model=128, n_layers=4, n_heads=2, vocab_size=4096, seq_len=256, batch_size=4, steps=1000)
        model = build(run.model)
        optimizer = build_optimizer(model, run.optim)

    Args:
        arm: "gpt" or "ngpt".
        d_model: Channels of the hidden state.
        n_layers: Layers.
        n_heads: Heads of attention.
        vocab_size: Token ids.
        seq_len: Tokens of a sequence.
        batch_size: Sequences of an update.
        steps: Updates of the whole run.
        name: The recipe, as `spherelm list recipes` lists them.
        **fields: Any other field of a run, as `spherelm list fields` lists them.

    Returns:
        A `RunConfig` with `run.model`, `run.optim`, `run.schedule` and `run.train`.

    Raises:
        UserError: A name is unknown, or a field has an impossible value.
    """
    shape = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "vocab_size": vocab_size}
    return make_run(arm, PRESET, name, **shape, seq_len=seq_len, batch_size=batch_size, steps=steps, **fields)  # type: ignore[arg-type]
