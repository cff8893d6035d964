"""Small float64 hybrids, the same weights for the oracle, and one batch in which some targets are ignored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import paper
import paper_hybrid
import torch
from against_paper import disturb
from configs import make_config, scales_of
from paper_moe import Experts
from torch import Tensor

from spherelm.models import Config, LanguageModel, build

SIZES: dict[str, Any] = {"vocab_size": 37, "d_model": 24, "n_heads": 3, "d_ff": 40, "max_seq_len": 32}
MIXERS: dict[str, Any] = {"mamba_d_head": 12, "mamba_d_state": 5, "mamba_chunk": 4, "mamba_groups": 2, "mamba_conv": 3}
EXPERTS: dict[str, Any] = {"n_experts": 4, "d_expert": 10}
ARMS = ("gpt", "ngpt")
ORACLES = {"gpt": paper_hybrid.hybrid, "ngpt": paper_hybrid.nhybrid}


@dataclass
class HybridCase:
    """A model, its weights for the oracle, and a batch."""

    arm: str
    model: LanguageModel
    weights: paper.Params
    shape: paper_hybrid.Shape
    tokens: Tensor
    targets: Tensor

    @property
    def forward(self) -> paper.Forward:
        return ORACLES[self.arm]

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``count`` different batches: the positions rolled."""
        for i in range(count):
            yield self.tokens.roll(i, 1), self.targets.roll(i, 1)


def hybrid_config(arm: str, pattern: str = "MAM-", **fields: Any) -> Config:
    """A small model of the layers in ``pattern``."""
    sizes = {**SIZES, **MIXERS, **EXPERTS, **fields}
    return make_config(arm, n_layers=len(pattern), pattern=pattern, **sizes)


def make_hybrid_case(arm: str, pattern: str = "MAM-", **fields: Any) -> HybridCase:
    """The same case at every call, its weights disturbed."""
    config = hybrid_config(arm, pattern, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(config).double()
    assert isinstance(model, LanguageModel)
    noise = torch.Generator().manual_seed(7)
    weights = disturb(model, arm, noise)
    tokens = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets[0, :3] = targets[2, 5] = -100
    return HybridCase(arm, model, weights, hybrid_shape(config), tokens, targets)


def hybrid_shape(config: Config) -> paper_hybrid.Shape:
    """What the oracle needs to know of ``config``."""
    assert config.pattern is not None
    experts, mixer = config.experts, config.mamba
    return paper_hybrid.Shape(
        config.n_layers,
        config.d_model,
        config.n_heads,
        config.kv_heads,
        config.rope_base,
        pattern=config.pattern,
        heads=mixer.n_heads,
        d_state=mixer.d_state,
        groups=mixer.n_groups,
        experts=Experts(
            experts.experts_per_token,
            experts.router_score,
            experts.experts_per_token > 1,
            experts.n_shared_experts,
        ),
        **scales_of(config, "alpha", "s_qk", "s_u", "s_v", "s_z", "s_mamba"),
    )
