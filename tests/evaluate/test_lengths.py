"""Perplexity over length: the same tokens at every length, each window alone, and honest standard errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spherelm.data.cutting import Cutter
from spherelm.data.rows import RowSettings
from spherelm.data.tokenizer import load_tokenizer
from spherelm.evaluate import lengths
from spherelm.evaluate.lengths import Document, LengthPlan, encode_document, perplexity_by_length, ratio, read_documents
from spherelm.evaluate.perplexity import mean_loss, token_losses
from spherelm.models import GPTConfig, NGPTConfig, build

PLANS = [
    LengthPlan((4, 8, 16), bins=4),
    LengthPlan((16,), bins=3),
    LengthPlan((8, 24), document_tokens=48),
    LengthPlan((6, 10, 24), stride=5, bins=2),
]


@st.composite
def plans(draw: st.DrawFn) -> LengthPlan:
    """Lengths that divide the longest, or any with a stride."""
    stride = draw(st.none() | st.integers(1, 6))
    if stride is None:
        longest = draw(st.sampled_from([12, 16, 24, 30]))
        divisors = [n for n in range(1, longest) if longest % n == 0]
        chosen = {*draw(st.sets(st.sampled_from(divisors), max_size=3)), longest}
    else:
        chosen = draw(st.sets(st.integers(stride, 40), min_size=1, max_size=4))
    return LengthPlan(tuple(sorted(chosen)), stride, draw(st.none() | st.integers(40, 90)))


@given(plan=plans(), count=st.integers(0, 200))
def test_all_lengths_score_the_same_tokens_once(plan: LengthPlan, count: int) -> None:
    steps, sets = plan.steps(count), []
    for length in plan.lengths:
        starts, scored = plan.starts(length, steps), plan.scored(length)
        targets = [start + i for start in starts for i in range(length - scored + 1, length + 1)]
        assert len(set(targets)) == len(targets)
        assert all(0 <= target < count for target in targets)
        assert all(start >= 0 for start in starts)
        sets.append(set(targets))
    assert all(other == sets[0] for other in sets)
    assert len(sets[0]) == steps * plan.step
    if plan.document_tokens is None:
        # What is left out at the end has no room for one more.
        assert count - 1 - (plan.longest - plan.step) - len(sets[0]) < plan.step
    else:
        assert len(sets[0]) <= plan.document_tokens


def model_of(arm: str) -> Any:
    """A model for 16 tokens, in float64."""
    config = (GPTConfig if arm == "gpt" else NGPTConfig)(
        vocab_size=31, n_layers=2, d_model=16, n_heads=2, d_ff=24, max_seq_len=16
    )
    model = build(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 and arm == "gpt" else 1)
    return model


def texts(*sizes: int) -> list[Document]:
    return [Document(torch.randint(31, (size,)), 3 * size) for size in sizes]


def by_hand(model: Any, document: Tensor, length: int, plan: LengthPlan) -> dict[int, list[float]]:
    """Losses of the targets that count, by their position in the window, window by window and target by target."""
    found: dict[int, list[float]] = {}
    for start in plan.starts(length, plan.steps(len(document))):
        logits = model(document[start : start + length].unsqueeze(0))[0].log_softmax(-1)
        for i in range(length - plan.scored(length), length):
            found.setdefault(i, []).append(-logits[i, document[start + i + 1]].item())
    return found


@pytest.mark.row("Perplexity over length")
@pytest.mark.parametrize("arm", tiny.ARMS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("at_once", [1, 40, 8192])
@torch.no_grad()
def test_losses_are_those_of_each_window_alone(
    arm: str, plan: LengthPlan, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many windows are read at once, also beyond the model's max_seq_len."""
    monkeypatch.setattr(lengths, "TOKENS_AT_ONCE", at_once)
    model, documents = model_of(arm), texts(70, 20, 51)
    found = perplexity_by_length(model, documents, plan)
    long_enough = [d for d in documents if plan.steps(len(d.tokens))]
    assert (found["documents"], found["documents_left_out"]) == (len(long_enough), 3 - len(long_enough))
    for row in found["lengths"]:
        parts = [by_hand(model, document.tokens, row["length"], plan) for document in long_enough]
        every = [loss for part in parts for losses in part.values() for loss in losses]
        assert found["tokens"] == len(every)
        assert row["loss"] == pytest.approx(np.mean(every), rel=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(np.mean(every)), rel=1e-6)
        covered = []
        for piece in row["by_position"]:
            inside = range(piece["from"], piece["to"] + 1)
            losses = [loss for part in parts for i in inside for loss in part[i]]
            assert piece["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
            covered += list(inside)
        assert covered == list(range(row["length"] - plan.scored(row["length"]), row["length"]))


@torch.no_grad()
def test_one_length_is_the_plain_validation_loss() -> None:
    model, (document,) = model_of("ngpt"), texts(65)
    row = perplexity_by_length(model, [document], LengthPlan((16,)))["lengths"][0]
    inputs, targets = document.tokens[:-1].view(4, 16), document.tokens[1:].view(4, 16)
    assert row["loss"] == pytest.approx(mean_loss(model, inputs, targets, 2), rel=1e-6)


def test_every_target_has_its_own_loss(case: Any) -> None:
    for arm in tiny.ARMS:
        c = case(arm)
        logits = c.model(c.tokens)
        expected = F.cross_entropy(logits.flatten(0, 1).float(), c.targets.flatten(), reduction="none")
        torch.testing.assert_close(token_losses(c.model, c.tokens, c.targets), expected.view_as(c.targets))


@torch.no_grad()
def test_errors_are_over_documents() -> None:
    """With equally long documents: the spread of their means; of the change, the spread of their differences."""
    model, documents = model_of("gpt"), texts(50, 50, 50, 50)
    plan = LengthPlan((8, 16))
    found = perplexity_by_length(model, documents, plan)
    assert found["clusters"] == "documents"
    means = {
        n: np.array([np.mean([x for xs in by_hand(model, d.tokens, n, plan).values() for x in xs]) for d in documents])
        for n in plan.lengths
    }
    short, long = found["lengths"]
    assert short["loss_se"] == pytest.approx(means[8].std(ddof=1) / 2, rel=1e-5)
    assert (short["change"], short["change_se"]) == (0, 0)
    assert long["change"] == pytest.approx((means[16] - means[8]).mean(), rel=1e-4)
    assert long["change_se"] == pytest.approx((means[16] - means[8]).std(ddof=1) / 2, rel=1e-4)
    assert long["perplexity_se"] == pytest.approx(long["perplexity"] * long["loss_se"])


@torch.no_grad()
def test_of_a_single_document_errors_are_over_its_windows() -> None:
    model, (document,) = model_of("gpt"), texts(60)
    found = perplexity_by_length(model, [document], LengthPlan((8, 16)))
    assert found["clusters"] == "windows of 16"
    losses = np.array(
        [
            F.cross_entropy(model(document.tokens[i : i + 16].unsqueeze(0))[0], document.tokens[i + 1 : i + 17]).item()
            for i in (0, 16, 32)
        ]
    )
    assert found["lengths"][1]["loss_se"] == pytest.approx(losses.std(ddof=1) / math.sqrt(3), rel=1e-5)
    alone = perplexity_by_length(model, texts(17), LengthPlan((16,)))["lengths"][0]
    assert alone["loss_se"] is None
    assert alone["perplexity_se"] is None
    assert json.loads(json.dumps(alone)) == alone


def test_the_ratio_weighs_documents_by_their_tokens() -> None:
    """Against resampling documents with replacement 20,000 times."""
    draw = np.random.default_rng(0)
    counts = draw.integers(50, 200, 40).astype(float)
    sums = counts * draw.normal(3, 0.3, 40)
    mean, error = ratio(sums, counts)
    picked = draw.integers(0, 40, (20_000, 40))
    resampled = sums[picked].sum(1) / counts[picked].sum(1)
    assert mean == pytest.approx(sums.sum() / counts.sum())
    assert error == pytest.approx(resampled.std(), rel=0.05)


@torch.no_grad()
def test_bits_are_per_byte_of_the_text() -> None:
    model, documents = model_of("ngpt"), texts(70, 53)  # three bytes a token
    found = perplexity_by_length(model, documents, LengthPlan((4, 16)))
    assert found["bytes"] == 3 * found["tokens"]
    for row in found["lengths"]:
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) / 3)
        assert row["bits_per_byte_se"] == pytest.approx(row["loss_se"] / math.log(2) / 3)


