"""Sizes of runs, their lengths, and the peak learning rates tuned for them: here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import PositiveInt

from spherelm.fields import check
from spherelm.models import ARMS, Architecture, DecoderArch, EncDecArch, EncoderArch
from spherelm.optim.transfer import BaseShape

WAYS = ("adam", "paper", "nugpt", "muon", "training-ngpt")
"""The recipes that rates are tuned for, by name; `recipes.WAYS` says what they are. "default" is the best of them."""


@dataclass(frozen=True)
class Preset:
    """A size, a length and the peak learning rates tuned for them.

    about: one line for the list of presets.
    rates: the peak learning rate by (recipe, arm). micro_batch_size: at most so many sequences at once, see `TrainConfig`.
    compile: whether the run is long enough to earn back the time that compilation takes. base: the shape at which the rate
    of the recipe "nugpt" was tuned. For pairs seq_len is the longest text of either side and
    batch_size the pairs of an update. architecture: of the model; n_layers counts the letters of its pattern. logit_scale:
    where nGPT's s_z starts in the recipes "adam" and "muon" (in a run as long as the base's, `start_of_logits`),
    `None` for sqrt(d_model): longer runs and surer predictions want more. even_start: whether logits and attention start nearly
    even and little decays in those recipes, as short runs want it (`recipes.EVEN_START`, `recipes.SHORT_DECAY`). Found
    at 64 and 128 channels and carried over to the ladder's wider sizes.
    """

    n_layers: PositiveInt
    d_model: PositiveInt
    n_heads: PositiveInt
    seq_len: PositiveInt
    batch_size: PositiveInt
    steps: PositiveInt
    rates: Mapping[tuple[str, str], float]
    micro_batch_size: int | None = None
    eval_every: int = 100
    eval_windows: int = 64
    compile: bool = True
    vocab_size: int | None = field(default=None)
    base: BaseShape = field(kw_only=True)
    label_smoothing: float = 0.0
    architecture: Architecture = field(default_factory=DecoderArch)
    logit_scale: float | None = None
    even_start: bool = False
    about: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        check(self)


def paper_size(n_layers: int, d_model: int, n_heads: int, context: int) -> Preset:
    """A run of the nGPT paper: 512 sequences a batch, LLaMA-2's 32000 tokens, 52 billion tokens.

    The rate 1e-3 is that of the paper's ablations at 0.5B; each run of the paper had its own tuned one. Muon's is not known.
    """
    rates = {(recipe, arm): 1e-3 for recipe in WAYS if recipe != "muon" for arm in ARMS}
    steps = round(52e9 / (512 * context))
    base = BaseShape(1020, 10, steps)  # nuGPT's own, at the same length
    return Preset(
        n_layers,
        d_model,
        n_heads,
        context,
        512,
        steps,
        rates,
        8,
        1000,
        vocab_size=32000,
        base=base,
        about="a run of the nGPT paper",
    )


SMALLEST = BaseShape(64, 4, 320)
"""Where the rates of the small sizes come from (docs/evidence.md): 262 thousand block parameters, 328 thousand tokens.

