"""The Mamba-2 mixers against the recurrence as it is defined, against transformers,
and against themselves in pieces.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import paper
import paper_hybrid
import pytest
import torch
from torch import Tensor

from spherelm.layers import mamba_kernel
from spherelm.layers.cache import StateCache
from spherelm.layers.linear import Scale, retract
from spherelm.layers.mamba2 import Mamba2, MambaShape, UnitMamba2
from spherelm.layers.state_space import chunked, recurrent
from spherelm.optim.groups import parameter_roles

KINDS = ("plain", "unit", "inner norm")
both_kinds = pytest.mark.parametrize("kind", KINDS)


def mixer(kind: str, chunk_size: int = 4, groups: int = 2) -> Mamba2 | UnitMamba2:
    """A float64 mixer, four heads of 6 channels with states of 5; everything that it learns has values of its own."""
    shape = MambaShape(12, 4, 6, 5, n_groups=groups, conv_width=3, chunk_size=chunk_size)
    module = Mamba2(shape) if kind == "plain" else UnitMamba2(shape, Scale(1, 1.5, 0.5), kind == "inner norm")
    module.ssm.init_weights()
    module.double()
    retract(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "proj" not in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).add_(0.1 * torch.randn_like(parameter))
    return module


def hidden(length: int = 11) -> Tensor:
    return paper.norm(torch.randn(2, length, 12, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
@both_kinds
def test_a_mixer_and_its_gradients_are_the_definition(kind: str, chunk_size: int, groups: int, agree: Any) -> None:
    module, h = mixer(kind, chunk_size, groups), hidden()
    oracle = paper_hybrid.mamba2 if kind == "plain" else paper_hybrid.unit_mamba2
    shape = paper_hybrid.Shape(
        1, 12, 1, 1, heads=4, d_state=5, groups=groups, s_mamba=(1.5, 0.5), inner_norm=kind == "inner norm"
    )
    p = dict(module.named_parameters())
    agree(module(h), oracle(p, "", shape, h), [h, *p.values()])


@pytest.mark.parametrize("sizes", [(1,) * 11, (4, 1, 1, 5), (1, 10), (7, 4)], ids=str)
@both_kinds
def test_in_pieces_it_computes_the_same(kind: str, sizes: tuple[int, ...]) -> None:
    """A single position is computed by the recurrence, several by chunks."""
    module, h, cache, read = mixer(kind), hidden(), StateCache(), 0
    whole, pieces = module(h), []
    for piece in h.split(sizes, 1):
        pieces.append(module(piece, cache))
        read += piece.shape[1]
        assert cache.length == read
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-14)


SINCE = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0], [3, 4, 0, 0, 1, 0, 1, 2, 3, 4, 5]])
"""How many positions ahead of each belong to its text; the second row begins within one."""
TEXTS = [[(0, 3), (3, 10), (10, 11)], [(0, 2), (2, 3), (3, 5), (5, 11)]]


@both_kinds
def test_texts_in_one_row_are_what_they_are_alone(kind: str) -> None:
    module, h = mixer(kind), hidden()
    alone = torch.stack([torch.cat([module(h[i : i + 1, a:b]) for a, b in TEXTS[i]], 1)[0] for i in range(2)])
    packed = module(h, None, SINCE)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-14)
    direction, leaves = torch.randn_like(packed), [h, *module.parameters()]
    gradients = (torch.autograd.grad(result, leaves, direction) for result in (packed, alone))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    cache, pieces = StateCache(), []
    for piece, since in zip(h.split((2, 1, 1, 7), 1), SINCE.split((2, 1, 1, 7), 1), strict=True):
        pieces.append(module(piece, cache, since))
    torch.testing.assert_close(torch.cat(pieces, 1), alone, rtol=1e-12, atol=1e-14)


def test_the_last_pass_can_be_undone_and_no_more() -> None:
    module, h, cache = mixer("unit"), hidden(), StateCache()
    module(h[:, :4], cache)
    wanted = module(h[:, 4:6], cache)
    cache.crop(9)
    assert cache.length == 6
    cache.crop(4)
    torch.testing.assert_close(module(h[:, 4:6], cache), wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match="of 6 positions cannot be taken back to 3, only to 4 or 0: begin with a new"):
        cache.crop(3)
    cache.crop(0)
    assert cache.empty
    assert cache.length == 0
    torch.testing.assert_close(module(h[:, :4], cache), module(h[:, :4]), rtol=1e-12, atol=1e-14)


def test_rows_of_a_cache_are_chosen() -> None:
    module, h, cache = mixer("unit"), hidden(), StateCache()
    cache.select(torch.tensor([1, 0]))
    module(h[:, :4], cache)
    cache.select(torch.tensor([1, 1, 0]))
    wanted = module(torch.cat((h[1:], h[1:], h[:1])))[:, 4:5]
    torch.testing.assert_close(module(torch.cat((h[1:], h[1:], h[:1]))[:, 4:5], cache), wanted, rtol=1e-12, atol=1e-14)


def test_decays_are_float32_where_products_are_not() -> None:
    """A state that hardly decays, over 400 positions: in bfloat16 its factor would be 1."""
    x, b, c = (torch.ones(1, 400, 1, 1, dtype=torch.bfloat16) for _ in range(3))
    dt, rate, state = torch.full((1, 400, 1), 1e-3), torch.tensor([-1.0]), torch.zeros(1, 1, 1, 1)
    y, last = chunked(x, dt, rate, b, c, state, 64)
    wanted = 1e-3 * (1 - 2.718281828 ** (-0.4)) / (1 - 2.718281828 ** (-1e-3))
    assert last.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert last.item() == pytest.approx(wanted, rel=5e-3)
    assert y[0, -1].item() == pytest.approx(wanted, rel=1e-2)


def test_what_a_state_space_learns_is_not_decayed() -> None:
    roles = parameter_roles(mixer("unit"))
    assert {name for name, role in roles.items() if role == "matrix"} == {"in_proj.weight", "out_proj.weight"}
    assert {name for name, role in roles.items() if role == "scale"} == {"s_mamba.value"}
    assert {role for name, role in roles.items() if name.startswith("ssm.")} == {"gain"}
    assert parameter_roles(mixer("plain"))["norm.weight"] == "gain"


def test_it_starts_as_mamba2_does() -> None:
    module = Mamba2(MambaShape(64, 64, 2, 4)).ssm
    module.init_weights()
    assert 1 <= module.A_log.exp().min() < 3 < 14 < module.A_log.exp().max() <= 16
    dt = torch.nn.functional.softplus(module.dt_bias)
    assert 0.00099 < dt.min() < 0.002 < 0.05 < dt.max() < 0.1001
    assert module.conv_weight.abs().max() <= 0.5 < 1.001 * 2 * module.conv_weight.abs().max()
    assert module.D.tolist() == [1.0] * 64


def definition(
    x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, *, chunk_size: int, initial_states: Tensor,
    seq_idx: Tensor | None, return_final_states: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The documented behaviour of mamba_ssm's kernel: a state belongs to one seq_idx, that from before to 0."""
    assert chunk_size > 0
    assert return_final_states
    state, before, rows = initial_states, torch.zeros(len(x), dtype=torch.int32), []
    for t in range(x.shape[1]):
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32
            state = state * (seq_idx[:, t] == before)[:, None, None, None]
            before = seq_idx[:, t]
        y, state = recurrent(*(part[:, t : t + 1] for part in (x, dt)), rate, b[:, t : t + 1], c[:, t : t + 1], state)
        rows.append(y)
    return torch.cat(rows, 1), state


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Stands in for mamba_ssm, which needs a GPU to install."""
    module = "mamba_ssm.ops.triton.ssd_combined"
    names = module.split(".")
    for i in range(len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[: i + 1]), ModuleType(names[i]))
    sys.modules[module].mamba_chunk_scan_combined = definition  # type: ignore[attr-defined]
    mamba_kernel.kernel.cache_clear()
    yield definition  # type: ignore[misc]
    mamba_kernel.kernel.cache_clear()


@pytest.mark.parametrize("packed", [False, True])
def test_the_kernel_is_called_for_what_it_computes(kernel: Callable[..., Any], packed: bool) -> None:
    assert mamba_kernel.kernel() is kernel
    x, dt = torch.randn(2, 11, 4, 6), torch.rand(2, 11, 4)
    b, c = torch.randn(2, 11, 2, 5), torch.randn(2, 11, 2, 5)
    rest = (-torch.rand(4), b, c, torch.randn(2, 4, 6, 5), 4, SINCE == 0 if packed else None)
    for ours, theirs in zip(chunked(x, dt, *rest), mamba_kernel.fused(x, dt, *rest), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    y, _ = mamba_kernel.scan(x, dt, *rest)
    torch.testing.assert_close(y, chunked(x, dt, *rest)[0], rtol=0, atol=0)  # on the CPU there is no kernel


@pytest.mark.row("Derivatives")
@pytest.mark.usefixtures("kernel")
def test_the_kernel_refuses_second_derivatives() -> None:
    """Its backward pass is constant to autograd. The plain scan in its place has them."""
    mamba, h = mixer("unit").float(), torch.randn(2, 9, 12)
    mamba.ssm.scan = mamba_kernel.fused
    mamba(h).sum().backward()
    with pytest.raises(RuntimeError, match=r"ssm\.scan = spherelm\.layers\.state_space\.chunked"):
        mamba(h).sum().backward(create_graph=True)
    mamba.ssm.scan = chunked
    (first,) = torch.autograd.grad(mamba(h).sum(), mamba.ssm.A_log, create_graph=True)
    assert torch.autograd.grad(first.sum(), mamba.ssm.A_log)[0].any()


def test_without_the_package_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    mamba_kernel.kernel.cache_clear()
    assert mamba_kernel.kernel() is None
    mamba_kernel.kernel.cache_clear()


class Gate(torch.nn.Module):
    """In the place of transformers' inner norm: none, or that of the sphere."""

    def __init__(self, inner_norm: bool) -> None:
        super().__init__()
        self.unit = paper.norm if inner_norm else torch.positive

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.unit(y * torch.nn.functional.silu(gate))


