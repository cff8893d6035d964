"""Named runs: sizes (presets) and ways to train (recipes). A recipe is a function; an ablation is a one-field change.

`make_run("ngpt", "demo", "default")` puts them together. Sizes, lengths and tuned learning rates stand here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spherelm.models import ARMS, EncoderDecoder, is_normalized
from spherelm.optim import OptimConfig, RateMultipliers, ScheduleConfig
from spherelm.optim.groups import ROLES
from spherelm.optim.transfer import SCALE, BaseShape, transfer
from spherelm.train.config import RunConfig, TrainConfig


@dataclass(frozen=True)
class Preset:
    """A size, a length and the peak learning rates tuned for them.

    rates: the peak learning rate by (recipe, arm). micro_batch_size: sequences at once, see `TrainConfig`.
    compile: whether the run is long enough to earn back the time that compilation takes. base: the shape at which the rate
    of the recipe "nugpt" was tuned, `None` for the preset's own. For pairs seq_len is the longest text of either side and
    batch_size the pairs of an update.
    """

    n_layers: int
    d_model: int
    n_heads: int
    seq_len: int
    batch_size: int
    steps: int
    rates: Mapping[tuple[str, str], float]
    micro_batch_size: int | None = None
    eval_every: int = 100
    eval_windows: int = 64
    compile: bool = True
    vocab_size: int | None = field(default=None)
    base: BaseShape | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "seq_len", "batch_size", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")


def paper_size(n_layers: int, d_model: int, n_heads: int, context: int) -> Preset:
    """A run of the nGPT paper: 512 sequences a batch, LLaMA-2's 32000 tokens, 52 billion tokens.

    The rate 1e-3 is that of the paper's ablations at 0.5B; each run of the paper had its own tuned one.
    """
    rates = {(recipe, arm): 1e-3 for recipe in WAYS for arm in ARMS}
    steps = round(52e9 / (512 * context))
    base = BaseShape(1020, 10, steps)  # nuGPT's own, at the same length
    return Preset(n_layers, d_model, n_heads, context, 512, steps, rates, 8, 1000, vocab_size=32000, base=base)


SMALLEST = BaseShape(64, 4, 320)
"""Where the rates of the small sizes come from (docs/evidence.md): 262 thousand block parameters, 328 thousand tokens.

Those of "default" and "muon" were tuned there with one seed; those of "paper" and "training-ngpt" were not.
"""

RATES_OF_SMALLEST = {
    ("default", "gpt"): 8e-3,
    ("default", "ngpt"): 2e-2,
    ("paper", "gpt"): 8e-3,
    ("paper", "ngpt"): 4e-2,
    ("muon", "gpt"): 3.2e-2,
    ("muon", "ngpt"): 2.4e-2,
    ("training-ngpt", "gpt"): 8e-3,
    ("training-ngpt", "ngpt"): 2e-2,
}


def small_size(n_layers: int, d_model: int, n_heads: int) -> Preset:
    """A size of the ladder in docs/evidence.md: heads of 64, 1024 tokens an update, 5 tokens for each block parameter.

    Rates are carried over from `SMALLEST` with (width ratio)^(-3/4) (length ratio)^(-1/3), a rule that is nuGPT's for block
    matrices and rough for everything else: `spherelm evidence` starts its search there. nuGPT's own needs none.
    """
    steps = round(5 * 16 * n_layers * d_model**2 / 1024)
    ratio = (d_model / SMALLEST.d_model) ** -0.75 * (steps / SMALLEST.steps) ** (-1 / 3)
    rates = {key: float(f"{rate * ratio:.2g}") for key, rate in RATES_OF_SMALLEST.items()}
    rates["nugpt", "ngpt"] = RATES_OF_SMALLEST["default", "ngpt"]
    return Preset(n_layers, d_model, n_heads, 256, 4, steps, rates, eval_every=steps // 8, base=SMALLEST)


@dataclass(frozen=True)
class Choices:
    """What a recipe decides for one arm at one size and length: fields of the model's config, optimizer and schedule."""

    model: Mapping[str, Any]
    optim: Mapping[str, Any]
    schedule: ScheduleConfig


Recipe = Callable[[str, Preset, int], Choices]
"""(arm, preset, steps) -> choices."""


