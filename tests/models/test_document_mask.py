"""Attention that stays within documents: a window is worth exactly what its documents are worth on their own."""

from __future__ import annotations

import pytest
import tiny
import torch

from spherelm.layers.attention import separate_documents
from spherelm.models import GPTConfig, NGPTConfig, build

EOS = 36
SIZES = {"vocab_size": 37, "n_layers": 2, "d_model": 24, "n_heads": 3, "d_ff": 40, "max_seq_len": 32}
LENGTHS = [
    [5, 1, 9, 8],
    [23],
    [1, 1, 20, 1],
]  # of the documents of each window, end tokens included; the last may go on


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.randint(EOS, (len(LENGTHS), 24))
    for one, lengths in zip(row, LENGTHS, strict=True):
        one[torch.tensor(lengths).cumsum(0) - 1] = EOS
    return row[:, :-1].clone(), row[:, 1:].clone()


def model_of(arm: str) -> torch.nn.Module:
    model = build((GPTConfig if arm == "gpt" else NGPTConfig)(**SIZES)).double()
    with torch.no_grad():  # all scales differ, so that nothing cancels
        for parameter in model.parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(0.3, 3))
    return model


def test_the_mask_and_the_positions_are_what_they_say() -> None:
    tokens, _ = windows()
    mask, positions = separate_documents(tokens, EOS)
    assert mask is not None
    assert positions is not None
    assert separate_documents(tokens, None) == (None, None)
    assert mask.shape == (3, 1, 23, 23)
    for row, lengths in enumerate(LENGTHS):
        document = [number for number, length in enumerate(lengths) for _ in range(length)][:23]
        assert positions[row].tolist() == [i for length in lengths for i in range(length)][:23]
        for query in range(23):
            expected = [key <= query and document[key] == document[query] for key in range(23)]
            assert mask[row, 0, query].tolist() == expected


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_a_window_is_worth_its_documents(arm: str) -> None:
    """Loss and gradients."""
    model = model_of(arm)
    tokens, targets = windows()
    whole = model.loss(tokens, targets, *separate_documents(tokens, EOS))
    gradients = torch.autograd.grad(whole, list(model.parameters()))
    total = torch.zeros((), dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, min(start + length, 23))
            if part.stop > part.start:
                total = total + model.loss(tokens[row : row + 1, part], targets[row : row + 1, part]) * (
                    part.stop - start
                )
            start += length
    total = total / tokens.numel()
    assert whole.item() == pytest.approx(total.item(), rel=1e-12)
    for one, other in zip(gradients, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert abs(model.loss(tokens, targets).item() - whole.item()) > 1e-6, "the mask matters"
    without_restart = model.loss(tokens, targets, separate_documents(tokens, EOS)[0]).item()
    assert (without_restart == pytest.approx(whole.item(), rel=1e-12)) == (arm == "gpt"), "positions matter to nGPT"


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_without_an_end_token_the_mask_changes_nothing(arm: str) -> None:
    model = model_of(arm)
    tokens = torch.randint(EOS, (2, 20))
    targets = torch.randint(EOS, (2, 20))
    assert model.loss(tokens, targets, *separate_documents(tokens, EOS)).item() == pytest.approx(
        model.loss(tokens, targets).item(), rel=1e-12
    )
