"""`generate` and `stream`: what they add to a `Continuation` (rows as lists or tensors, ends, seeds,
folding, refusals).
"""

from __future__ import annotations

from typing import Any

import golden
import pytest
import torch

from spherelm.generation.folding import Folded
from spherelm.generation.generate import generate, stream
from spherelm.generation.sampling import Sampling

both_arms = pytest.mark.parametrize("arm", golden.ARMS)


@pytest.mark.row("Generation")
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
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"min_p": 2.0}, "min_p must be at most 1, got 2.0"),
        ({"seed": [1, 2]}, "2 seeds for 3 rows: give one for each, or one number for all"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, r"at least one token, got shape \(1, 0\)"),
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, r"\[batch, seq\].*got shape \(3,\)"),
        ({"prompt": []}, "there is no prompt: give at least one row"),
        ({"prompt": [[1], []]}, "a prompt is empty: give at least one token"),
        ({"prompt": [[1], [5, 37]]}, "holds tokens from 5 to 37, the model has 0 to 36"),
        ({"prompt": [[-1]]}, "holds tokens from -1 to -1"),
    ],
)
def test_requests_that_make_no_sense_are_refused(settings: dict[str, Any], message: str, case: Any) -> None:
    c = case("gpt")
    with pytest.raises(ValueError, match=message):
        generate(c.model, **{"prompt": c.tokens, "max_new_tokens": 1, **settings})


@both_arms
def test_rows_of_any_lengths_come_back_as_lists(arm: str, case: Any) -> None:
    model, rows = case(arm).model, [[3, 1, 4], [1], [5, 9, 2, 6]]
    together = generate(model, rows, 5, seed=3)
    assert [row[: len(given)] for row, given in zip(together, rows, strict=True)] == rows
    assert {len(row) - len(given) for row, given in zip(together, rows, strict=True)} == {5}
    for i, row in enumerate(rows):
        assert generate(model, torch.tensor([row]), 5, seed=3 + i).tolist() == [together[i]]
    assert generate(model, rows, 5, seed=[3, 4, 5]) == together


def test_a_list_ends_with_the_end_token_where_it_came(case: Any) -> None:
    model, rows = case("gpt").model, [[3, 1, 4], [1]]
    free = generate(model, rows, 8, temperature=0)
    eos = free[0][3 + 2]
    stopped = generate(model, rows, 8, temperature=0, eos_id=eos)
    for given, whole, row in zip(rows, free, stopped, strict=True):
        new = whole[len(given) :]
        assert row == given + (new[: new.index(eos) + 1] if eos in new else new)


@both_arms
def test_folding_does_not_change_the_tokens(arm: str, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(arm)
    used: list[type] = []

    def record(self: Any, *inputs: Any) -> Any:
        used.append(type(self))
        return original(self, *inputs)

    original = type(c.model).trunk
    monkeypatch.setattr("spherelm.models.decoder.Decoder.trunk", record)
    plain, fast = (generate(c.model, c.tokens, 7, seed=2, fold=fold) for fold in (False, True))
    assert torch.equal(plain, fast)
    assert used == [type(c.model)] * 7 + [Folded] * 7


def test_a_model_that_cannot_be_folded_generates_all_the_same(case: Any) -> None:
    c = case("ngpt")
    wanted = generate(c.model, c.tokens, 7, temperature=0)
    calls = []
    c.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(generate(c.model, c.tokens, 7, temperature=0), wanted)
    assert len(calls) == 7, "its hooks are called"


def test_a_window_goes_past_the_limit(case: Any) -> None:
    c = case("ngpt")
    assert generate(c.model, c.tokens, 30, temperature=0, window=True).shape == (3, 39)


def test_a_stream_refuses_before_its_first_step_and_gives_each_token_as_it_comes(case: Any) -> None:
    c = case("gpt")
    with pytest.raises(ValueError, match="do not fit"):
        stream(c.model, [[1]], 16)
    steps = stream(c.model, c.tokens.tolist(), 7, Sampling(0.9, top_k=5), seed=4)
    whole = generate(c.model, c.tokens, 7, temperature=0.9, top_k=5, seed=4)
    assert torch.equal(torch.stack(list(steps), 1), whole[:, 9:])
    assert list(stream(c.model, [[1]], 0)) == []


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.2}, {"top_k": 2}, {"top_p": 0.2}, {"min_p": 0.7}, {"repetition_penalty": 5.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_of_sampling_is_passed_on(settings: dict[str, float], case: Any) -> None:
    c = case("gpt")
    with_it = generate(c.model, c.tokens, 7, seed=1, **settings)
    steps = stream(c.model, c.tokens.tolist(), 7, Sampling(**settings), seed=1)  # type: ignore[arg-type]
    assert torch.equal(with_it[:, 9:], torch.stack(list(steps), 1))
    assert not torch.equal(with_it, generate(c.model, c.tokens, 7, seed=1))
