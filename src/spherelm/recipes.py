"""Named runs: sizes (presets) and ways to train (recipes). A recipe is a function; an ablation is a one-field change.

`make_run("ngpt", "demo", "default")` puts them together. Sizes, lengths and tuned learning rates stand here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spherelm.models import ARMS, is_normalized
from spherelm.optim import OptimConfig, RateMultipliers, ScheduleConfig
from spherelm.train.config import RunConfig, TrainConfig


@dataclass(frozen=True)
class Preset:
    """A size, a length and the peak learning rates tuned for them.

    rates: the peak learning rate by (recipe, arm). micro_batch_size: sequences at once, see `TrainConfig`.
    compile: whether the run is long enough to earn back the time that compilation takes.
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

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "seq_len", "batch_size", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")


def paper_size(n_layers: int, d_model: int, n_heads: int, context: int) -> Preset:
    """A run of the nGPT paper: 512 sequences a batch, LLaMA-2's 32000 tokens, 52 billion tokens.

    The rate 1e-3 is that of the paper's ablations at 0.5B; each run of the paper had its own tuned one.
    """
    rates = {(recipe, arm): 1e-3 for recipe in RECIPES for arm in ARMS}
    steps = round(52e9 / (512 * context))
    return Preset(n_layers, d_model, n_heads, context, 512, steps, rates, 8, 1000, vocab_size=32000)


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
    output embedding learns at half the rate.
    """
    choices = paper(arm, preset, steps)
    if not is_normalized(arm):
        return Choices({"init_std": 0.02 * math.sqrt(1024 / preset.d_model)}, {}, choices.schedule)
    model = {"s_z_init": math.sqrt(preset.d_model), "alpha_init": 0.05 * math.sqrt(24 / preset.n_layers)}
    return Choices(model, {"multipliers": RateMultipliers(output_embedding=0.5)}, choices.schedule)


RECIPES: dict[str, Recipe] = {"default": default, "paper": paper}

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
        },
        eval_every=40,
        eval_windows=32,
        compile=False,
    ),
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
    overrides: fields of `TrainConfig` (`steps`, `seq_len`, ...), of the model's config (`d_model`, `alpha_init`, ...) or
    of the optimizer's; `None` leaves a field as it is. Raises `ValueError` naming an unknown arm, preset, recipe or field.
    """
    config_class, _ = _look_up("arm", arm, ARMS)
    size: Preset = _look_up("preset", preset, PRESETS)
    make: Recipe = _look_up("recipe", recipe, RECIPES)
    given = {key: value for key, value in overrides.items() if value is not None}
    size = dataclasses.replace(size, **_take(given, Preset))
    choices = make(arm, size, size.steps)
    if lr is None and (recipe, arm) not in size.rates:
        raise ValueError(f"no learning rate was tuned for {arm} at {preset!r} by {recipe!r}: give --lr")
    optim = {"lr": size.rates[recipe, arm] if lr is None else lr, **choices.optim, **_take(given, OptimConfig)}
    train = {"steps": size.steps, "seq_len": size.seq_len, "batch_size": size.batch_size}
    train |= {name: getattr(size, name) for name in ("micro_batch_size", "eval_every", "eval_windows", "compile")}
    shape = {name: getattr(size, name) for name in ("n_layers", "d_model", "n_heads")}
    model = {"vocab_size": vocab_size or size.vocab_size, "max_seq_len": size.seq_len, **shape, **choices.model}
    config = RunConfig(
        arm=arm,
        recipe=recipe,
        preset=preset,
        model=config_class(**(model | _take(given, config_class))),
        optim=OptimConfig(**optim),
        schedule=choices.schedule,
        train=TrainConfig(**(train | _take(given, TrainConfig))),
        data=data,
    )
    if given:
        raise ValueError(f"no field is called {', '.join(sorted(given))}")
    return config


def _take(given: dict[str, Any], owner: Any) -> dict[str, Any]:
    """Remove from `given` the fields of the dataclass `owner` and return them."""
    return {f.name: given.pop(f.name) for f in dataclasses.fields(owner) if f.name in given}
