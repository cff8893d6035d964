"""Beam search: against every text there is, against greedy choice, and against itself in other company."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import make_pair_case

from spherelm.generation.beam import BeamSettings, beam_search
from spherelm.generation.generate import generate
from spherelm.models import EncoderDecoder, NGPTConfig, ScaleSpec, build

END = 0


@pytest.fixture
def model() -> EncoderDecoder:
    """Random weights far from the start, so that probabilities differ: 5 tokens."""
    return make_pair_case("gpt", vocab_size=5).model.float()


def all_texts(model: Any, source: list[int], limit: int) -> dict[tuple[int, ...], float]:
    """Every text that ends within `limit` tokens, with its log probability, each read whole."""
    texts = {}
    for length in range(limit):
        for text in itertools.product(range(1, 5), repeat=length):
            tokens = torch.tensor([[END, *text]])
            log_p = model(torch.tensor([[*source, END]]), tokens).log_softmax(-1)[0]
            texts[(*text, END)] = sum(log_p[i, t].item() for i, t in enumerate((*text, END)))
    return texts


@pytest.mark.row("Generation")
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_with_enough_beams_it_finds_the_best_texts_there_are(model: EncoderDecoder, length_penalty: float) -> None:
    limit = 4
    (found,) = beam_search(model, [[3, 1, 4]], limit, END, BeamSettings(5**limit, length_penalty))
    found = [hypothesis for hypothesis in found if hypothesis.tokens[-1] == END]
    worth = {text: p / len(text) ** length_penalty for text, p in all_texts(model, [3, 1, 4], limit).items()}
    wanted = sorted(worth, key=lambda text: -worth[text])
    assert [tuple(hypothesis.tokens) for hypothesis in found[:10]] == wanted[:10]
    for hypothesis, text in zip(found[:10], wanted, strict=False):
        assert hypothesis.worth == pytest.approx(worth[text], rel=1e-4)


def test_one_beam_is_the_greedy_choice() -> None:
    torch.manual_seed(3)
    config = NGPTConfig(vocab_size=11, n_layers=2, d_model=16, n_heads=2, max_seq_len=32, s_z=ScaleSpec(20.0))
    lm = build(config)
    prompts = [[1, 2, 3], [4], [5, 6, 7]]
    greedy = generate(lm, prompts, 8, temperature=0.0, eos_id=END, fold=False)
    for prompt, text, (best, *rest) in zip(
        prompts, greedy, beam_search(lm, prompts, 8, END, BeamSettings(1)), strict=True
    ):
        assert not rest
        assert prompt + best.tokens == text


def test_prompts_do_not_see_one_another(model: EncoderDecoder) -> None:
    prompts = [[1, 2, 3], [4, 4], [2, 1, 3], [1]]
    settings = BeamSettings(3, 1.0)
    together = beam_search(model, prompts, 6, END, settings)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = beam_search(model, [prompt], 6, END, settings)
        assert [h.tokens for h in alone] == [h.tokens for h in found]
        assert [h.worth for h in alone] == pytest.approx([h.worth for h in found], rel=1e-4)


def test_what_a_hypothesis_says_of_itself(model: EncoderDecoder) -> None:
    (found,) = beam_search(model, [[2, 2]], 5, END, BeamSettings(4, 1.0))
    assert len(found) == 4
    assert [h.worth for h in found] == sorted((h.worth for h in found), reverse=True)
    for h in found:
        source, written = torch.tensor([[2, 2, END]]), torch.tensor([[END, *h.tokens[:-1]]])
        log_p = model(source, written).log_softmax(-1)[0]
        assert h.log_probability == pytest.approx(log_p[torch.arange(len(h.tokens)), h.tokens].sum().item(), rel=1e-4)
        assert h.worth == pytest.approx(h.log_probability / len(h.tokens))
        assert END not in h.tokens[:-1]


def test_texts_that_do_not_end_are_taken_where_too_few_do(model: EncoderDecoder) -> None:
    (found,) = beam_search(model, [[2, 2]], 1, END, BeamSettings(3))
    assert all(len(h.tokens) == 1 for h in found)
    assert len({tuple(h.tokens) for h in found}) == 3
    assert beam_search(model, [[2, 2]], 0, END) == [[]]


def test_it_leaves_the_mode_of_the_model(model: EncoderDecoder) -> None:
    model.train()
    model.runtime.label_smoothing = 0.3
    beam_search(model, [[1]], 2, END)
    assert model.training


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"beams": 0}, "beams must be more than 0, got 0"),
        ({"length_penalty": -1.0}, "length_penalty must be at least 0"),
        ({"length_penalty": math.nan}, "length_penalty must be a finite number, got nan"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BeamSettings(**fields)