@pytest.mark.parametrize("groups", [1, 2])
@both_kinds
def test_transformers_mixer_computes_the_same(kind: str, groups: int) -> None:
    """From the same weights, to 1e-4 and better: theirs is another implementation; on the sphere, without its norm."""
    transformers = pytest.importorskip("transformers")
    theirs_module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    ours = mixer(kind, groups=groups).float()
    config = transformers.Mamba2Config(
        num_heads=4, head_dim=6, hidden_size=12, state_size=5, n_groups=groups, expand=2, conv_kernel=3, chunk_size=8,
        layer_norm_epsilon=1e-6, num_hidden_layers=1,
    )  # fmt: skip
    theirs = theirs_module.Mamba2Mixer(config, 0).eval()
    weights = dict(ours.ssm.named_parameters())
    pairs = {"conv1d.weight": weights.pop("conv_weight").unsqueeze(1), "conv1d.bias": weights.pop("conv_bias")}
    scale = 1.0 if isinstance(ours, Mamba2) else ours.s_mamba() * ours.input_gain
    pairs |= {**weights, "in_proj.weight": scale * ours.in_proj.weight, "out_proj.weight": ours.out_proj.weight}
    if isinstance(ours, Mamba2):
        pairs["norm.weight"] = ours.norm.weight
    else:
        theirs.norm = Gate(kind == "inner norm")
    theirs.load_state_dict({name: value.detach() for name, value in pairs.items()})
    h = hidden(21).detach().float()
    wanted = theirs(h)
    assert (ours(h) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
