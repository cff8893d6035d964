from __future__ import annotations

from typing import Any

import paper
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spherelm.layers import loss
from spherelm.layers.loss import linear_cross_entropy


def data(rows: int, vocab: int, ignored: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    targets[ignored] = -100
    return h, weight, targets


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
@pytest.mark.parametrize("chunk_logits", [1, 2**22])
def test_the_loss_and_its_gradients_are_the_papers(
    rows: int, chunk_logits: int, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    h, weight, targets = data(rows, 11, [])
    agree(linear_cross_entropy(h, weight, targets), paper.cross_entropy(h @ weight.T, targets), [h, weight])


@pytest.mark.parametrize("chunk_logits", [1, 2**22])
@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_label_smoothing_is_the_papers(
    smoothing: float, chunk_logits: int, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    h, weight, targets = data(300, 11, [3, 7])
    wanted = paper.smoothed_cross_entropy(h @ weight.T, targets, smoothing)
    agree(linear_cross_entropy(h, weight, targets, smoothing=smoothing), wanted, [h, weight])
    with torch.no_grad():
        assert linear_cross_entropy(h, weight, targets, smoothing=smoothing).item() == pytest.approx(
            wanted.item(), rel=1e-13
        )


def test_ignored_targets_count_for_nothing(agree: Any) -> None:
    # the whole second half is ignored: a chunk without a single target
    h, weight, targets = data(20, 11, [0, 3, *range(10, 20)])
    agree(linear_cross_entropy(h, weight, targets), paper.cross_entropy(h @ weight.T, targets), [h, weight])
    linear_cross_entropy(h, weight, targets).backward()
    assert h.grad is not None
    assert torch.equal(h.grad[targets == -100], torch.zeros(12, 6, dtype=torch.float64))


@pytest.mark.parametrize("grad", [True, False])
def test_without_any_target_the_loss_is_zero(grad: bool) -> None:
    h, weight, targets = data(4, 5, [0, 1, 2, 3])
    with torch.set_grad_enabled(grad):
        value = linear_cross_entropy(h, weight, targets)
    assert value.item() == 0.0
    if grad:
        value.backward()
        assert h.grad is not None
        assert weight.grad is not None
        assert not h.grad.any()
        assert not weight.grad.any()


def test_evaluation_gives_the_loss_of_training() -> None:
    h, weight, targets = data(33, 11, [4])
    with torch.no_grad():
        quiet = linear_cross_entropy(h, weight, targets)
    torch.testing.assert_close(quiet, linear_cross_entropy(h, weight, targets).detach(), rtol=1e-14, atol=0)


def test_a_scaled_loss_scales_the_gradients() -> None:
    h, weight, targets = data(9, 5, [2])
    plain = torch.autograd.grad(linear_cross_entropy(h, weight, targets), [h, weight])
    scaled = torch.autograd.grad(linear_cross_entropy(h, weight, targets) / 4, [h, weight])
    for one, four in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one / 4, four, rtol=1e-14, atol=0)


def test_huge_logits_stay_finite() -> None:
    h = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    value = linear_cross_entropy(h, weight, torch.tensor([0, 1]))
    value.backward()
    assert value.item() == pytest.approx(1e4)
    assert h.grad is not None
    assert h.grad.isfinite().all()


def test_bfloat16_products_are_summed_in_float32() -> None:
    h, weight, targets = data(16, 11, [1])
    narrow, master = h.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    value = linear_cross_entropy(narrow, master, targets)
    value.backward()
    assert value.dtype == torch.float32
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert value.item() == pytest.approx(paper.cross_entropy(h @ weight.T, targets).item(), rel=0.02)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.row("Loss")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", [64, 2000])
def test_the_logits_of_all_tokens_never_exist_at_once(rows: int, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 128 * 500)
    h, weight, targets = data(rows, 500, [1])
    with LargestTensor() as seen, torch.set_grad_enabled(grad):
        value = linear_cross_entropy(h, weight, targets)
        if grad:
            value.backward()
    assert seen.largest <= max(min(rows // 2, 128) * 500, rows * 6)


@pytest.mark.parametrize("rows", [1, 2, 129, 4096, 10_000])
@pytest.mark.parametrize("vocab", [11, 8192, 32000])
def test_chunks_are_equal_to_a_row_or_so_and_bounded(rows: int, vocab: int) -> None:
    size = loss.chunk_rows(rows, vocab)
    count = -(-rows // size)
    assert size * vocab <= max(loss.CHUNK_LOGITS, 128 * vocab)
    assert size * count - rows < count, "no chunk is much shorter than the others"
    assert count > 1 or rows == 1


def test_a_sure_answer_keeps_the_digits_of_its_small_gradient() -> None:
    logits = torch.tensor([[12.0, 0.0, 1.0]], dtype=torch.bfloat16)
    gradient = loss.score(logits.clone(), torch.tensor([0]), torch.tensor(1), 0.0)[1]
    expected = logits.double().softmax(-1) - torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-8, atol=0)
