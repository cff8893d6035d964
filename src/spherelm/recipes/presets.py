"""Sizes of runs and their lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import PositiveInt

from spherelm.fields import check
from spherelm.models import Architecture, DecoderArch, EncDecArch, EncoderArch
from spherelm.models.config import ExpertSizes
from spherelm.optim.transfer import BaseShape
from spherelm.runs.config import TrainConfig


@dataclass(frozen=True)
class Preset:
    """A shape and a length, and nothing else: what is learned how fast is a recipe's business.

    about: one line for the list of presets. micro_batch_size: at most so many sequences at once, see `TrainConfig`.
    compile: whether the run is long enough to earn back the time that compilation takes. For pairs seq_len is the
    longest text of either side and batch_size the pairs of an update. architecture: of the model; n_layers counts the
    letters of its pattern. model: what else belongs to the shape, as fields of the model's config. base: the shape that
    the recipe "nugpt" starts from, where it is asked for another than its own.
    """

    n_layers: PositiveInt
    d_model: PositiveInt
    n_heads: PositiveInt
    seq_len: PositiveInt
    batch_size: PositiveInt
    steps: PositiveInt
    micro_batch_size: int | None = TrainConfig.micro_batch_size
    eval_every: int = TrainConfig.eval_every
    eval_windows: int = TrainConfig.eval_windows
    compile: bool = TrainConfig.compile
    vocab_size: int | None = None
    label_smoothing: float = TrainConfig.label_smoothing
    architecture: Architecture = field(default_factory=DecoderArch)
    model: Mapping[str, Any] = field(default_factory=dict)
    base: BaseShape | None = None
    about: str = ""

    def __post_init__(self) -> None:
        check(self)


def paper_size(n_layers: int, d_model: int, n_heads: int, context: int) -> Preset:
    """A run of the nGPT paper: 512 sequences a batch, LLaMA-2's 32000 tokens, 52 billion tokens."""
    steps = round(52e9 / (512 * context))
    about = "a run of the nGPT paper"
    return Preset(n_layers, d_model, n_heads, context, 512, steps, 8, 1000, vocab_size=32000, about=about)


def small_size(n_layers: int, d_model: int, n_heads: int) -> Preset:
    """A size of the ladder in docs/evidence.md: heads of 64, 1024 tokens an update,
    5 tokens for each block parameter.
    """
    steps = round(5 * 16 * n_layers * d_model**2 / 1024)
    about = "a size of the ladder: 5 tokens for each block parameter"
    return Preset(n_layers, d_model, n_heads, 256, 4, steps, eval_every=steps // 8, about=about)


def demo_size(about: str, **own: Any) -> Preset:
    """A run of minutes on a laptop: 4 layers of 128 channels and 240 updates of 1024 tokens, with what is its `own`."""
    sizes = {"n_layers": 4, "d_model": 128, "n_heads": 2, "seq_len": 256, "batch_size": 4, "steps": 240}
    return Preset(**{**sizes, "eval_every": 40, "eval_windows": 32, "compile": False, **own}, about=about)


def demo_hybrid(pattern: str, about: str) -> Preset:
    """The layers of `pattern` at the demo's width, length and number of tokens."""
    return demo_size(about, n_layers=len(pattern), architecture=DecoderArch(pattern=pattern))


def four_bit_size(n_layers: int, d_model: int, n_heads: int, about: str, **own: Any) -> Preset:
    """A shape of "Normalized Architectures are Natively 4-Bit" (arXiv 2605.06067), and its run:
    122 million sequences of 8192.

    MLPs have squared ReLU and are 3 d_model wide. The paper's digest does not say how many entries the vocabulary has:
    2^17 make 1.2 billion parameters of the dense shape. Ours as well: the run of the hybrid is as long
    as the dense one's.
    """
    model = {"activation": "relu2", **own.pop("model")}
    steps = round(122e6 / 768)
    return Preset(
        n_layers, d_model, n_heads, 8192, 768, steps, 1, 1000, vocab_size=2**17, model=model, about=about, **own
    )


FOUR_BIT_HYBRID = DecoderArch(
    pattern="MOMOMAOMOMOMAOMOMOMAOMOMOMAOMOMOMAOMOMOMOMAOMOMOMOMO",
    experts=ExpertSizes(n_experts=128, experts_per_token=6, n_shared_experts=2, d_expert=1856),
)
"""Its 52 layers, of which the paper's digest shows the first: as in NVIDIA's Nemotron 3 Nano, which begins so."""

PRESET = "demo"
"""The preset of a run for which none is named."""

PRESETS: dict[str, Preset] = {
    PRESET: demo_size("minutes on a laptop, on the text that ships with spherelm"),
    "encoder": demo_size("the demo as an encoder that fills in hidden tokens", architecture=EncoderArch()),
    "pairs": demo_size(
        "an encoder-decoder for pairs of short texts",
        n_layers=2,
        n_heads=4,
        seq_len=64,
        batch_size=32,
        steps=600,
        eval_every=100,
        eval_windows=512,
        label_smoothing=0.1,
        architecture=EncDecArch(),
    ),
    "moe": demo_hybrid("AOAOAOAO", "the demo with mixtures of experts"),
    "hybrid": demo_hybrid("MAM-MAM-", "the demo with Mamba-2 mixers"),
    "hybrid-moe": demo_hybrid("MAMOMAMO", "the demo with mixers and experts"),
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
    "1.2b-8k": four_bit_size(
        20, 2048, 16, "the dense run of the four-bit nGPT paper", model={"n_kv_heads": 4, "rope_base": 1e6}
    ),
    "30b-8k": four_bit_size(
        52, 2688, 21, "the hybrid of the four-bit nGPT paper", model={"rope": "none"}, architecture=FOUR_BIT_HYBRID
    ),
}
