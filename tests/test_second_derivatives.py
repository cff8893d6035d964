"""Second derivatives, and the transforms of torch.func, against the oracle:
exact for every part and model, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import paper
import pytest
import torch
from cases import make_hybrid_case, make_pair_case
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from spherelm import sphere
from spherelm.layers.causal_backward import attend_by_products
from spherelm.layers.grouped import product_by_groups
from spherelm.layers.loss import linear_cross_entropy
from spherelm.layers.moe import Routing, mixed
from spherelm.layers.rope import nvidia_rotate, nvidia_table, rotary_table, unit_nvidia_rotate, unit_rotate
from spherelm.models import NGPTConfig, build
from spherelm.models.decoder import Decoder
from spherelm.models.variants import nvidia_step

Parts = list[Tensor]
Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    """Torch's fused attention has no second derivatives, which it says itself."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def product(f: Function, inputs: Parts, directions: Parts) -> Parts:
    """Gradients of `f`, and those of their product with `directions`:
    a Hessian-vector product, or what of it is not zero.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(
        sum((g * v).sum() for g, v in zip(first, directions, strict=True)), leaves, materialize_grads=True
    )
    return [*first, *second]


def assert_near(ours: Parts, oracle: Parts) -> None:
    for one, other in zip(ours, oracle, strict=True):
        assert (one - other).abs().max() <= 1e-10 * (1 + other.abs().max())


# ---------------------------------------------------------------------------------------------- parts


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return paper.causal_softmax(0.7 * q @ k.mT) @ v


def turned(x: Tensor, places: Tensor, base: float = 50.0) -> Tensor:
    """Rotation as a complex product."""
    angles = places.unsqueeze(-1) * base ** (-torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
    first, second = x.chunk(2, -1)
    z = torch.complex(first, second) * torch.complex(angles.cos(), angles.sin())
    return torch.cat((z.real, z.imag), -1)


SIZES = [3, 0, 4]
ENDS = torch.tensor(SIZES).cumsum(0, dtype=torch.int32)
TARGETS = torch.tensor([3, -100, 0, 8, 8, 1, 2])
CHOICES = torch.tensor([[1, 0], [0, 2], [2, 1], [0, 1], [2, 0], [1, 2], [0, 1]])


def by_group(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([part @ matrix.T for part, matrix in zip(rows.split(SIZES), weight, strict=True)])


def mixture(h: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    return mixed(h, Routing(CHOICES, weights), 3, lambda rows, ends: product_by_groups(rows.sin(), bank, ends))


def plain_mixture(h: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    return torch.einsum("tk,tkoi,ti->to", weights, bank[CHOICES], h.sin())


def cosine_table(x: Tensor) -> Tensor:
    return unit_nvidia_rotate(x, nvidia_table(torch.arange(5.0, dtype=x.dtype), 8, 50.0))


def plain_cosine_table(x: Tensor) -> Tensor:
    return paper.norm(nvidia_rotate(x, nvidia_table(torch.arange(5.0, dtype=x.dtype), 8, 50.0)))


VECTORS, ALPHA = (5, 8), (8,)
PARTS: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "norm": (sphere.norm, paper.norm, [VECTORS]),
    "norm of columns": (lambda x: sphere.norm(x, 0), lambda x: paper.norm(x, 0), [VECTORS]),
    "step": (sphere.step, paper.step, [VECTORS, VECTORS, ALPHA]),
    "step with one alpha": (sphere.step, paper.step, [VECTORS, VECTORS, (1,)]),
    "step as NVIDIA takes it": (
        nvidia_step,
        lambda h, t, a: paper.step(paper.norm(h), t, a),
        [VECTORS, VECTORS, ALPHA],
    ),
    "riemannian step": (sphere.riemannian_step, paper.riemannian_step, [VECTORS, VECTORS, ALPHA]),
    "slerp": (
        lambda a, b: sphere.slerp(sphere.norm(a), sphere.norm(b), 0.3),
        lambda a, b: paper.slerp(paper.norm(a), paper.norm(b), 0.3),
        [VECTORS, VECTORS],
    ),
    "unit rotation": (
        lambda x, places: unit_rotate(x, rotary_table(places, 8, 50.0)),
        lambda x, places: turned(paper.norm(x), places),
        [(2, 3, 5, 8), (5,)],
    ),
    "NVIDIA's formula": (cosine_table, plain_cosine_table, [(2, 3, 5, 8)]),
    "attention": (lambda q, k, v: attend_by_products(q, k, v, 0.7), plain_attention, [(2, 3, 150, 4)] * 3),
    "loss": (
        lambda h, weight: linear_cross_entropy(h, weight, TARGETS, smoothing=0.1),
        lambda h, weight: paper.smoothed_cross_entropy(h @ weight.T, TARGETS, 0.1),
        [(7, 6), (9, 6)],
    ),
    "groups": (lambda rows, weight: product_by_groups(rows, weight, ENDS), by_group, [(7, 6), (3, 4, 6)]),
    "mixture": (mixture, plain_mixture, [(7, 6), (7, 2), (3, 4, 6)]),
}


def scalar(f: Function) -> Function:
    """A number that depends on everything in the result of `f` in a bent way."""

    def of(*inputs: Tensor) -> Tensor:
        out = f(*inputs)
        return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).exp().sum()

    return of


@pytest.mark.parametrize("name", PARTS)
def test_second_and_third_derivatives_of_a_part(name: str) -> None:
    ours, oracle, shapes = PARTS[name]
    inputs, directions = [draw(*shape) for shape in shapes], [draw(*shape) for shape in shapes]
    assert_near(product(scalar(ours), inputs, directions), product(scalar(oracle), inputs, directions))

    def curvature(f: Function) -> Function:
        def of(*leaves: Tensor) -> Tensor:
            first = torch.autograd.grad(scalar(f)(*leaves), leaves, create_graph=True)
            return sum((g * v).sum() for g, v in zip(first, directions, strict=True))  # type: ignore[return-value]

        return of

    if name != "attention":  # whose plain twin is a large product, and slow
        ours_third, oracle_third = (product(curvature(f), inputs, directions) for f in (ours, oracle))
        assert_near(ours_third, oracle_third)


@pytest.mark.parametrize("name", [name for name in PARTS if name != "attention"])
def test_a_part_under_torch_func(name: str) -> None:
    """Each sample's gradient, forward mode, and forward over reverse."""
    ours, oracle, shapes = PARTS[name]
    inputs, directions = [draw(*shape) for shape in shapes], [draw(*shape) for shape in shapes]
    numbers = tuple(range(len(shapes)))
    batch = [torch.stack((x, 0.5 * x)) for x in inputs]
    each = vmap(grad(scalar(ours), numbers))(*batch)
    for i in range(2):
        leaves = [x[i].clone().requires_grad_() for x in batch]
        assert_near([g[i] for g in each], list(torch.autograd.grad(scalar(oracle)(*leaves), leaves)))
    gradients, second = jvp(grad(scalar(ours), numbers), tuple(inputs), tuple(directions))
    assert_near([*gradients, *second], product(scalar(oracle), inputs, directions))
    _, moved = jvp(scalar(ours), tuple(inputs), tuple(directions))
    assert_near([moved], [sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))])  # type: ignore[list-item]