@torch.no_grad()
def test_the_model_is_left_in_its_mode() -> None:
    model = model_of("gpt").train()
    perplexity_by_length(model, texts(40), LengthPlan((16,)))
    assert model.training


def test_texts_that_are_too_short_are_refused() -> None:
    with pytest.raises(
        ValueError, match="no document has the 33 tokens that a window of 32 needs \\(2 documents too short\\)"
    ):
        perplexity_by_length(model_of("gpt"), texts(32, 10), LengthPlan((8, 32)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": ()}, "lengths Tuple should have at least 1 item"),
        ({"lengths": (0, 8)}, "lengths.0 must be more than 0, got 0"),
        ({"lengths": (8, 4)}, "lengths must be ascending"),
        ({"lengths": (6, 16)}, "lengths 6 does not divide 16"),
        ({"lengths": (6, 16), "stride": 7}, "stride must be at most the shortest length 6, got 7"),
        ({"lengths": (6, 16), "stride": 0}, "stride must be more than 0, got 0"),
        ({"lengths": (8, 16), "document_tokens": 15}, "document_tokens=15 is less than one window: give at least 16"),
        ({"lengths": (8,), "bins": 0}, "bins must be more than 0"),
    ],
)
def test_plans_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthPlan(**fields)


@pytest.mark.parametrize("name", ["default", "bytes"])
def test_only_the_beginning_is_encoded_where_it_is_enough(name: str) -> None:
    tokenizer, text = load_tokenizer(name), tiny.text(4, 3000)
    whole = encode_document(text, Cutter(tokenizer), None)
    assert whole.bytes == len(text)
    part = encode_document(text, Cutter(tokenizer), 100)
    assert 100 <= len(part.tokens) < len(whole.tokens)
    assert torch.equal(part.tokens, whole.tokens[: len(part.tokens)])
    assert tokenizer.decode(part.tokens.tolist()) == text[: part.bytes]
    assert len(encode_document(text, Cutter(tokenizer), len(text)).tokens) == len(whole.tokens)


def test_documents_are_read_from_any_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one ü", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n', encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"body": {"text": "other"}}\n')
    (other,) = read_documents([tmp_path / "c.*"], load_tokenizer("bytes"), rows=RowSettings("body.text"))
    assert bytes(other.tokens.tolist()) == b"other"
    found = list(read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"], load_tokenizer("bytes")))
    assert [(bytes(d.tokens.tolist()).decode(), d.bytes) for d in found] == [("one ü", 6), ("two", 3), ("three", 5)]
    with pytest.raises(FileNotFoundError, match="no input file"):
        next(read_documents([tmp_path / "a.txt", tmp_path / "missing.txt"], load_tokenizer("bytes")))
