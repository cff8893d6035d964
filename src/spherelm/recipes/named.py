"""Named runs: sizes (`presets`) and ways to train (recipes). A recipe is a function.

`make_run("ngpt", "demo", "default")` puts them together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spherelm.errors import UserError
from spherelm.models import CONFIGS, Architecture, DecoderArch
from spherelm.optim import RateMultipliers, ScheduleConfig
from spherelm.optim.groups import ROLES
from spherelm.optim.transfer import SCALE, transfer
from spherelm.recipes import ablations
from spherelm.recipes.overrides import (
    architecture_of,
    base_of,
    check_effects,
    heads_of,
    layers_of,
    model_config,
    nearest,
    optim_config,
    part_of_batch,
    refuse_unknown,
    schedule_of,
    take,
)
from spherelm.recipes.presets import PRESETS, Preset
from spherelm.runs.config import RunConfig, TrainConfig


@dataclass(frozen=True)
class Choices:
    """What a recipe decides for one arm at one size and length: fields of the model's config, optimizer and schedule.

    model: by name, or by path such as "alpha.init".
    """

    model: Mapping[str, Any]
    optim: Mapping[str, Any]
    schedule: ScheduleConfig


Recipe = Callable[[str, Preset, int], Choices]
"""(arm, preset, steps) -> choices."""


def paper(arm: str, preset: Preset, steps: int) -> Choices:
    """The nGPT paper's recipe, exactly (Tables 2 and 3): every field at its default, cosine to 0.

    Baselines warm up over 2000 steps, or over a tenth of a run that is shorter than 20000; normalized arms do not warm up.
    """
    warmup = 0 if arm == "ngpt" else min(2000, steps // 10)
    return Choices({}, {}, ScheduleConfig("cosine", warmup_steps=warmup))


def default(arm: str, preset: Preset, steps: int) -> Choices:
    """What learns fastest (docs/experiments.md), as far as it was measured: `muon` where its rates were tuned, else `adam`."""
    return WAYS[best_way(arm, preset)](arm, preset, steps)


def best_way(arm: str, preset: Preset) -> str:
    """The recipe that "default" is for this arm and size."""
    return "muon" if ("muon", arm) in preset.rates else "adam"


def adam(arm: str, preset: Preset, steps: int) -> Choices:
    """AdamW for baselines, Adam for normalized arms; at the paper's own 0.5B shape it starts as the paper's.

    The rate falls to 0 in a straight line, Adam's first moment remembers less in a short run (`first_beta`) and the second
    more where an update has few tokens (`second_beta`); with each of the three both arms end lower. Baselines: embeddings and
    gains learn faster than matrices (`RATES`), and so decay faster, which is too much for a short run (`SHORT_DECAY`). nGPT:
    eigen learning rates start at the paper's 0.05 for 24 layers and higher for fewer, as 1/sqrt(n_layers); the logits' scale
    starts at sqrt(d_model) or where the preset says, since under Adam it cannot grow there in a short run, and is stored at
    `S_Z_SCALE`; in short runs tokens start beside each other and attention nearly even (`EVEN_START`). Other arms: as GPT and
    nGPT. Where baselines do not start even, their weights are spread as the paper's at its 1024 channels, as 1/sqrt(d_model);
    two of a hybrid's layers are one of GPT's, and in encoder-decoders source and target share their input embedding.
    """
    schedule = dataclasses.replace(paper(arm, preset, steps).schedule, kind="linear")
    kind = kind_of(preset.architecture)
    optim: dict[str, Any] = {"betas": (first_beta(steps), second_beta(preset.batch_size * preset.seq_len))}
    if (arm, kind) in RATES:
        optim["multipliers"] = RATES[arm, kind]
    own = shared_embeddings(preset.architecture)
    if arm == "gpt":
        if not (preset.even_start and (arm, kind) in EVEN_START):
            own["init_std"] = 0.02 * math.sqrt(1024 / preset.d_model)
        if preset.even_start and kind in FORGETFUL:
            optim["weight_decay"] = SHORT_DECAY
        return Choices(own, optim, schedule)
    model = {
        **own,
        "s_z.init": start_of_logits(preset, steps),
        "s_z.scale": S_Z_SCALE,
        "alpha.init": 0.05 * math.sqrt(24 / depth(preset.architecture, preset.n_layers)),
        **(EVEN_START.get((arm, kind), {}) if preset.even_start else {}),
    }
    return Choices(model, optim, schedule)


def kind_of(architecture: Architecture) -> str:
    """What tuned numbers are kept by: the architecture, where a decoder has a pattern "hybrid", or "experts" without mixers."""
    if isinstance(architecture, DecoderArch) and architecture.pattern is not None:
        return "hybrid" if "M" in architecture.pattern else "experts"
    return architecture.kind


def shared_embeddings(architecture: Architecture) -> dict[str, Any]:
    """That source and target share their input embedding, where there are both; only "paper" leaves them apart."""
    return {"share_embeddings": True} if architecture.kind == "encdec" else {}


EVEN_START: dict[tuple[str, str], dict[str, float]] = {
    **{("gpt", kind): {} for kind in ("decoder", "hybrid", "experts")},
    **{("ngpt", kind): {"common_start": 8.0, "s_qk.init": 0.5} for kind in ("decoder", "hybrid", "experts", "encoder")},
    ("ngpt", "encdec"): {"s_qk.init": 0.5},
}
"""How logits and attention are made to start nearly even; the arms and kinds that are not here were not better for it.

