"""Scores of translations, and the commands through which an encoder-decoder writes and is scored."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import tiny_pairs
import torch

from spherelm.evaluate.translation import edit_distance, error_rates, translation_scores
from spherelm.generation.beam import BeamSettings, beam_search
from spherelm.generation.generate import generate
from spherelm.runs.loading import load_model
from spherelm.train.trainer import train


def distance_by_definition(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    if not one or not other:
        return len(one) + len(other)
    same = distance_by_definition(one[1:], other[1:]) + (one[0] != other[0])
    return min(same, distance_by_definition(one[1:], other) + 1, distance_by_definition(one, other[1:]) + 1)


def test_the_edit_distance_is_its_definition() -> None:
    words = [w for length in range(4) for w in product("ab", repeat=length)]
    for one, other in product(words, repeat=2):
        assert edit_distance(one, other) == distance_by_definition(one, other)


def test_error_rates_count_against_the_nearest_reference() -> None:
    found = error_rates(["a b c", "x"], [["a b", "a b c d"], ["x"]])
    assert found == {"word_error_rate": 1 / 5, "text_error_rate": 0.5}
    assert error_rates(["", "a"], [["b c"], ["a", "b"]]) == {"word_error_rate": 2 / 3, "text_error_rate": 0.5}


def bleu_by_definition(written: list[str], references: list[str]) -> float:
    """Papineni et al., 2002, for words that every tokenizer takes as they are:
    corpus counts, clipped, up to four words.
    """
    log_precision, own = 0.0, sum(len(text.split()) for text in written)
    for n in range(1, 5):
        hits = total = 0
        for text, reference in zip(written, references, strict=True):
            grams = [[tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in (text.split(), reference.split())]
            hits += sum(min(grams[0].count(g), grams[1].count(g)) for g in set(grams[0]))
            total += len(grams[0])
        log_precision += math.log(hits / total) / 4
    wanted = sum(len(text.split()) for text in references)
    return 100 * math.exp(log_precision + min(0.0, 1 - wanted / own))


def test_bleu_is_its_definition() -> None:
    references = ["the old man looked out over the sea", "a dog runs in the snow now", "two girls eat ice cream today"]
    written = ["the old man looked over the sea", "a dog runs in snow now", "two girls eat ice cream"]
    found = translation_scores(written, [references])
    assert found["bleu"]["value"] == pytest.approx(bleu_by_definition(written, references), rel=1e-9)
    assert found["texts"] == 3
    assert found["bleu"]["interval"] > 0
    assert "tok:13a" in found["bleu"]["signature"]
    perfect = translation_scores(references, [written, references])
    assert perfect["bleu"]["value"] == pytest.approx(100)
    assert perfect["chrf"]["value"] == pytest.approx(100)
    assert perfect["text_error_rate"] == 0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="2 texts and 1 reference: one line must belong to one line"):
        translation_scores(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="nothing to score"):
        translation_scores([], [])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the first letters of its task."""
    directory = tmp_path_factory.mktemp("pairs")
    data = tiny_pairs.make_pairs(directory)
    config = tiny_pairs.run_config("ngpt", data, steps=60, seq_len=24, d_model=32, label_smoothing=0.0)
    train(config, directory / "run", show_progress=False)
    return directory / "run"


def decoded(tokens: list[int]) -> str:
    return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


def test_generate_writes_a_text_for_a_text(run: Path, command: commands.Command) -> None:
    model, source = load_model(run), list(b"bada")
    (best, second, *_) = beam_search(model, [source], 12, 256, BeamSettings(4))[0]
    answer = command("generate", run, "--prompt", "bada", "--beams", 4, "--max-new-tokens", 12)
    assert answer.code == 0
    assert answer.out == decoded(best.tokens) + "\n"
    both = command("generate", run, "--prompt", "bada", "--beams", 4, "--samples", 2, "--max-new-tokens", 12)
    assert both.out == f"{decoded(best.tokens)}\n{decoded(second.tokens)}\n"
    greedy = command("generate", run, "--prompt", "bada", "--temperature", 0, "--max-new-tokens", 12)
    (row,) = generate(model, [source], 12, temperature=0.0, eos_id=256)
    assert row[0] == 256
    assert greedy.out == decoded(row) + "\n"


