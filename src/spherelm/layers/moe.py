"""Mixtures of experts, plain and on the sphere: many MLPs, of which a router picks a few for each token.

The experts' matrices are banks, one parameter for all experts. Tokens are sorted by expert, so that each product is one
over contiguous groups of rows. A router keeps count of what it gives to whom: `optim.balancing` reads that, and moves
the bias by which the busy are picked less often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherelm.errors import UserError, unknown
from spherelm.layers.linear import INNER_NORMS, ExpertLinear, Linear, Scale, UnitExpertLinear
from spherelm.sphere import transformed


def softmax_scores(logits: Tensor) -> Tensor:
    """Softmax over all experts."""
    return torch.softmax(logits, -1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softmax": softmax_scores}
"""The functions from a router's logits [tokens, n_experts] to scores, by name."""

BALANCINGS = ("bias", "loss", "none")
"""Methods to balance the load of experts: a bias on the scores, moved after each update; an auxiliary loss; none."""


def normalized(scores: Tensor) -> Tensor:
    """Scores [tokens, top_k] over their sum, as the weights of a mean."""
    return scores / scores.sum(-1, keepdim=True)


def balance_loss(scores: Tensor, experts: Tensor, coefficient: float = 1.0, batch_load: Tensor | None = None) -> Tensor:
    """`coefficient E sum_e f_e P_e`: the sum is 1/E where all experts are alike, 1 where one has everything.

    The auxiliary loss of Switch Transformer (arXiv 2101.03961, eqs. 4 to 6).

    f_e: the part of all choices `experts` [tokens, top_k] that is e; P_e: the mean part that e has of a token's
    `scores` [tokens, E], through which the gradient goes (for sigmoid scores as DeepSeek-V3 has it, eqs. 17 to 20).
    batch_load: int64 [E], where the tokens are a part of a batch, the choices in all of it, of which f_e is then. The
    mean of the losses of equal parts is the loss of the batch then, since P_e is a mean over tokens.
    """
    if batch_load is None:
        chosen = F.one_hot(experts.flatten(), scores.shape[-1]).to(scores.dtype).mean(0)
    else:
        chosen = batch_load.to(scores.dtype) / batch_load.sum()
    return coefficient * scores.shape[-1] * (chosen * normalized(scores).mean(0)).sum()


def no_loss(scores: Tensor, experts: Tensor, coefficient: float, batch_load: Tensor | None) -> None:
    """In place of `balance_loss` where there is none."""


class Routing(NamedTuple):
    """Who computes what: `experts` int64 [tokens, top_k], best first, and their `weights` in the result,
    of the same shape.
    """

    experts: Tensor
    weights: Tensor


class Router(Linear):
    """Picks `top_k` of `n_experts` for each token, by scores of a plain matrix `weight` [n_experts, d_model].

    score: "sigmoid" or "softmax" over all experts. The weights of those picked are their scores, over their sum where
    `normalize`. Computed in float32 at least. balance: one of `BALANCINGS`. `score_bias` [n_experts], saved with the
    weights, is added to the scores for picking and for nothing else (DeepSeek-V3, eq. 16); the auxiliary loss times
    `coefficient`, as `pending`, waits to be added to the model's loss. `load` [n_experts] counts the choices in
    training mode until someone clears it; `seen` is the load of the last update; `batch_load` that of a whole batch
    while parts of it are computed.
    """

    score_bias: Tensor
    load: Tensor
    seen: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        score: str = "sigmoid",
        normalize: bool = True,
        balance: str = "bias",
        coefficient: float = 0.01,
    ) -> None:
        if not 1 <= top_k <= n_experts:
            raise UserError(f"top_k={top_k} of n_experts={n_experts} cannot be picked: choose 1 to {n_experts}")
        for name, value, known in (("router score", score, SCORES), ("balance", balance, BALANCINGS)):
            if value not in known:
                raise unknown(name, value, known)
        super().__init__(d_model, n_experts, role="router")
        self.top_k, self.balance, self.coefficient = top_k, balance, coefficient
        self.score, self.weigh = SCORES[score], normalized if normalize else torch.positive
        self.penalty = balance_loss if balance == "loss" else no_loss
        self.pending: Tensor | None = None
        self.batch_load: Tensor | None = None
        self.register_buffer("score_bias", torch.zeros(n_experts))
        for name in ("load", "seen"):
            self.register_buffer(name, torch.zeros(n_experts, dtype=torch.int64), persistent=False)

    def start(self, std: float) -> None:
        """Draw the weight again, from N(0, std), and balance from nothing."""
        super().start(std)
        self.reset_balance()

    def reset_balance(self) -> None:
        """No bias and nothing counted, as at the start."""
        for buffer in (self.score_bias, self.load, self.seen):
            buffer.zero_()
        self.pending = None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Routing:  # type: ignore[override]
        """[tokens, d_model] -> `Routing`; scale [1]: what `x` is multiplied by."""
        scores = self.score(super().forward(x.to(torch.promote_types(x.dtype, torch.float32)), scale))
        experts = (scores.detach() + self.score_bias).topk(self.top_k).indices
        if self.training:
            if transformed():
                raise RuntimeError(
                    "in training mode a router counts its choices, which torch.func cannot do: call model.eval()"
                )
            chosen = experts.flatten()
            self.load.scatter_add_(0, chosen, torch.ones_like(chosen))
            self.pending = self.penalty(scores, experts, self.coefficient, self.batch_load)
        return Routing(experts, self.weigh(scores.gather(-1, experts)))


