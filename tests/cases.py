"""Small float64 models of every architecture, the same weights for the oracle, one batch,
and what the oracle holds them to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import paper
import paper_hybrid
import pytest
import torch
from configs import make_config, scales_of
from oracle_names import oracle_names, oracle_parameters
from paper_moe import Experts
from torch import Tensor, nn

from spherelm.layers.linear import Scale, departure, retract, unit_modules
from spherelm.layers.moe import MixtureOfExperts, Router, UnitMixtureOfExperts
from spherelm.models import Config, Decoder, EncDecArch, NGPTConfig, build
from spherelm.models.decoder import KITS, Block
from spherelm.optim.groups import OptimConfig, build_optimizer, set_rate

ARMS = ("gpt", "ngpt")
TINY: dict[str, Any] = {"vocab_size": 37, "n_layers": 2, "d_model": 24, "n_heads": 3, "d_ff": 40, "max_seq_len": 16}
MIXERS: dict[str, Any] = {"mamba_d_head": 12, "mamba_d_state": 5, "mamba_chunk": 4, "mamba_groups": 2, "mamba_conv": 3}
EXPERTS: dict[str, Any] = {"n_experts": 4, "d_expert": 10}
LENGTHS = (5, 8, 1)
"""Real tokens of each source of the batch of pairs, which is 8 wide."""
LR = 3e-3


def encoder_logits(p: paper.Params, shape: paper.Shape, tokens: Tensor) -> Tensor:
    """The encoder of an encoder-decoder, with a read-out, row by row."""
    inside = {f"encoder.{name}" if name.startswith(("blocks.", "norm.")) else name: w for name, w in p.items()}
    if "s_z.value" not in p:
        return torch.stack([paper.gpt_encoder(inside, shape, row) @ p["head.weight"].T for row in tokens])
    s_z = paper.effective(p["s_z.value"], shape.s_z, shape.d_model)
    return torch.stack([s_z * (paper.encoder(inside, shape, row) @ p["head.weight"].T) for row in tokens])


ORACLES: dict[str, tuple[paper.Forward, paper.Forward]] = {
    "decoder": (paper.gpt, paper.ngpt),
    "hybrid": (paper_hybrid.hybrid, paper_hybrid.nhybrid),
    "encdec": (paper.encdec, paper.nencdec),
    "encoder": (encoder_logits, encoder_logits),
}
"""For each kind of model, the oracle of the baseline and that of nGPT."""


@dataclass
class Case:
    """A model, its weights for the oracle, and a batch in which some targets,
    and all padding of sources, are ignored.
    """

    arm: str
    model: Any
    forward: paper.Forward
    weights: paper.Params
    shape: Any
    tokens: Tensor
    targets: Tensor
    source: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The source, if there is one, and the tokens, as the model takes them."""
        return (self.tokens,) if self.source is None else (self.source, self.tokens)

    @property
    def batch(self) -> tuple[Tensor, ...]:
        """The same and the targets, as the model's loss takes them."""
        return (*self.inputs, self.targets)

    @property
    def read(self) -> Any:
        """The same as the oracle takes them: a pair where there is a source."""
        return self.tokens if self.source is None else self.inputs

    def rolled(self, count: int) -> Iterator[Case]:
        """So many different batches: the positions of tokens and targets rolled."""
        return (replace(self, tokens=self.tokens.roll(i, 1), targets=self.targets.roll(i, 1)) for i in range(count))

    def batches(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        """Those batches as the model's loss takes them."""
        return (case.batch for case in self.rolled(count))


def config_of(arm: str, kind: str = "decoder", **fields: Any) -> Config:
    """A small config: two layers, or one for each letter of a pattern; of pairs, an encoder of three before them."""
    more: dict[str, Any] = {"n_encoder_layers": 3} if kind == "encdec" else {}
    if "pattern" in fields:
        more = {"n_layers": len(str(fields["pattern"])), "max_seq_len": 32, **MIXERS, **EXPERTS}
    return make_config(arm, kind, **{**TINY, **more, **fields})


def pair_config(arm: str, **fields: Any) -> Config:
    return config_of(arm, "encdec", **fields)


def hybrid_config(arm: str, pattern: str = "MAM-", **fields: Any) -> Config:
    return config_of(arm, pattern=pattern, **fields)


def make_case(arm: str, kind: str = "decoder", **fields: Any) -> Case:
    """The same case at every call, its weights disturbed."""
    config = config_of(arm, kind, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(config).double()
    noise, source = torch.Generator().manual_seed(7), None
    weights = disturb(model, arm, noise)
    if kind == "encdec":
        source = torch.randint(config.vocab_size, (3, max(LENGTHS)), generator=noise)
        for row, length in zip(source, LENGTHS, strict=True):
            row[length:] = -100
    tokens = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets[0, :3] = targets[2, 5] = -100
    if kind == "encoder":
        tokens[:2, 4] = model.mask_token
    forward = ORACLES[kind if config.pattern is None else "hybrid"][ARMS.index(arm)]
    return Case(arm, model, forward, weights, oracle_shape(config), tokens, targets, source)


def make_pair_case(arm: str, **fields: Any) -> Case:
    return make_case(arm, "encdec", **fields)


def make_hybrid_case(arm: str, pattern: str = "MAM-", **fields: Any) -> Case:
    return make_case(arm, pattern=pattern, **fields)


def oracle_shape(config: Config) -> paper.Shape:
    """The constants that the oracle needs of a config."""
    sizes = config.n_layers, config.d_model, config.n_heads, config.kv_heads, config.rope_base
    scales: dict[str, Any] = scales_of(config, "alpha", "s_qk", "s_u", "s_v", "s_z")
    scales |= {"inner_norm": config.variant.inner_norm} if isinstance(config, NGPTConfig) else {}
    if config.pattern is None:
        encoder = config.architecture.n_encoder_layers if isinstance(config.architecture, EncDecArch) else None
        return paper.Shape(*sizes, **scales, n_encoder_layers=encoder or config.n_layers)
    mixer, e = config.mamba, config.experts
    return paper_hybrid.Shape(
        *sizes,
        **scales,
        **scales_of(config, "s_mamba"),
        pattern=config.pattern,
        heads=mixer.n_heads,
        d_state=mixer.d_state,
        groups=mixer.n_groups,
        experts=Experts(e.experts_per_token, e.router_score, e.experts_per_token > 1, e.n_shared_experts),
    )


def disturb(model: nn.Module, arm: str, noise: torch.Generator) -> paper.Params:
    """Make all gains and scales differ and some alphas negative, so that nothing cancels;
    the weights for the oracle.
    """
    with torch.no_grad():
        for name, parameter in oracle_parameters(model):
            axis = paper.unit_axis(name)
            if axis is None:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if name.endswith("conv_bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if "alpha" in name:
                parameter.mul_(4 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if arm == "gpt" and axis is not None:
                parameter.mul_(5)
            # float32 initialization is unit to 1e-7 only: here the oracle and the model start at the same double
            if arm == "ngpt" and axis is not None:
                parameter.copy_(paper.norm(parameter, axis))
    return {name: parameter.detach().clone() for name, parameter in oracle_parameters(model)}


# ------------------------------------------------------------------------------------------------- held to the oracle


def assert_near(ours: Tensor, oracle: Tensor, tolerance: float, what: str = "") -> None:
    """Equal to so much of the oracle's largest number."""
    assert ours.shape == oracle.shape
    assert (ours - oracle).abs().max() <= tolerance * oracle.abs().max(), what


def assert_computes(c: Case, tolerance: float = 1e-12) -> None:
    """Logits, the loss and every gradient are the oracle's."""
    assert_near(c.model(*c.inputs), c.forward(c.weights, c.shape, c.read), 1e-12)
    loss, gradients = paper.loss_and_gradients(c.forward, c.weights, c.shape, c.read, c.targets)
    ours = c.model.loss(*c.batch)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-13)
    parameters = dict(oracle_parameters(c.model))
    assert parameters.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert parameters[key].grad is not None
        assert_near(parameters[key].grad, gradient, tolerance, key)


def assert_trained(c: Case, losses: list[float], wanted: tuple[list[float], paper.Params]) -> None:
    """Losses to 1e-9 relative, weights to 1e-9 of the largest of their tensor, and every one of them moved."""
    assert losses == pytest.approx(wanted[0], rel=1e-9)
    for name, p in oracle_parameters(c.model):
        assert_near(p.detach(), wanted[1][name], 1e-9, name)
        assert (p.detach() - c.weights[name]).abs().max() > 1e-6, f"{name} did not move"


def train(
    model: Decoder, config: OptimConfig, batches: Iterable[tuple[Tensor, ...]], schedule: list[float] | None = None
) -> list[float]:
    """Trains `model` as its own loop would, one update a batch at `schedule[i]` of the peak rate; the losses."""
    optimizer = build_optimizer(model, config)
    losses = []
    for i, batch in enumerate(batches):
        if schedule is not None:
            set_rate(optimizer, config.lr * schedule[i])
        optimizer.zero_grad()
        loss = model.loss(*batch)
        loss.backward()
        if config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_trains(c: Case, updates: int) -> None:
    """Losses and weights are the oracle's over so many updates."""
    losses = train(c.model, OptimConfig(lr=LR), c.batches(updates))
    batches = ((case.read, case.targets) for case in c.rolled(updates))
    assert_trained(c, losses, paper.train(c.forward, c.weights, c.shape, batches, paper.paper_recipe(c.arm, LR)))


def assert_retracts(c: Case) -> set[str]:
    """Every matrix is declared along the paper's axis and goes back to the sphere along it; their names."""
    names = oracle_names(c.model.state_dict())
    declared = {names[f"{name}.weight"]: axis for name, _, axis in unit_modules(c.model)}
    assert declared == {name: axis for name in c.weights if (axis := paper.unit_axis(name)) is not None}
    with torch.no_grad():
        for parameter in c.model.parameters():
            parameter.mul_(1.7)
    wanted = paper.retract({name: p.detach() for name, p in oracle_parameters(c.model)})
    retract(c.model)
    assert departure(c.model) < 1e-14
    for name, parameter in oracle_parameters(c.model):
        assert_near(parameter.detach(), wanted[name], 1e-14, name)
    return set(declared)


# ------------------------------------------------------------------------------------------------- with experts

WITH_EXPERTS: dict[str, Any] = {
    "vocab_size": 23, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "max_seq_len": 8
}  # fmt: skip
E, D_FF = 6, 12


def mixture(arm: str, d_model: int = 16, n_experts: int = E, top_k: int = 2, **router: Any) -> nn.Module:
    """The arm's mixture of experts."""
    chooser = Router(d_model, n_experts, top_k, **router)
    if arm == "gpt":
        return MixtureOfExperts(d_model, D_FF, chooser)
    scales = (Scale(1, 1.0, 1.0), Scale((n_experts, D_FF), 1.0, 1.0), Scale((n_experts, D_FF), 1.0, 1.0))
    return UnitMixtureOfExperts(d_model, D_FF, chooser, *scales)


def model_with_experts(arm: str = "ngpt", **router: Any) -> Decoder:
    """A decoder of two layers with experts in place of its MLPs."""
    model = build(make_config(arm, **WITH_EXPERTS))
    for i, block in enumerate(model.blocks):
        experts = KITS[arm].sublayer(model.config, mixture(arm, **router))
        model.blocks[i] = Block("AO", {"attention": block.attention, "experts": experts})
    model.init_weights()
    return model