A baseline has it from the paper's small weights of 0.02, at every width; encoders and encoder-decoders want wider ones.
On the sphere a direction that all tokens share does it, and queries and keys that start shorter; of an encoder-decoder only the
latter helps.
"""

FORGETFUL = ("decoder", "hybrid", "experts", "encdec")
SHORT_DECAY = 0.025
"""The weight decay of these baselines in short runs; the paper's is 0.1.

Embeddings forget what they learned within a short run where they decay at 0.1 of a rate that is several times the matrices'.
"""


def start_of_logits(preset: Preset, steps: int) -> float:
    """Where s_z starts in a run of `steps` updates: sqrt(d_model), or where the preset says.

    The preset's number is for as many updates as its base has; it grows as their fourth root, up to `HIGHEST_START`. With 64
    channels 22 was best of 8, 16, 22, 45 and 64 at 320 updates and 32 best of 22, 32 and 45 at 1280 (docs/experiments.md).
    """
    if preset.logit_scale is None:
        return math.sqrt(preset.d_model)
    return min(HIGHEST_START, preset.logit_scale * (steps / preset.base.steps) ** 0.25)


HIGHEST_START = 64.0
"""Nothing above it was better in any run, with up to 1280 updates."""


def first_beta(steps: int) -> float:
    """Adam's beta for the first moment in a run of `steps` updates: the paper's 0.9 from 3844 on, less in shorter ones.

    `1 - 1 / h` with a horizon h of `sqrt(steps) / 6.2` updates, no fewer than 2 and no more than 10. Found at 240 updates,
    where GPT is best at 0.7 and nGPT at 0.5, and at 1280, where both are at 0.8 (docs/experiments.md); the root is a guess.
    """
    return 1 - 1 / min(10.0, max(2.0, math.sqrt(steps) / 6.2))


def second_beta(tokens: int) -> float:
    """Adam's beta for the second moment where an update has so many tokens: as many tokens are remembered as in the paper.

    The paper's is 0.95 with 512 sequences of 1024 tokens. A fixed half-life in tokens is Marek et al.'s rule for small batches
    (arXiv 2507.07101), here with a limit: with 1024 tokens an update 0.99 was better than less and 0.995 no better.
    """
    return min(0.99, max(0.95, 0.95 ** (tokens / PAPER_BATCH)))


PAPER_BATCH = 512 * 1024
"""Tokens of an update in the nGPT paper's shortest context."""

RATES = {
    ("gpt", "decoder"): RateMultipliers(input_embedding=32.0, output_embedding=16.0, gain=8.0),
    ("gpt", "hybrid"): RateMultipliers(input_embedding=128.0, output_embedding=16.0, gain=16.0),
    ("gpt", "experts"): RateMultipliers(input_embedding=32.0, output_embedding=32.0, gain=4.0),
    ("gpt", "encoder"): RateMultipliers(input_embedding=64.0, output_embedding=8.0, gain=4.0),
    ("gpt", "encdec"): RateMultipliers(input_embedding=64.0, output_embedding=16.0, gain=8.0),
    ("ngpt", "encdec"): RateMultipliers(input_embedding=2.0, matrix=0.5),
}
"""Of the arms that want different rates for different roles, in the recipe "adam"; a baseline's peak is its block matrices'.

Found at 128 channels: 240 updates, the hybrid's with the pattern "MAM-MAM-", that of "experts", hybrids without Mamba mixers,
with "AOAOAOAO"; 600 updates of English to French for encoder-decoders.
"""

S_Z_SCALE = 1.4
"""What s_z is stored at in the recipe "adam", at every width. Found at 128 channels; the paper's is 0.088 there."""


def depth(architecture: Architecture, n_layers: int) -> float:
    """How many layers of two steps each the model has: of a pattern every letter is one step."""
    return n_layers / 2 if kind_of(architecture) in ("hybrid", "experts") else n_layers


