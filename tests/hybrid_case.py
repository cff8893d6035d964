"""Small float64 hybrids, the same weights for the oracle, and one batch in which some targets are ignored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import paper
import paper_hybrid
import torch
from oracle_names import oracle_parameters
from paper_moe import Experts
from torch import Tensor

from spherelm.models import HybridConfig, LanguageModel, NHybridConfig, build

SIZES: dict[str, Any] = {"vocab_size": 37, "d_model": 24, "n_heads": 3, "d_ff": 40, "max_seq_len": 32}
MIXERS: dict[str, Any] = {"mamba_d_head": 12, "mamba_d_state": 5, "mamba_chunk": 4, "mamba_groups": 2, "mamba_conv": 3}
EXPERTS: dict[str, Any] = {"n_experts": 4, "d_expert": 10}
ARMS = ("hybrid", "nhybrid")
CONFIGS = {"hybrid": HybridConfig, "nhybrid": NHybridConfig}
ORACLES = {"hybrid": paper_hybrid.hybrid, "nhybrid": paper_hybrid.nhybrid}


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


def hybrid_config(arm: str, pattern: str = "MAM-", **fields: Any) -> HybridConfig | NHybridConfig:
    """A small model of the layers in ``pattern``."""
    config_class: Any = CONFIGS[arm]
    config: HybridConfig | NHybridConfig = config_class(
        n_layers=len(pattern), pattern=pattern, **{**SIZES, **MIXERS, **EXPERTS, **fields}
    )
    return config


def make_hybrid_case(arm: str, pattern: str = "MAM-", **fields: Any) -> HybridCase:
    """The same case at every call. All gains and scales differ and some alphas are negative, so that nothing cancels."""
    config = hybrid_config(arm, pattern, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(config).double()
    assert isinstance(model, LanguageModel)
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in oracle_parameters(model):
            axis = paper.unit_axis(name)
            if axis is None:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if name.endswith("conv_bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if "alpha" in name:
                parameter.mul_(4 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if arm == "hybrid" and axis is not None:
                parameter.mul_(5)
            if arm == "nhybrid" and axis is not None:
                parameter.copy_(paper.norm(parameter, axis))
    tokens = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets[0, :3] = targets[2, 5] = -100
    weights = {name: parameter.detach().clone() for name, parameter in oracle_parameters(model)}
    return HybridCase(arm, model, weights, hybrid_shape(config), tokens, targets)


def hybrid_shape(config: HybridConfig | NHybridConfig) -> paper_hybrid.Shape:
    """What the oracle needs to know of ``config``."""
    names = ("alpha", "s_qk", "s_u", "s_v", "s_z", "s_mamba") if isinstance(config, NHybridConfig) else ()
    return paper_hybrid.Shape(
        config.n_layers,
        config.d_model,
        config.n_heads,
        config.n_kv_heads or config.n_heads,
        config.rope_base,
        pattern=config.pattern,
        heads=config.mamba_expand * config.d_model // config.mamba_d_head,
        d_state=config.mamba_d_state,
        groups=config.mamba_groups,
        experts=Experts(
            config.experts_per_token, config.router_score, config.experts_per_token > 1, config.n_shared_experts
        ),
        **{n: (getattr(config, f"{n}_init"), getattr(config, f"{n}_scale") or 0.0) for n in names},
    )
