from __future__ import annotations

from typing import Any

import golden
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spherelm.models.generate import filtered_probabilities, generate

both_arms = pytest.mark.parametrize("arm", golden.ARMS)


def slow_top(probabilities: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """The definition, for one distribution: walk down the ordered tokens until k are kept or their mass reaches p."""
    kept, mass = torch.zeros_like(probabilities), 0.0
    for count, token in enumerate(probabilities.argsort(descending=True).tolist()):
        if (top_k is not None and count >= top_k) or (top_p is not None and mass >= top_p):
            break
        kept[token] = probabilities[token]
        mass += probabilities[token].item()
    return kept / kept.sum()


@given(st.integers(0, 2**20), st.floats(0.2, 3), st.none() | st.integers(1, 12), st.none() | st.floats(0.05, 0.95))
def test_filtering_keeps_the_most_probable_tokens(seed: int, t: float, top_k: int | None, top_p: float | None) -> None:
    logits = 3 * torch.randn(3, 9, generator=torch.Generator().manual_seed(seed))
    got = filtered_probabilities(logits, t, top_k, top_p)
    wanted = torch.stack([slow_top(row, top_k, top_p) for row in torch.softmax(logits / t, -1)])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_temperature_zero_is_certain_of_the_most_probable() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.9]])
    assert filtered_probabilities(logits, 0.0, None, None).tolist() == [[0, 1, 0], [1, 0, 0]]


@both_arms
def test_greedy_generation_is_argmax_of_the_full_forward_pass(arm: str, case: Any) -> None:
    c = case(arm)
    wanted = c.tokens
    for _ in range(7):
        wanted = torch.cat([wanted, c.model(wanted)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(c.model, c.tokens, 7, temperature=0), wanted)


def test_tokens_are_drawn_with_the_models_probabilities(case: Any) -> None:
    c = case("gpt")
    prompt = c.tokens[:1, :3].expand(4000, 3)
    drawn = generate(c.model, prompt, 1, seed=5)[:, -1]
    frequency = torch.bincount(drawn, minlength=37) / 4000
    probabilities = torch.softmax(c.model(c.tokens[:1, :3])[0, -1], -1)
    spread = (probabilities * (1 - probabilities) / 4000).sqrt()
    assert ((frequency - probabilities).abs() <= 5 * spread + 1e-3).all()


@both_arms
def test_a_seed_makes_the_draw_repeatable(arm: str, case: Any) -> None:
    c = case(arm)
    first, again, other = (generate(c.model, c.tokens, 7, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    generate(c.model, c.tokens, 1, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "a seed leaves the global random state alone"


def test_a_finished_row_is_filled_and_the_end_of_all_ends_it(case: Any) -> None:
    c = case("gpt")
    free = generate(c.model, c.tokens[:1], 7, temperature=0)[0, 9:]
    eos = free[2].item()
    first = free.tolist().index(eos)
    stopped = generate(c.model, c.tokens[:1], 7, temperature=0, eos_id=eos)
    assert torch.equal(stopped[0, 9:], free[: first + 1])
    both = generate(c.model, c.tokens[:2], 7, temperature=0, eos_id=eos)
    tail = both[0, 9 + first :]
    assert torch.equal(tail, torch.full_like(tail, eos))


def test_nothing_more_is_the_prompt(case: Any) -> None:
    c = case("ngpt")
    assert torch.equal(generate(c.model, c.tokens, 0), c.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 8}, "9 prompt tokens and max_new_tokens=8 do not fit the model's max_seq_len=16.*0 to 7"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 do not fit"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, r"at least one token, got shape \(1, 0\)"),
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, r"\[batch, seq\].*got shape \(3,\)"),
    ],
)
def test_requests_that_make_no_sense_are_refused(settings: dict[str, Any], message: str, case: Any) -> None:
    c = case("gpt")
    with pytest.raises(ValueError, match=message):
        generate(c.model, **{"prompt": c.tokens, "max_new_tokens": 1, **settings})