def nugpt(arm: str, preset: Preset, steps: int) -> Choices:
    """nuGPT (arXiv 2604.27077): one peak learning rate for every width, depth and length, carried over from `preset.base`.

    Its rules are `optim.transfer`; here are its constants: alpha from 0.05 at its 10 layers, the scales stored at 0.03, no
    warm-up, cosine to a tenth, eps 1e-16. Ours is the start of s_z at the base, sqrt(d_model) instead of 1;
    it is stored at as many times more, so that an update moves it as far as the paper's. The rule for length
    stands in the multipliers too, so that `lr` is the base's everywhere. Keep d_k and the batch size of the base. GPT has no
    such rules: it is trained by "adam".
    """
    if arm == "gpt":
        return adam(arm, preset, steps)
    base = preset.base
    rules = transfer(base, preset.d_model, preset.n_layers, steps)
    model: dict[str, Any] = {
        **shared_embeddings(preset.architecture),
        "alpha.init": 0.05 * 10 / depth(preset.architecture, base.n_layers) * rules.alpha_init,
        "s_z.init": math.sqrt(base.d_model) * rules.s_z_init,
        **{f"{name}.scale": SCALE for name in ("alpha", "s_qk")},
        "s_z.scale": SCALE * math.sqrt(base.d_model),
    }
    multipliers = RateMultipliers(**{role: rules.rate * getattr(rules.multipliers, role) for role in ROLES})
    return Choices(model, {"eps": 1e-16, "multipliers": multipliers}, ScheduleConfig("cosine", final=0.1))


def muon(arm: str, preset: Preset, steps: int) -> Choices:
    """The recipe "adam" with Muon for block matrices, in both arms; Adam's rates by role beside it are tuned here."""
    choices = adam(arm, preset, steps)
    optim = {"optimizer": "muon", "multipliers": muon_rates(arm, steps), "momentum": muon_momentum(steps)}
    return Choices(choices.model, {**choices.optim, **optim}, choices.schedule)


def muon_momentum(steps: int) -> float:
    """Muon's momentum in a run of `steps` updates: it remembers twice as many as Adam's first moment (`first_beta`).

    That is Muon's usual 0.95 from 3844 updates on, and 0.8 at 240, where both arms are best (docs/experiments.md).
    """
    return 1 - (1 - first_beta(steps)) / 2


def muon_rates(arm: str, steps: int) -> RateMultipliers:
    """Rates by role in a run of `steps` updates, times a peak that is Muon's for baselines and Adam's for normalized arms.

    On the sphere Muon's rate is an angle, and the best falls faster with the length of a run than Adam's: it is 4 times the
    peak at 240 and 320 updates and 2 times at 1280. Found at 128 and 64 channels, GPT's at all three lengths, where it is one
    (docs/experiments.md).
    """
    if arm == "gpt":
        return RateMultipliers(input_embedding=6.4, output_embedding=0.8, gain=0.8)
    return RateMultipliers(matrix=min(4.0, max(2.0, 4 * math.sqrt(320 / steps))), input_embedding=0.5)