def test_a_vector_of_zero_has_derivatives_of_zero() -> None:
    for f in (sphere.norm, lambda x: sphere.step(x, x, torch.ones(8, dtype=x.dtype))):
        assert not any(part.any() for part in product(lambda x, f=f: f(x).sum(), [torch.zeros(3, 8)], [draw(3, 8)]))
        assert not jacfwd(f)(torch.zeros(8, dtype=torch.float64)).any()


# ---------------------------------------------------------------------------------------------- models


MODELS = {
    "gpt": lambda case: case("gpt"),
    "ngpt": lambda case: case("ngpt"),
    "ngpt, tied, shared keys": lambda case: case("ngpt", tie_embeddings=True, n_kv_heads=1),
    "gpt, mixed": lambda case: make_hybrid_case("gpt", "MA-O"),
    "ngpt, mixed": lambda case: make_hybrid_case("ngpt", "MA-O", n_shared_experts=1),
    "gpt, of pairs": lambda case: make_pair_case("gpt", n_encoder_layers=1),
    "ngpt, of pairs": lambda case: make_pair_case("ngpt", n_encoder_layers=1),
}


class Loss(torch.nn.Module):
    """The model's own loss as a call, for `functional_call`."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Tensor) -> Tensor:
        return self.model.loss(*batch)


def loss_of(model: Decoder, weights: dict[str, Tensor], *batch: Tensor) -> Tensor:
    result: Tensor = functional_call(Loss(model), {f"model.{n}": w for n, w in weights.items()}, batch)
    return result


@pytest.fixture(params=MODELS)
def setting(request: pytest.FixtureRequest, case: Any) -> tuple[Any, Parts]:
    """A case, and a direction for every weight."""
    c = MODELS[request.param](case)
    return c, [draw(*w.shape) for w in c.weights.values()]


def by_our_names(c: Any) -> dict[str, Tensor]:
    """The weights of a case by the names that its model has for them, in the same order."""
    return dict(zip((name for name, _ in c.model.named_parameters()), c.weights.values(), strict=True))


def oracle_product(c: Any, directions: Parts) -> Parts:
    def loss(*leaves: Tensor) -> Tensor:
        logits = c.forward(dict(zip(c.weights, leaves, strict=True)), c.shape, c.read)
        return paper.cross_entropy(logits, c.targets)

    return product(loss, list(c.weights.values()), directions)


@pytest.mark.row("Derivatives")
def test_hessian_vector_products_of_a_model(setting: tuple[Any, Parts]) -> None:
    """In training mode as in training, through the loss that never holds the logits, and through logits."""
    c, directions = setting
    oracle = oracle_product(c, directions)
    weights, names = list(c.weights.values()), list(by_our_names(c))
    read = {"source": c.source, "tokens": c.tokens} if c.source is not None else {"tokens": c.tokens}

    def of_logits(*leaves: Tensor) -> Tensor:
        logits = functional_call(c.model, dict(zip(names, leaves, strict=True)), kwargs=read)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), c.targets.flatten())

    def of_loss(*leaves: Tensor) -> Tensor:
        return loss_of(c.model, dict(zip(names, leaves, strict=True)), *c.batch)

    for f in (of_loss, of_logits):
        assert_near(product(f, weights, directions), oracle)


@pytest.mark.row("Derivatives")
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")  # slower, says torch, of indices under vmap
def test_a_model_under_torch_func(setting: tuple[Any, Parts]) -> None:
    c, directions = setting
    model, weights = c.model.eval(), by_our_names(c)
    oracle = oracle_product(c, directions)
    along = dict(zip(weights, directions, strict=True))

    def loss(weights: dict[str, Tensor], *batch: Tensor) -> Tensor:
        return loss_of(model, weights, *batch)

    first, second = jvp(grad(lambda w: loss(w, *c.batch)), (weights,), (along,))
    assert_near([*first.values(), *second.values()], oracle)
    one = grad(lambda w, *row: loss(w, *(part[None] for part in row)))
    each = vmap(one, in_dims=(None, *(0 for _ in c.batch)))(weights, *c.batch)
    for i, row in enumerate(zip(*(part.split(1) for part in c.batch), strict=True)):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        expected = torch.autograd.grad(loss(leaves, *row), list(leaves.values()))
        assert_near([g[i] for g in each.values()], list(expected))


# ---------------------------------------------------------------------------------------------- refused


def preconditioned() -> tuple[Decoder, Tensor]:
    sizes: dict[str, Any] = {"vocab_size": 11, "n_layers": 1, "d_model": 8, "n_heads": 2, "max_seq_len": 8}
    return build(NGPTConfig(**sizes, logit_preconditioning=0.5)).double(), torch.randint(11, (2, 6))


@pytest.mark.row("Derivatives")
def test_preconditioned_logits_have_first_derivatives_alone() -> None:
    """Their gradient is the derivative of nothing, and to differentiate it would go through what it replaces."""
    model, tokens = preconditioned()
    weights, names = list(model.parameters()), [name for name, _ in model.named_parameters()]
    for loss in (model.loss(tokens, tokens), model(tokens).square().sum()):
        first = torch.autograd.grad(loss, weights, create_graph=True)
        for wanted in ([weights[0]], weights):
            with pytest.raises(RuntimeError, match="build the model with logit_preconditioning=0"):
                torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True, retain_graph=True)
    expected = torch.autograd.grad(model.loss(tokens, tokens), weights)
    stored = dict(zip(names, (w.detach() for w in weights), strict=True))
    assert_near(list(grad(lambda w: loss_of(model, w, tokens, tokens))(stored).values()), list(expected))
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda w: loss_of(model, w, tokens, tokens), (stored,), (stored,))


def test_a_router_that_counts_is_refused_under_torch_func() -> None:
    c = make_hybrid_case("ngpt", "O")
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\)"):
        grad(lambda w: loss_of(c.model, w, c.tokens, c.targets))(by_our_names(c))


@pytest.mark.filterwarnings(
    "ignore:.*attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo looks at every input
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_blocks_are_refused(case: Any) -> None:
    """By torch itself, which must see the path to the weights for it."""
    c = case("ngpt")
    torch.compiler.reset()
    for block in c.model.blocks:
        block.compile(backend="aot_eager")
    weights = list(c.model.parameters())
    first = torch.autograd.grad(c.model.loss(c.tokens, c.targets), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(sum(g.square().sum() for g in first), weights, allow_unused=True)
    torch.compiler.reset()
