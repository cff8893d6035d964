"""Rows that grow a token a step with cached keys and values: each is what the full pass over it alone says."""

from __future__ import annotations

from typing import Any

import golden
import pytest
import torch
from torch import Tensor

from spherelm.generation.continuation import Continuation
from spherelm.generation.sampling import Sampling
from spherelm.models import Decoder

GREEDY = Sampling(temperature=0)
both_arms = pytest.mark.parametrize("arm", golden.ARMS)
ROWS = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [3, 5]]


class Recording(Continuation):
    """Keeps the logits of each step."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.logits: list[Tensor] = []

    def _read(self) -> Tensor:
        self.logits.append(super()._read())
        return self.logits[-1]


def next_logits(model: Decoder, row: list[int]) -> Tensor:
    """The logits after `row` by one pass over all of it, without a cache."""
    return model(torch.tensor([row]))[0, -1]


@pytest.mark.row("Generation")
@both_arms
@pytest.mark.parametrize("n_kv_heads", [3, 1])
def test_rows_of_any_lengths_are_computed_as_if_alone(arm: str, n_kv_heads: int, case: Any) -> None:
    model = case(arm, n_kv_heads=n_kv_heads).model
    text = Recording(model, ROWS, GREEDY, range(4))
    for step in range(8):
        before = [list(row) for row in text.rows]
        new = text.step()
        for i, row in enumerate(before):
            wanted = next_logits(model, row)
            torch.testing.assert_close(text.logits[step][i], wanted, rtol=1e-10, atol=1e-11)
            assert text.rows[i] == [*row, int(new[i])]
            assert new[i] == wanted.argmax()


@both_arms
def test_in_float32_cached_decoding_is_the_full_pass_within_1e_5(arm: str, case: Any) -> None:
    model = case(arm, max_seq_len=64).model.float()
    text = Recording(model, ROWS, Sampling(), range(4))
    for _ in range(40):
        text.step()
    for i, (row, given) in enumerate(zip(text.rows, ROWS, strict=True)):
        wanted = model(torch.tensor([row]))[0, len(given) - 1 : -1]
        got = torch.stack([logits[i] for logits in text.logits])
        assert (got - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


def test_the_draw_of_a_row_depends_on_its_own_seed_only(case: Any) -> None:
    model = case("ngpt").model

    def drawn(rows: list[list[int]], seeds: list[int]) -> list[list[int]]:
        text = Continuation(model, rows, Sampling(), seeds)
        for _ in range(6):
            text.step()
        return text.rows

    together = drawn(ROWS, [7, 8, 9, 10])
    assert together == [drawn([row], [seed])[0] for row, seed in zip(ROWS, [7, 8, 9, 10], strict=True)]
    assert len({tuple(row) for row in drawn([[3, 1]] * 4, [7, 8, 9, 10])}) > 1


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_the_penalty_is_on_every_token_that_the_row_holds(penalty: float, case: Any) -> None:
    model = case("gpt").model
    text = Continuation(model, ROWS, Sampling(0, repetition_penalty=penalty), range(4))
    for _ in range(6):
        wanted = []
        for row in text.rows:
            logits = next_logits(model, row)
            for token in set(row):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            wanted.append(int(logits.argmax()))
        assert text.step().tolist() == wanted


def slid(row: list[int], read: int, limit: int) -> tuple[list[int], int]:
    """The part of `row` that the model sees after it began to read at `read`, and where it begins now."""
    if len(row) - read > limit:
        read = len(row) - limit // 2
    return row[read:], read


@pytest.mark.row("Generation")
@both_arms
def test_a_sliding_window_goes_on_from_the_last_half(arm: str, case: Any) -> None:
    model = case(arm, max_seq_len=8).model
    text = Continuation(model, ROWS, GREEDY, range(4), window=True)
    starts = [0] * 4
    for _ in range(23):
        wanted = []
        for i, row in enumerate(text.rows):
            visible, starts[i] = slid(row, starts[i], 8)
            assert len(visible) <= 8
            wanted.append(int(next_logits(model, visible).argmax()))
        assert text.step().tolist() == wanted
    assert len(set(starts)) > 1, "else the rows slid together"


def test_a_window_of_one_token_is_possible(case: Any) -> None:
    model = case("ngpt", max_seq_len=1).model
    text = Continuation(model, [[3]], GREEDY, [0], window=True)
    for _ in range(3):
        last = text.rows[0][-1]
        assert text.step().item() == next_logits(model, [last]).argmax()


def test_a_prompt_longer_than_the_window_is_read_from_its_last_half(case: Any) -> None:
    model = case("gpt", max_seq_len=8).model
    long = [i % 37 for i in range(21)]
    text = Continuation(model, [long, [3]], GREEDY, [0, 1], window=True)
    assert text.step().tolist() == [int(next_logits(model, row).argmax()) for row in (long[-4:], [3])]


def test_without_a_window_the_limit_is_an_error_that_leaves_the_rows(case: Any) -> None:
    text = Continuation(case("gpt", max_seq_len=4).model, [[1, 2, 3]], GREEDY, [0])
    text.step()
    text.step()  # what comes out last need not be read
    rows = [list(row) for row in text.rows]
    with pytest.raises(ValueError, match=r"max_seq_len=4 is reached: shorten the text, or let the window slide"):
        text.step()
    assert text.rows == rows


@both_arms
def test_the_callers_tokens_and_the_models_alternate(arm: str, case: Any) -> None:
    model = case(arm).model
    text = Continuation(model, [[3, 1]], GREEDY, [0])
    for said in ([4, 1], [5], [9, 2, 6]):
        text.step()
        text.extend(said)
        wanted = next_logits(model, text.rows[0]).argmax()
        assert text.step().item() == wanted


@pytest.mark.parametrize("broken", [0, 1])
def test_a_pass_that_is_broken_off_leaves_the_text_as_it_was(broken: int, case: Any) -> None:
    """As by Ctrl-C, after some of the layers have stored their keys."""
    model = case("ngpt").model
    text = Continuation(model, [[3, 1, 4]], GREEDY, [0])
    text.step()
    rows = [list(row) for row in text.rows]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.blocks[broken].mlp.part.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        text.step()
    hook.remove()
    assert text.rows == rows
    for _ in range(3):
        wanted = next_logits(model, text.rows[0]).argmax()
        assert text.step().item() == wanted