def paper(arm: str, preset: Preset, steps: int) -> Choices:
    """The nGPT paper's recipe, exactly (Tables 2 and 3): every field at its default, cosine to 0.

    Baselines warm up over 2000 steps, or over a tenth of a run that is shorter than 20000; normalized arms do not warm up.
    """
    warmup = 0 if is_normalized(arm) else min(2000, steps // 10)
    return Choices({}, {}, ScheduleConfig("cosine", warmup_steps=warmup))


def default(arm: str, preset: Preset, steps: int) -> Choices:
    """What learns fastest where users start (docs/experiments.md), the paper's recipe at the paper's own 0.5B shape.

    GPT: the paper's 0.02 is the right spread of weights at 1024 channels; narrower models want it wider, so it goes with
    1/sqrt(d_model). nGPT: eigen learning rates start at the paper's 0.05 for 24 layers and higher for fewer, as
    1/sqrt(n_layers); the logits' scale starts at sqrt(d_model), since under Adam it cannot grow there in a short run; the
    output embedding learns at half the rate. Encoder-decoders: source and target share their input embedding.
    """
    choices = paper(arm, preset, steps)
    own = {"share_embeddings": True} if issubclass(ARMS[arm][1], EncoderDecoder) else {}
    if not is_normalized(arm):
        return Choices({"init_std": 0.02 * math.sqrt(1024 / preset.d_model), **own}, {}, choices.schedule)
    model = {**own, "s_z_init": math.sqrt(preset.d_model), "alpha_init": 0.05 * math.sqrt(24 / preset.n_layers)}
    return Choices(model, {"multipliers": RateMultipliers(output_embedding=0.5)}, choices.schedule)


def nugpt(arm: str, preset: Preset, steps: int) -> Choices:
    """nuGPT (arXiv 2604.27077): one peak learning rate for every width, depth and length, carried over from `preset.base`.

    Its rules are `optim.transfer`; here are its constants: alpha from 0.05 at its 10 layers, the scales stored at 0.03, no
    warm-up, cosine to a tenth, eps 1e-16. Ours is the start of s_z at the base, sqrt(d_model) instead of 1, as in the
    default recipe. The rule for length stands in the multipliers too, so that `lr` is the base's everywhere. Keep d_k and
    the batch size of the base. GPT has no such rules: it is the default recipe's.
    """
    if not is_normalized(arm):
        return default(arm, preset, steps)
    base = preset.base or BaseShape(preset.d_model, preset.n_layers, preset.steps)
    rules = transfer(base, preset.d_model, preset.n_layers, steps)
    model = {
        "alpha_init": 0.05 * 10 / base.n_layers * rules.alpha_init,
        "s_z_init": math.sqrt(base.d_model) * rules.s_z_init,
        **{f"{name}_scale": SCALE for name in ("alpha", "s_qk", "s_z")},
    }
    multipliers = RateMultipliers(**{role: rules.rate * getattr(rules.multipliers, role) for role in ROLES})
    return Choices(model, {"eps": 1e-16, "multipliers": multipliers}, ScheduleConfig("cosine", final=0.1))


def muon(arm: str, preset: Preset, steps: int) -> Choices:
    """The default recipe with Muon for block matrices, in both arms; their rate is a fixed multiple of Adam's, tuned here."""
    choices = default(arm, preset, steps)
    multipliers = choices.optim.get("multipliers", RateMultipliers())
    optim = {
        "optimizer": "muon",
        "multipliers": dataclasses.replace(multipliers, matrix=MUON_TO_ADAM[is_normalized(arm)]),
    }
    return Choices(choices.model, {**choices.optim, **optim}, choices.schedule)


MUON_TO_ADAM = {False: 0.625, True: 2.0}
"""Muon's rate over Adam's, for baselines and for normalized arms; on the sphere Muon's is an angle."""


def training_ngpt(arm: str, preset: Preset, steps: int) -> Choices:
    """The recipe of "Training nGPT" (arXiv 2608.01284) on the default's starts: four choices, each also a field of its own.

    Logit gradient preconditioning (`logit_preconditioning`), logarithmic decay after a tenth of warm-up (`schedule`, `rho`),
    GatedAdamW (`optimizer`, `eps_gate`, `gated_step`), and the angular step cap (`max_angle`). rho, eps_gate and the cap are
    ours: the paper's are not known here. GPT takes the schedule alone; the rest is not about it.
    """
    choices = default(arm, preset, steps)
    schedule = ScheduleConfig("log", warmup_steps=steps // 10, rho=0.1)
    if not is_normalized(arm):
        return dataclasses.replace(choices, schedule=schedule)
    optim = {"optimizer": "gated_adamw", "eps": 1e-16, "eps_gate": 1e-8, "max_angle": 0.1, "angle_follows_lr": True}
    return Choices({**choices.model, "logit_preconditioning": 1.0}, {**choices.optim, **optim}, schedule)


def _starts(name: str, inits: tuple[str, ...], scales: tuple[str, ...]) -> dict[str, tuple[str, str, str]]:
    return {f"{name}-from-{init}-at-{scale}": (name, init, scale) for init in inits for scale in scales}


STARTS = {
    **_starts("s_qk", ("1", "0.33", "0.05"), ("rsqrt", "1")),
    **_starts("s_uv", ("1", "rsqrt"), ("1", "rsqrt")),
    **_starts("s_z", ("1", "sqrt"), ("rsqrt", "1")),
}
"""Table 4: which scale, its init, and what it is stored at, in words: rsqrt is 1/sqrt(d_model), sqrt is sqrt(d_model)."""

FIELDS: dict[str, dict[str, Any]] = {
    **{f"{name}-{form}": {f"{name}_form": form} for name in ("s_qk", "s_z", "alpha") for form in ("scalar", "fixed")},
    **{f"s_uv-{form}": {"s_u_form": form, "s_v_form": form} for form in ("scalar", "fixed")},
    "no-qk-norm": {"qk_norm": False},
    "alpha-free": {"alpha_sign": "free"},
    "riemannian": {"step": "riemannian"},
}
"""Tables 5 and 6: what differs from the base."""


def start_fields(name: str, init: str, scale: str, d_model: int) -> dict[str, float]:
    """The fields of an `NGPTConfig` that an entry of `STARTS` stands for."""
    numbers = {"rsqrt": 1 / math.sqrt(d_model), "sqrt": math.sqrt(d_model)}
    values = {"init": numbers.get(init) or float(init), "scale": numbers.get(scale) or float(scale)}
    names = ("s_u", "s_v") if name == "s_uv" else (name,)
    return {f"{one}_{what}": value for one in names for what, value in values.items()}


def ablation(name: str) -> Recipe:
    """The paper's recipe with one change to nGPT, by its name in Tables 4 to 6; GPT is the paper's."""

    def recipe(arm: str, preset: Preset, steps: int) -> Choices:
        choices = paper(arm, preset, steps)
        if not is_normalized(arm):
            return choices
        fields = start_fields(*STARTS[name], preset.d_model) if name in STARTS else FIELDS[name]
        return dataclasses.replace(choices, model={**choices.model, **fields})

    return recipe


BASES = ("s_qk-from-1-at-rsqrt", "s_uv-from-1-at-1", "s_z-from-1-at-rsqrt")
"""What Table 4 repeats: the paper's own starts."""

ABLATIONS: dict[str, Recipe] = {name: ablation(name) for name in (*STARTS, *FIELDS) if name not in BASES}
"""Tables 4 to 6 of the nGPT paper, in its order; their base is "paper", whose learning rate they take."""

WAYS: dict[str, Recipe] = {
    "default": default,
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


def tuned_rate(preset: Preset, recipe: str, arm: str) -> float | None:
    """The peak learning rate that was tuned for this; where a recipe changes nothing that it hangs on, another's."""
    if recipe in ABLATIONS:
        recipe = "paper"
    elif recipe == "nugpt" and not is_normalized(arm):
        recipe = "default"
    return preset.rates.get((recipe, arm))


PRESETS: dict[str, Preset] = {
    "demo": Preset(
        n_layers=4,
        d_model=128,
        n_heads=2,
        seq_len=256,
        batch_size=4,
        steps=240,
        rates={
            ("default", "gpt"): 4e-3,
            ("default", "ngpt"): 1.6e-2,
            ("paper", "gpt"): 4e-3,
            ("paper", "ngpt"): 3.2e-2,
            ("nugpt", "ngpt"): 1.6e-2,
            ("muon", "gpt"): 2e-2,
            ("muon", "ngpt"): 1.6e-2,
            ("training-ngpt", "gpt"): 4e-3,
            ("training-ngpt", "ngpt"): 1.6e-2,
        },
        eval_every=40,
        eval_windows=32,
        compile=False,
        base=BaseShape(128, 4, 240),
    ),
    "pairs": Preset(
        n_layers=2,
        d_model=128,
        n_heads=4,
        seq_len=64,
        batch_size=32,
        steps=600,
        rates={
            ("default", "encdec"): 4e-3,
            ("default", "nencdec"): 1e-2,
        },
        eval_every=100,
        eval_windows=512,
        compile=False,
        label_smoothing=0.1,
    ),
    "0.3m": small_size(4, 64, 1),
    "1m": small_size(4, 128, 2),
    "4m": small_size(6, 192, 3),
    "12m": small_size(7, 320, 5),
    "0.5b-1k": paper_size(24, 1024, 16, 1024),
    "0.5b-4k": paper_size(24, 1024, 16, 4096),
    "0.5b-8k": paper_size(24, 1024, 16, 8192),
    "1b-1k": paper_size(36, 1280, 20, 1024),
    "1b-4k": paper_size(36, 1280, 20, 4096),
    "1b-8k": paper_size(36, 1280, 20, 8192),
}


def _look_up(kind: str, name: str, among: Mapping[str, Any]) -> Any:
    if name not in among:
        raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(among)}")
    return among[name]


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
    overrides: fields of `TrainConfig` (`steps`, `seq_len`, ...), of the model's config (`d_model`, `alpha_init`, ...), of
    the optimizer's or the schedule's (`schedule` is its kind), and for each role's rate multiplier `matrix_rate` and the
    like; `d_k`, the width of a head, makes n_heads follow d_model; `None` leaves a field as it is. Raises `ValueError` naming
    an unknown arm, preset, recipe or field.
    """
    config_class, _ = _look_up("arm", arm, ARMS)
    size: Preset = _look_up("preset", preset, PRESETS)
    make: Recipe = _look_up("recipe", recipe, RECIPES)
    given = {key: value for key, value in overrides.items() if value is not None}
    given |= _heads(given)
    size = dataclasses.replace(size, **_take(given, Preset))
    choices = make(arm, size, size.steps)
    rate = tuned_rate(size, recipe, arm) if lr is None else lr
    if rate is None:
        raise ValueError(f"no learning rate was tuned for {arm} at {preset!r} by {recipe!r}: give --lr")
    optim = {"lr": rate, **choices.optim, **_take(given, OptimConfig)}
    optim["multipliers"] = _multipliers(optim.get("multipliers", RateMultipliers()), given)
    train = {"steps": size.steps, "seq_len": size.seq_len, "batch_size": size.batch_size}
    train |= {
        name: getattr(size, name)
        for name in ("micro_batch_size", "eval_every", "eval_windows", "compile", "label_smoothing")
    }
    shape = {name: getattr(size, name) for name in ("n_layers", "d_model", "n_heads")}
    model = {"vocab_size": vocab_size or size.vocab_size, "max_seq_len": size.seq_len, **shape, **choices.model}
    config = RunConfig(
        arm=arm,
        recipe=recipe,
        preset=preset,
        model=config_class(**(model | _take(given, config_class))),
        optim=OptimConfig(**optim),
        schedule=_schedule(choices.schedule, given),
        train=TrainConfig(**(train | _take(given, TrainConfig))),
        data=data,
    )
    if given:
        raise ValueError(f"no field is called {', '.join(sorted(given))}")
    return config


def _take(given: dict[str, Any], owner: Any) -> dict[str, Any]:
    """Remove from `given` the fields of the dataclass `owner` and return them."""
    return {f.name: given.pop(f.name) for f in dataclasses.fields(owner) if f.name in given}


def _heads(given: dict[str, Any]) -> dict[str, int]:
    """Remove `d_k` from `given`; the number of heads that it makes of the `d_model` that is there."""
    if "d_k" not in given:
        return {}
    d_k = given.pop("d_k")
    if "d_model" not in given or "n_heads" in given or not d_k > 0 or given["d_model"] % d_k:
        raise ValueError(f"d_k={d_k} needs a d_model that it divides, and no n_heads beside it")
    return {"n_heads": given["d_model"] // d_k}


def _multipliers(chosen: RateMultipliers, given: dict[str, Any]) -> RateMultipliers:
    """Remove the multipliers from `given` and set them."""
    found = {role: given.pop(f"{role}_rate") for role in ROLES if f"{role}_rate" in given}
    return dataclasses.replace(chosen, **found)


def _schedule(chosen: ScheduleConfig, given: dict[str, Any]) -> ScheduleConfig:
    """Remove the schedule's fields from `given` and set them."""
    kind = {"kind": given.pop("schedule")} if "schedule" in given else {}
    return dataclasses.replace(chosen, **kind, **_take(given, ScheduleConfig))
