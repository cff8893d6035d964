"""Formats of few bits: what they round to, at random or not,
and that every product with a block's matrix is rounded.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import paper
import pytest
import torch
from cases import ARMS
from configs import make_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spherelm.layers.linear import ExpertLinear, Linear, folded_product
from spherelm.layers.low_precision import BLOCKS, LowPrecisionProduct, Precision, to_e2m1, to_nvfp4
from spherelm.models import build
from spherelm.train.low_precision import lower_precision


def hard_cases() -> Tensor:
    """float32 [rows, 16]: every code of E2M1 and what lies halfway, both signs, at every block scale;
    zeros; far too large.
    """
    codes = torch.tensor(paper.E2M1)
    halfway = (codes[1:] + codes[:-1]) / 2
    nearby = torch.cat([halfway.nextafter(codes[1:]), halfway.nextafter(codes[:-1])])
    numbers = torch.cat([codes, halfway, nearby, torch.tensor([6.0, 6.0])])
    rows = torch.cat([numbers, -numbers]).view(-1, 2).repeat(1, 7)[:, :14]
    rows = torch.cat([rows, torch.tensor([6.0, -6.0]).expand(len(rows), 2)], 1)
    scaled = (rows.unsqueeze(0) * torch.tensor(paper.E4M3)[:, None, None]).flatten(0, 1) / (6 * 448)
    spread = torch.randn(500, 16) * torch.logspace(-9, 3, 500).unsqueeze(1)
    return torch.cat([scaled, torch.zeros(2, 16), -torch.zeros(2, 16), spread, torch.tensor([[1e4] + [1e-3] * 15])])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amax", [None, 1.0, 0.3])
def test_nvfp4_is_that_of_torchao_to_the_last_bit(amax: float | None, dtype: torch.dtype) -> None:
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = hard_cases().to(dtype)
    largest = x.abs().amax() if amax is None else torch.tensor(amax)
    scale = nvfp4.per_tensor_amax_to_scale(largest)
    expected = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(dtype)
    found = to_nvfp4(x, None if amax is None else largest)
    assert found.equal(expected)
    assert found.signbit().equal(expected.signbit())
    assert 3 * len(paper.E2M1) < len(found.unique()), "it is not all zero"


@pytest.mark.parametrize("amax", [None, 1.0])
def test_nvfp4_is_the_definition(amax: float | None) -> None:
    x = torch.randn(6, 48) * torch.logspace(-3, 0.5, 6).unsqueeze(1)
    found = to_nvfp4(x, None if amax is None else torch.tensor(amax))
    torch.testing.assert_close(found.double(), paper.nvfp4(x, amax), rtol=1e-6, atol=0)


def test_zeros_stay_zeros() -> None:
    assert not to_nvfp4(torch.zeros(3, 32)).any()


def test_stochastic_rounding_is_right_on_average_and_seeded() -> None:
    values = torch.cat([torch.linspace(-6, 6, 97), torch.tensor([7.5, -100.0])])
    draws = 4000

    def drawn(seed: int) -> Tensor:
        return to_e2m1(values.expand(draws, -1).contiguous(), torch.Generator().manual_seed(seed))

    found = drawn(0)
    assert found.equal(drawn(0))
    assert not found.equal(drawn(1))
    codes = torch.tensor(paper.E2M1)
    codes = torch.cat([-codes.flip(0), codes])
    kept = values.clamp(-6, 6)
    below, above = codes[torch.searchsorted(codes, kept, right=True) - 1], codes[torch.searchsorted(codes, kept)]
    assert ((found == below) | (found == above)).all(), "one of the two neighbours"
    error = (above - below) / 2 / draws**0.5
    assert ((found.mean(0) - kept).abs() <= 5 * error).all()


def test_gradients_of_nvfp4_are_right_on_average() -> None:
    x, noise = torch.randn(4, 32), torch.Generator().manual_seed(0)
    mean = torch.stack([to_nvfp4(x, noise=noise) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, x, rtol=0, atol=5 * 0.5 / 4000**0.5 * x.abs().max().item())


def product(**fields: Any) -> LowPrecisionProduct:
    noise = torch.Generator().manual_seed(3)
    return LowPrecisionProduct(Precision("nvfp4", stochastic=False, **fields), False, False, noise)


def gradients(multiply: Any, scale: Tensor | None = None) -> list[Tensor]:
    """The product of fixed operands, 3 x 7 tokens of 32 features with a matrix of 64 rows,
    and the gradients of both.
    """
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(3, 7, 32, generator=draw), torch.randn(64, 32, generator=draw)
    y = multiply(x.requires_grad_(), weight.requires_grad_(), scale)
    y.backward(torch.randn(y.shape, generator=draw))
    assert x.grad is not None
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


def turned(x: Tensor) -> Tensor:
    """Rows of `x`, filled with zeros up to 32, by the transform of `product`, from the definition by signs of bits."""
    signs = torch.randint(0, 2, (16,), generator=torch.Generator().manual_seed(3)).double() * 2 - 1
    walsh = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)]).double()
    blocks = torch.nn.functional.pad(x.double(), (0, 32 - x.shape[1])).view(len(x), 2, 16)
    return ((blocks * signs) @ walsh / 4).flatten(1)


OPERANDS = ("inputs", "weights", "gradients")


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("left_out", [(), *((one,) for one in OPERANDS), OPERANDS])
def test_each_operand_is_rounded_along_what_its_product_contracts(left_out: tuple[str, ...], hadamard: bool) -> None:
    def q(operand: str, x: Tensor) -> Tensor:
        return x.double() if operand in left_out else paper.nvfp4(x.float())

    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(21, 32, generator=draw), torch.randn(64, 32, generator=draw)
    grad = torch.randn(21, 64, generator=draw)
    side = turned if hadamard else lambda x: torch.nn.functional.pad(x, (0, 11))
    expected = [
        q("inputs", x) @ q("weights", weight).T,
        q("gradients", grad) @ q("weights", weight.T).T,
        q("gradients", side(grad.T)) @ q("inputs", side(x.T)).T,
    ]
    found = gradients(product(hadamard=hadamard, **dict.fromkeys(left_out, False)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.view(ours.shape), rtol=1e-4, atol=1e-4)


def test_nothing_rounded_is_the_plain_product() -> None:
    scale = torch.rand(64)
    for ours, theirs in zip(
        gradients(product(**dict.fromkeys(OPERANDS, False)), scale), gradients(folded_product, scale), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_scale_multiplies_what_the_unscaled_matrix_gives() -> None:
    scale = torch.full((64,), 300.0)
    ours, plain = gradients(product(amax="one"), scale)[0], gradients(product(amax="one"))[0]
    torch.testing.assert_close(ours, 300 * plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.07), ("mxfp8", 0.06)])
def test_eight_bits_are_near(kind: Any, most: float) -> None:
    pytest.importorskip("torchao")
    rounded = LowPrecisionProduct(Precision(kind), False, False, torch.Generator())
    for ours, theirs in zip(gradients(rounded), gradients(folded_product), strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert 1e-3 < error < most


# -------------------------------------------------------------------------------------------------- in whole models

SIZES: dict[str, Any] = {"vocab_size": 37, "n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("decoder", {}),
    "relu2": ("decoder", {"activation": "relu2"}),
    "encoder": ("encoder", {}),
    "encoder-decoder": ("encdec", {}),
    "hybrid": ("decoder", {"pattern": "MA-O", "n_layers": 4, "d_expert": 16, "n_experts": 5}),
}
MIXER = {"mamba_d_head": 4, "mamba_d_state": 8, "mamba_groups": 1, "mamba_chunk": 4}


class Products(TorchDispatchMode):
    """Notes the sizes of the operands of every product in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[set[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.rpartition("::")[2].startswith(("mm", "addmm", "grouped_product")):
            self.found.append({size for x in args if isinstance(x, Tensor) for size in x.shape})
        return func(*args, **(kwargs or {}))


class _Nothing(torch.autograd.Function):
    """The shape of a product and of its gradients, without a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_ones(*x.shape[:-1], weight.shape[-2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return tuple(map(torch.zeros_like, ctx.saved_tensors))


def model_of(arm: str, kind: str) -> Any:
    architecture, fields = MODELS[kind]
    return build(make_config(arm, architecture, **{**SIZES, **fields}, **(MIXER if kind == "hybrid" else {})))


def batch_of(kind: str) -> tuple[Tensor, ...]:
    """Random tokens as the loss of a model of this kind takes them."""
    tokens = torch.randint(30, (2, 12))
    return (tokens, tokens[:, -7:], tokens[:, -7:]) if kind == "encoder-decoder" else (tokens, tokens)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_product_with_a_matrix_of_a_block_is_rounded(arm: str, kind: str) -> None:
    """Without what the seam computes no product is left but those of the read-out and of routers,
    forward and backward.
    """
    model = model_of(arm, kind)
    matrices = [m for m in model.modules() if isinstance(m, Linear | ExpertLinear) and m.role == "matrix"]
    in_blocks = {id(p) for stack in model.stacks() for p in stack.parameters() if p.ndim > 1}
    routers = {id(m.weight) for m in model.modules() if isinstance(m, Linear) and m.role == "router"}
    convolutions = {
        id(p)
        for n, p in model.named_parameters()
        if n.endswith(("conv_weight", "s_qk.value", "s_u.value", "s_v.value"))
    }
    assert in_blocks - routers - convolutions == {id(m.weight) for m in matrices}
    calls: Counter[int] = Counter()
    for module in matrices:

        def nothing(x: Tensor, weight: Tensor, *rest: Any, of: int = id(module)) -> Tensor:
            calls[of] += 1
            result: Tensor = _Nothing.apply(x, weight)
            return result

        module.product = nothing
    with Products() as products:
        model.loss(*batch_of(kind)).backward()
    assert set(calls) == {id(m) for m in matrices}
    assert set(calls.values()) == {1}
    vocabulary, experts, sums = 37, 5, 1
    assert products.found
    assert all(sizes & {vocabulary, experts, sums} for sizes in products.found), products.found


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kind", MODELS)
def test_models_of_every_kind_compute_in_nvfp4(arm: str, kind: str) -> None:
    model, batch = model_of(arm, kind), batch_of(kind)
    plain = model.loss(*batch).item()
    lower_precision(model, Precision("nvfp4"))
    loss = model.loss(*batch)
    loss.backward()
    assert loss.item() != plain
    assert loss.item() == pytest.approx(plain, abs=0.5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_amax_of_unit_vectors_is_taken_as_one() -> None:
    """Of a matrix that writes, the input is a unit vector with FNGPT's norms alone."""
    for inner_norm, arm in ((False, "ngpt"), (True, "ngpt"), (False, "gpt")):
        fields = {"variant.inner_norm": inner_norm} if arm == "ngpt" else {}
        model = build(make_config(arm, "decoder", **SIZES, **fields))
        lower_precision(model, Precision("nvfp4"))
        attention = model.blocks[0].attention.part
        of_reader, of_writer = attention.q.product.is_one, attention.o.product.is_one
        assert of_reader == {"inputs": arm == "ngpt", "weights": arm == "ngpt", "gradients": False}
        assert of_writer == {"inputs": inner_norm, "weights": arm == "ngpt", "gradients": False}
    assert set(BLOCKS) == {"fp8", "mxfp8", "nvfp4"}
