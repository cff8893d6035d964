"""From logits to tokens: each filter against its definition written as a loop, the draw against the probabilities."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spherelm.generation.sampling import Sampling, candidates, draw, penalized

seeds = st.integers(0, 2**20)


def some_logits(seed: int, rows: int = 3, vocab_size: int = 9) -> Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution to draw from, of all tokens: [batch, vocab]."""
    probabilities, ids = candidates(logits, sampling)
    if ids is None:
        return probabilities
    return torch.zeros_like(logits, dtype=probabilities.dtype).scatter_(-1, ids, probabilities)


def kept_by_definition(p: list[float], s: Sampling) -> list[float]:
    """The filters one after the other on one distribution, most probable first."""
    order = sorted(range(len(p)), key=lambda i: -p[i])[: s.top_k]
    mass = sum(p[i] for i in order)
    share = {i: p[i] / mass for i in order}
    if s.top_p is not None:
        reached = [sum(share[i] for i in order[:count]) for count in range(len(order))]
        order = [i for i, above in zip(order, reached, strict=True) if above < s.top_p]
    if s.min_p is not None:
        order = [i for i in order if share[i] >= s.min_p * share[order[0]]]
    mass = sum(p[i] for i in order)
    return [p[i] / mass if i in order else 0.0 for i in range(len(p))]


@pytest.mark.row("Generation")
@given(
    seeds,
    st.floats(0.2, 3),
    st.none() | st.integers(1, 12),
    st.none() | st.floats(0.05, 0.95),
    st.none() | st.floats(0.01, 0.9),
)
def test_filters_keep_what_their_definitions_say(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = some_logits(seed)
    wanted = [kept_by_definition(row, sampling) for row in torch.softmax(logits.double() / temperature, -1).tolist()]
    got = filtered_probabilities(logits, sampling)
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-4, atol=1e-6)


def test_min_p_keeps_more_where_the_model_is_unsure() -> None:
    logits = torch.tensor([[0.9, 0.05, 0.03, 0.02], [0.3, 0.28, 0.22, 0.2]]).log()
    kept = filtered_probabilities(logits, Sampling(min_p=0.1)) > 0
    assert kept.tolist() == [[True, False, False, False], [True, True, True, True]]


def test_temperature_zero_is_certain_of_the_most_probable() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.9]])
    assert filtered_probabilities(logits, Sampling(0.0, min_p=1.0)).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert draw(logits, Sampling(0.0), [0.99, 0.99]).tolist() == [1, 0]


def test_the_penalty_makes_what_occurred_less_probable_whatever_its_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False], [False, False, False, True]])
    assert penalized(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0], [2.0, -2.0, 1.0, -2.0]]
    assert torch.equal(penalized(logits, seen, 1.0), logits)


FILTERS = [Sampling(), Sampling(top_k=4), Sampling(top_p=0.8), Sampling(min_p=0.1), Sampling(0.7, 5, 0.9, 0.05)]


@pytest.mark.parametrize("sampling", FILTERS)
def test_a_token_is_drawn_as_often_as_it_is_probable(sampling: Sampling) -> None:
    """An even grid of uniform numbers hits every token in proportion to its probability,
    up to one point of the grid.
    """
    count = 1000
    logits = some_logits(4, rows=1).expand(count, 9)
    tokens = draw(logits, sampling, [(i + 0.5) / count for i in range(count)])
    wanted = filtered_probabilities(logits[:1], sampling)[0]
    assert ((torch.bincount(tokens, minlength=9) / count - wanted).abs() <= 1.01 / count).all()
    assert (wanted[tokens] > 0).all()


@given(seeds, st.sampled_from(FILTERS), st.sampled_from([0.0, 0.5, math.nextafter(1.0, 0.0)]))
def test_no_uniform_number_draws_what_was_filtered_out(seed: int, sampling: Sampling, uniform: float) -> None:
    logits = some_logits(seed, vocab_size=50)
    tokens = draw(logits, sampling, [uniform] * 3)
    assert (filtered_probabilities(logits, sampling).gather(-1, tokens.unsqueeze(-1)) > 0).all()


def test_each_row_has_a_uniform_number_of_its_own() -> None:
    logits = torch.zeros(2, 4)
    assert draw(logits, Sampling(), [0.1, 0.9]).tolist() == [0, 3]
    ordered = [draw(logits[:1], Sampling(), [u / 8 + 0.01]).item() for u in range(8)]
    assert all(first <= second for first, second in pairwise(ordered))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_probabilities_are_float32_whatever_the_logits_are(dtype: torch.dtype) -> None:
    logits = some_logits(1).to(dtype)
    probabilities = filtered_probabilities(logits, Sampling(top_p=0.9))
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"temperature": math.inf}, "temperature must be a finite number, got inf"),
        ({"temperature": math.nan}, "temperature must be a finite number, got nan"),
        ({"top_k": 0}, "top_k must be more than 0, got 0"),
        ({"top_p": 0.0}, "top_p must be more than 0, got 0.0"),
        ({"top_p": 1.5}, "top_p must be at most 1, got 1.5"),
        ({"min_p": -0.1}, "min_p must be at least 0, got -0.1"),
        ({"min_p": 1.1}, "min_p must be at most 1, got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be at least 1e-06, got 0.0"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be at least 1e-06, got 1e-40"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be a finite number, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Sampling(**settings)