class Groups(NamedTuple):
    """Choices in the order of experts. order: int64 [choices], which choice stands at each row; place: the reverse.

    ends: int32 [n_experts], where each expert's rows end.
    """

    order: Tensor
    place: Tensor
    ends: Tensor


def grouped(experts: Tensor, n_experts: int) -> Groups:
    """`experts` int64 [tokens, top_k] sorted by expert, and within each in the order of tokens."""
    chosen, order = experts.flatten().sort(stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    numbers = torch.arange(n_experts, device=chosen.device)
    return Groups(order, place, torch.searchsorted(chosen, numbers, right=True, out_int32=True))


def _taken(x: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
    return x.index_select(0, order // copies)


class _Taken(torch.autograd.Function):
    """`x[order // copies]`: every row of x, `copies` times.
    The way back is a gather too, whose sums have one order always.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.copies = copies
        ctx.save_for_backward(place)
        return _taken(x, order, place, copies)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        taken = grad_outputs[0].index_select(0, place)
        summed = taken if ctx.copies == 1 else taken.unflatten(0, (-1, ctx.copies)).sum(1)
        return summed, None, None, None


def mixed(h: Tensor, routing: Routing, n_experts: int, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The weighted sum of what each token's experts make of it: [tokens, d_model] -> [tokens, d_model].

    experts: (rows [choices, d_model] in the order of experts, ends as in `Groups`) -> [choices, d_model].
    """
    top_k = routing.experts.shape[-1]
    groups = grouped(routing.experts, n_experts)
    take = _taken if transformed() else _Taken.apply
    made = experts(take(h, groups.order, groups.place, top_k), groups.ends)
    back = take(made, groups.place, groups.order, 1).unflatten(0, (-1, top_k))
    return (routing.weights.unsqueeze(-1).to(back.dtype) * back).sum(1)


class MixtureOfExperts(nn.Module):
    """The baseline's: `sum_i w_i W_o,i (u_i * SiLU(v_i))` over the experts i that `router` picks,
    plus the `shared` ones.

    As in DeepSeekMoE (arXiv 2401.06066, eqs. 9 to 11). Banks `u`, `v` [n_experts, d_ff, d_model], `o` [n_experts,
    d_model, d_ff]. shared: MLPs [batch, seq, d_model] -> the same, for every token.
    """

    reads: tuple[str, ...] = ()
    reading: tuple[str, ...] = ("u", "v")
    u: ExpertLinear
    v: ExpertLinear

    def __init__(self, d_model: int, d_ff: int, router: Router, shared: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        n_experts = router.out_features
        self.router = router
        for bank in self.reading:
            self.add_module(bank, ExpertLinear(n_experts, d_model, d_ff))
        self.o = ExpertLinear(n_experts, d_ff, d_model, writes=True)
        self.shared = nn.ModuleList(shared)

    def experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The experts applied to their rows: [choices, d_model] -> the same."""
        return self.o(self.u(rows, ends) * F.silu(self.v(rows, ends)), ends)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model]."""
        flat = h.flatten(0, -2)
        out = mixed(flat, self.router(flat), self.router.out_features, self.experts).view_as(h)
        for expert in self.shared:
            out = out + expert(h)
        return out


class MixtureOfSquaredReLUs(MixtureOfExperts):
    """Experts without a gate: `sum_i w_i W_o,i relu(u_i)^2`, as `SquaredReLU`, with no bank `v`."""

    reading = ("u",)

    def experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        """What the experts make of their rows: [choices, d_model] -> the same."""
        return self.o(F.relu(self.u(rows, ends)).square(), ends)


class UnitMixtureOfExperts(nn.Module):
    """`MixtureOfExperts` on the sphere ("Training nGPT", arXiv 2608.01284): every expert is nGPT's MLP (eqs. 20, 21).

    Unit rows of every expert's `u` and `v`, unit columns of its `o`; `s_u`, `s_v` [n_experts, d_ff]. The router's
    matrix is not normalized; its input is `s_moe sqrt(d_model) h` with one learned scalar `s_moe` [1]: the factor, ours
    as it is eq. 21's, gives the entries of a unit h the size that the baseline's RMSNorm gives them. scales: `s_u` and
    `s_v`. shared: MLPs on the sphere. inner_norm: whether what each expert's `o` reads is normalized (FNGPT, arXiv
    2605.06067).
    """

    reads: tuple[str, ...] = ()
    reading: tuple[str, ...] = ("u", "v")
    u: UnitExpertLinear
    v: UnitExpertLinear
    s_u: Scale
    s_v: Scale

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        router: Router,
        s_moe: Scale,
        *scales: Scale,
        shared: Iterable[nn.Module] = (),
        inner_norm: bool = False,
    ) -> None:
        super().__init__()
        n_experts = router.out_features
        self.input_gain = math.sqrt(d_model)
        self.router, self.inner = router, INNER_NORMS[inner_norm]
        for bank in self.reading:
            self.add_module(bank, UnitExpertLinear(n_experts, d_model, d_ff))
        self.o = UnitExpertLinear(n_experts, d_ff, d_model, writes=True)
        self.s_moe = s_moe
        for bank, scale in zip(self.reading, scales, strict=True):
            self.add_module(f"s_{bank}", scale)
        self.shared = nn.ModuleList(shared)

    def experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The experts applied to their rows: [choices, d_model] -> the same."""
        u, v = self.u(rows, ends, self.s_u()), self.v(rows, ends, self.s_v() * self.input_gain)
        return self.o(self.inner(u * F.silu(v)), ends)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model], not normalized."""
        flat = h.flatten(0, -2)
        out = mixed(
            flat, self.router(flat, self.s_moe() * self.input_gain), self.router.out_features, self.experts
        ).view_as(h)
        for expert in self.shared:
            out = out + expert(h)
        return out


class UnitMixtureOfSquaredReLUs(UnitMixtureOfExperts):
    """Experts without a gate: each is `UnitSquaredReLU`, with no bank `v`; scales: `s_u` alone."""

    reading = ("u",)

    def experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        """What the experts make of their rows: [choices, d_model] -> the same."""
        return self.o(self.inner(F.relu(self.u(rows, ends, self.s_u() * self.input_gain)).square()), ends)


MIXTURES = {"swiglu": MixtureOfExperts, "relu2": MixtureOfSquaredReLUs}
UNIT_MIXTURES = {"swiglu": UnitMixtureOfExperts, "relu2": UnitMixtureOfSquaredReLUs}
"""By the name of the activation, what makes a mixture of each arm."""

AnyMixture = MixtureOfExperts | UnitMixtureOfExperts


def routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Every router of a model by name, in the order of layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Router))


def clear_loads(model: nn.Module) -> None:
    """Forget what was counted since the last update, as `zero_grad` forgets gradients."""
    for _, router in routers(model):
        router.load.zero_()
        router.pending = None


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Nothing counts that the routers of `model` pick in this context,
    for passes that repeat what was computed before.
    """
    before = [(router, router.load.clone(), router.pending) for _, router in routers(model)]
    try:
        yield
    finally:
        for router, load, pending in before:
            router.load.copy_(load)
            router.pending = pending


@contextmanager
def parts_of_batch(
    model: nn.Module, forward: Callable[[], object], summed: Callable[[Tensor], Tensor] = torch.positive
) -> Iterator[None]:
    """In this context the auxiliary losses of the routers of `model` are those of a batch
    that is computed in equal parts.

    The mean of the losses of parts is not the loss of the batch, unless the load of the batch is known before. So it is
    counted first, by `forward`, which passes all of the batch through the model and is called without gradients: as
    exact as one pass over the whole batch, for about a third more work. summed: as for
    `optim.balancing.attach_balancing`.
    """
    found = [router for _, router in routers(model) if router.balance == "loss"]
    with uncounted(model), torch.no_grad():
        clear_loads(model)
        forward()
        loads = summed(torch.cat([router.load for router in found]))
    for router, load in zip(found, loads.split([router.out_features for router in found]), strict=True):
        router.batch_load = load
    try:
        yield
    finally:
        for router in found:
            router.batch_load = None


def pending_losses(model: nn.Module) -> list[Tensor]:
    """The auxiliary losses of the forward pass just made, each once: they are not pending any more."""
    found = []
    for _, router in routers(model):
        if router.pending is not None:
            found.append(router.pending)
            router.pending = None
    return found


def idle_weights(model: nn.Module, kinds: type | tuple[type, ...] = (ExpertLinear, Scale)) -> int:
    """How many learned numbers of `model` a token does not meet: those of experts that are not picked for it.

    kinds: of modules that count, here the experts' matrices and their scales.
    """
    idle = 0
    for module in model.modules():
        if isinstance(module, AnyMixture):
            n_experts, top_k = module.router.out_features, module.router.top_k
            banks = (p for part in module.children() if isinstance(part, kinds) for p in part.parameters())
            idle += sum(p.numel() for p in banks if len(p) == n_experts) * (n_experts - top_k) // n_experts
    return idle