def test_drawn_texts_do_not_depend_on_their_company(run: Path) -> None:
    model = load_model(run)
    prompts = [list(b"bada"), list(b"ki"), list(b"mudali")]
    together = generate(model, prompts, 10, eos_id=256, seed=5)
    for i, prompt in enumerate(prompts):
        assert generate(model, [prompt], 10, eos_id=256, seed=5 + i) == [together[i]]
    wide = generate(model, torch.tensor([list(b"bada")] * 2), 10, eos_id=256, seed=5)
    assert wide[:, 0].tolist() == [256, 256]


def test_prompts_of_a_file_become_lines(run: Path, command: commands.Command, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("bada\nki\n")
    plain = command("generate", run, "--prompts", tmp_path / "texts", "--beams", 2, "--max-new-tokens", 12)
    records = command("generate", run, "--prompts", tmp_path / "texts", "--beams", 2, "--max-new-tokens", 12, "--json")
    found = [json.loads(line) for line in records.out.splitlines()]
    assert [r["prompt"] for r in found] == ["bada", "ki"]
    assert [r["text"] for r in found] == plain.out.splitlines()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--interactive"], "holds an encoder-decoder, which cannot converse"),
        (["--prompt", "x", "--beams", "2", "--samples", "3", "--max-new-tokens", "4"], "2 beams cannot find 3 texts"),
        (
            ["--prompt", "x" * 24, "--max-new-tokens", "4"],
            "24 tokens and an end token, more than the model's max_seq_len=24: shorten it",
        ),
        (["--prompt", "x", "--max-new-tokens", "24"], "ask for 0 to 23 new tokens"),
        (["--prompt", "x", "--beams", "0", "--max-new-tokens", "4"], "beams must be more than 0, got 0"),
    ],
)
def test_what_generate_cannot_do_is_said(run: Path, flags: list[str], said: str, command: commands.Command) -> None:
    answer = command("generate", run, *flags)
    assert answer.code == 2
    assert said in answer.err


def test_a_language_model_can_be_searched_too(tmp_path: Path, command: commands.Command) -> None:
    train(tiny.run_config("ngpt", tiny.make_data(tmp_path)), tmp_path / "run", show_progress=False)
    (best, *_) = beam_search(load_model(tmp_path / "run"), [list(b"ba")], 6, 256, BeamSettings(3))[0]
    answer = command("generate", tmp_path / "run", "--prompt", "ba", "--beams", 3, "--max-new-tokens", 6)
    assert answer.out.startswith("ba")
    assert answer.out == "ba" + decoded(best.tokens) + "\n"


@pytest.mark.row("Translation")
def test_eval_scores_what_the_run_writes(run: Path, command: commands.Command, tmp_path: Path) -> None:
    source, target = tiny_pairs.write_files(tmp_path, "test", ["bada ki", "mu", "lila baki"])
    out = tmp_path / "scores.json"
    flags = ["--translate", source, "--reference", target, "--beams", 3, "--json", out, "--write", tmp_path / "written"]
    answer = command("eval", run, *flags)
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(out.read_text())
    written = (tmp_path / "written").read_text().splitlines()
    wanted = translation_scores(written, [target.read_text().splitlines()])
    assert found["arm"] == "ngpt"
    assert {key: found["translation"][key] for key in wanted} == wanted
    assert (found["translation"]["beams"], found["translation"]["length_penalty"]) == (3, 1.0)
    best = beam_search(load_model(run), [list(b"bada ki")], 23, 256, BeamSettings(3))[0][0]
    assert written[0] == " ".join(decoded(best.tokens).split())
    assert answer.out.splitlines()[1].startswith("BLEU")
    again = command("eval", run, "--translate", source, "--reference", target, "--write", tmp_path / "written")
    assert again.code == 2
    assert "choose another --write" in again.err


def test_eval_wants_texts_and_references(run: Path, command: commands.Command, tmp_path: Path) -> None:
    source, target = tiny_pairs.write_files(tmp_path, "test", ["ba", "mu"])
    target.write_text("one\n")
    for flags, said in (
        (["--translate", source], "--translate acts only with --reference: give both"),
        (["--translate", source, "--reference", target], "2 texts and 1 reference"),
        (["--translate", tmp_path / "none", "--reference", target], "no input file"),
    ):
        answer = command("eval", run, *flags)
        assert answer.code == 2
        assert said in answer.err