def training_ngpt(arm: str, preset: Preset, steps: int) -> Choices:
    """The recipe of "Training nGPT" (arXiv 2608.01284) on the starts of "adam": four choices, each also a field of its own.

    Logit gradient preconditioning (`logit_preconditioning`), logarithmic decay after a tenth of warm-up (`schedule`, `rho`),
    GatedAdamW (`optimizer`, `eps_gate`, `gated_step`), and the angular step cap (`max_angle`). rho, eps_gate and the cap are
    ours, tuned at the demo (docs/experiments.md): the paper's are not known here. GPT takes the schedule alone; the rest is
    not about it.
    """
    choices = adam(arm, preset, steps)
    schedule = ScheduleConfig("log", warmup_steps=steps // 10, rho=0.9)
    if arm == "gpt":
        return dataclasses.replace(choices, schedule=schedule)
    optim = {"optimizer": "gated_adamw", "eps": 1e-16, "eps_gate": 1e-8, "max_angle": 0.2, "angle_follows_lr": True}
    return Choices({**choices.model, "logit_preconditioning": 1.0}, {**choices.optim, **optim}, schedule)


def ablation(name: str) -> Recipe:
    """The paper's recipe with one change to nGPT, by its name in Tables 4 to 6; GPT is the paper's."""

    def recipe(arm: str, preset: Preset, steps: int) -> Choices:
        choices = paper(arm, preset, steps)
        if arm == "gpt":
            return choices
        return dataclasses.replace(choices, model={**choices.model, **ablations.fields_of(name, preset.d_model)})

    recipe.__doc__ = f"`paper` with {ablations.in_words(name)} in nGPT."
    return recipe


ABLATIONS: dict[str, Recipe] = {name: ablation(name) for name in ablations.NAMES}
"""Tables 4 to 6 of the nGPT paper, in its order; their base is "paper", whose learning rate they take."""

WAYS: dict[str, Recipe] = {
    "default": default,
    "adam": adam,
    "paper": paper,
    "nugpt": nugpt,
    "muon": muon,
    "training-ngpt": training_ngpt,
}

RECIPES: dict[str, Recipe] = {**WAYS, **ABLATIONS}


def recipe_names(names: Sequence[str]) -> list[str]:
    """`names`, in which "ablations" stands for the base of the ablations and all of them, each once."""
    whole = {"ablations": ["paper", *ABLATIONS]}
    return list(dict.fromkeys(one for name in names for one in whole.get(name, [name])))


def distinct(choices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`choices` of arms and recipes, each once: the ablations change nGPT, and GPT by any of them is the paper's GPT."""
    found = []
    for choice in choices:
        same = choice["recipe"] in ABLATIONS and choice["arm"] == "gpt"
        one = {**choice, "recipe": "paper"} if same else dict(choice)
        if not (same and one in found):
            found.append(one)
    return found


def tuned_rate(preset: Preset, recipe: str, arm: str) -> float | None:
    """The peak learning rate that was tuned for this; where a recipe changes nothing that it hangs on, another's."""
    if recipe in ABLATIONS:
        recipe = "paper"
    elif recipe == "default":
        recipe = best_way(arm, preset)
    elif recipe == "nugpt" and arm == "gpt":
        recipe = "adam"
    return preset.rates.get((recipe, arm))


def _look_up(kind: str, name: str, among: Mapping[str, Any]) -> Any:
    if name not in among:
        raise UserError(f"unknown {kind} {name!r}{nearest(name, among)}: choose one of {', '.join(among)}")
    return among[name]


OF_TRAINING = (
    "steps", "seq_len", "batch_size", "micro_batch_size", "eval_every", "eval_windows", "compile", "label_smoothing"
)  # fmt: skip
"""What a `TrainConfig` has from its preset."""


def make_run(
    arm: str,
    preset: str = "demo",
    recipe: str = "default",
    *,
    vocab_size: int | None = None,
    data: str | None = None,
    lr: float | None = None,
    **overrides: Any,
) -> RunConfig:
    """The run of `arm` at the size `preset` by the recipe `recipe`.

    vocab_size: that of the data; by default the preset's. lr: the peak learning rate, by default the tuned one.
    overrides: fields of `TrainConfig` (`steps`, `seq_len`, ...), of the model's config (`d_model`, `alpha.init`, ...), of
    the optimizer's or the schedule's (`schedule` is its kind), and for each role's rate multiplier `matrix_rate` and the
    like; `d_k`, the width of a head, makes n_heads follow d_model, a `pattern` its n_layers; `base_d_model`,
    `base_n_layers` and `base_steps` are the preset's base. `None` is a value, of fields that may have none. Raises
    `ValueError` naming an unknown arm, preset, recipe or field, or a field that would change nothing.
    """
    config_class = _look_up("arm", arm, CONFIGS)
    size: Preset = _look_up("preset", preset, PRESETS)
    make: Recipe = _look_up("recipe", recipe, RECIPES)
    given = dict(overrides)
    given |= heads_of(given, size.d_model)
    size = dataclasses.replace(size, architecture=architecture_of(size.architecture, given))
    given |= layers_of(given, size.architecture)
    size = dataclasses.replace(size, **take(given, Preset, but=("architecture", "logit_scale", "even_start", "about")))
    size = dataclasses.replace(size, base=base_of(size.base, given))
    if "micro_batch_size" not in overrides:
        size = dataclasses.replace(size, micro_batch_size=part_of_batch(size.micro_batch_size, size.batch_size))
    choices = make(arm, size, size.steps)
    rate = tuned_rate(size, recipe, arm) if lr is None else lr
    if rate is None:
        raise UserError(
            f"no learning rate was tuned for {arm} at {preset!r} by {recipe!r}: give --lr (compare: --lr-gpt, --lr-ngpt)"
        )
    optim = optim_config(rate, choices.optim, given)
    train = {name: getattr(size, name) for name in OF_TRAINING}
    shape = {name: getattr(size, name) for name in ("n_layers", "d_model", "n_heads")}
    model = {"vocab_size": vocab_size or size.vocab_size, "max_seq_len": size.seq_len, **shape, **choices.model}
    config = RunConfig(
        recipe=recipe,
        preset=preset,
        model=model_config(config_class, size.architecture, model, given),
        optim=optim,
        schedule=schedule_of(choices.schedule, given),
        train=TrainConfig(**(train | take(given, TrainConfig))),
        data=data,
        base=size.base if recipe == "nugpt" and arm == "ngpt" else None,
    )
    refuse_unknown(given, config)
    check_effects(overrides, config, arm == "ngpt")
    return config