Those of "adam" are the best of factors of two there; those of "muon" lie between what parabolas through such searches say there
and at four times the updates (docs/results/ladder.json); nuGPT's is docs/results/transfer.json's; the others are guesses.
"""

RATES_OF_SMALLEST = {
    ("adam", "gpt"): 3.2e-3,
    ("adam", "ngpt"): 1e-2,
    ("paper", "gpt"): 8e-3,
    ("paper", "ngpt"): 4e-2,
    ("muon", "gpt"): 2.8e-2,
    ("muon", "ngpt"): 1.4e-2,
    ("training-ngpt", "gpt"): 4e-3,
    ("training-ngpt", "ngpt"): 2e-2,
    ("nugpt", "ngpt"): 2e-2,
}


def small_size(n_layers: int, d_model: int, n_heads: int) -> Preset:
    """A size of the ladder in docs/evidence.md: heads of 64, 1024 tokens an update, 5 tokens for each block parameter.

    Rates are carried over from `SMALLEST` with (width ratio)^(-3/4) (length ratio)^(-1/3), a rule that is nuGPT's for block
    matrices and rough for everything else: `spherelm evidence` starts its search there. nuGPT's own needs none; GPT's with Muon
    does not go with the width (docs/results/ladder.json). The start of s_z was found at 64 channels, for 320 and for 1280
    updates.
    """
    steps = round(5 * 16 * n_layers * d_model**2 / 1024)
    length, width = (steps / SMALLEST.steps) ** (-1 / 3), (d_model / SMALLEST.d_model) ** -0.75
    rates = {
        key: float(f"{rate * length * (1 if key == ('muon', 'gpt') else width):.2g}")
        for key, rate in RATES_OF_SMALLEST.items()
    }
    rates["nugpt", "ngpt"] = RATES_OF_SMALLEST["nugpt", "ngpt"]  # at every size
    return Preset(
        n_layers, d_model, n_heads, 256, 4, steps, rates, eval_every=steps // 8, base=SMALLEST, logit_scale=22.63,
        even_start=True, about="a size of the ladder: 5 tokens for each block parameter",
    )  # fmt: skip


def demo_hybrid(pattern: str, baseline: float, normalized: float, about: str) -> Preset:
    """The layers of `pattern` at the demo's width, length and number of tokens.

    The peak rates were tuned with one seed (docs/experiments.md); the baseline's is that of its matrices.
    """
    rates = {("adam", "gpt"): baseline, ("adam", "ngpt"): normalized}
    return Preset(
        len(pattern), 128, 2, 256, 4, 240, rates, None, 40, 32, compile=False, even_start=True,
        architecture=DecoderArch(pattern=pattern), base=BaseShape(128, len(pattern), 240), about=about,
    )  # fmt: skip


PRESETS: dict[str, Preset] = {
    "demo": Preset(
        about="minutes on a laptop, on the text that ships with spherelm",
        n_layers=4,
        d_model=128,
        n_heads=2,
        seq_len=256,
        batch_size=4,
        steps=240,
        rates={
            ("adam", "gpt"): 2.8e-3,
            ("adam", "ngpt"): 1.6e-2,
            ("paper", "gpt"): 4e-3,
            ("paper", "ngpt"): 3.2e-2,
            ("nugpt", "ngpt"): 1.6e-2,
            ("muon", "gpt"): 2.8e-2,
            ("muon", "ngpt"): 1.3e-2,
            ("training-ngpt", "gpt"): 2e-3,
            ("training-ngpt", "ngpt"): 1.6e-2,
        },
        eval_every=40,
        eval_windows=32,
        compile=False,
        base=BaseShape(128, 4, 240),
        logit_scale=22.63,
        even_start=True,
    ),
    "encoder": Preset(
        about="the demo as an encoder that fills in hidden tokens",
        n_layers=4,
        d_model=128,
        n_heads=2,
        seq_len=256,
        batch_size=4,
        steps=240,
        rates={("adam", "gpt"): 2e-3, ("adam", "ngpt"): 1.6e-2},
        eval_every=40,
        eval_windows=32,
        compile=False,
        architecture=EncoderArch(),
        base=BaseShape(128, 4, 240),
        logit_scale=22.63,
        even_start=True,
    ),
    "pairs": Preset(
        about="an encoder-decoder for pairs of short texts",
        n_layers=2,
        d_model=128,
        n_heads=4,
        seq_len=64,
        batch_size=32,
        steps=600,
        rates={
            ("adam", "gpt"): 2e-3,
            ("adam", "ngpt"): 1e-2,
        },
        eval_every=100,
        eval_windows=512,
        compile=False,
        label_smoothing=0.1,
        architecture=EncDecArch(),
        base=BaseShape(128, 2, 600),
        logit_scale=25.0,
        even_start=True,
    ),
    "moe": demo_hybrid("AOAOAOAO", 4e-3, 1.6e-2, "the demo with mixtures of experts"),
    "hybrid": demo_hybrid("MAM-MAM-", 2e-3, 1.6e-2, "the demo with Mamba-2 mixers"),
    "hybrid-moe": demo_hybrid("MAMOMAMO", 2e-3, 1.6e-2, "the demo with mixers and experts"),
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
