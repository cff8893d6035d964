"""Text from a run directory."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch

from spherelm import generate, load_model
from spherelm.cli.trained import NEW, QUIT
from spherelm.data.tokenizer import ByteTokenizer
from spherelm.generation.folding import Folded
from spherelm.generation.samples import BATCH, PRECISIONS, Conversation, continuations, load_for_inference, read_prompts
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.train.trainer import train


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to write letters."""
    path = tmp_path_factory.mktemp("samples") / "run"
    train(tiny.run_config("ngpt", data, steps=30, eval_every=0, max_seq_len=32), path, show_progress=False)
    return path


def test_a_run_and_its_checkpoint_write_the_same(run: Path) -> None:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    texts = continuations(run, "ba", 3, 8, temperature=0.8, top_k=50, seed=3)
    assert texts == continuations(checkpoint, "ba", 3, 8, temperature=0.8, top_k=50, seed=3)
    assert len(set(texts)) > 1
    assert all(0 < len(text) <= 8 for text in texts)


def test_greedy_text_is_argmax_of_the_model(run: Path) -> None:
    (text,) = continuations(run, "ba", 1, 6, temperature=0)
    ids, model = torch.tensor([list(b"ba")]), load_model(run)
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert text == bytes(ids[0, 2:].tolist()).decode()


def test_text_ends_where_the_model_ends_the_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = continuations(run, "ba", 1, 8, temperature=0)
    third = ord(whole[2])
    monkeypatch.setattr(ByteTokenizer, "eos_id", third, raising=False)
    original = ByteTokenizer.__init__

    def ends_with_third(self: ByteTokenizer) -> None:
        original(self)
        self.eos_id = third

    monkeypatch.setattr(ByteTokenizer, "__init__", ends_with_third)
    (text,) = continuations(run, "ba", 1, 8, temperature=0)
    assert text == whole[: whole.index(chr(third))]


@pytest.mark.parametrize(
    ("prompt", "tokens", "settings", "message"),
    [
        ("", 3, {}, "the prompt is empty: give at least one character"),
        ("ba" * 16, 1, {}, "32 prompt tokens and max_new_tokens=1 do not fit.*max_seq_len=32"),
        ("ba", 31, {}, "ask for 0 to 30 new tokens or shorten the prompt"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    run: Path, prompt: str, tokens: int, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        continuations(run, prompt, 1, tokens, **settings)


def test_many_prompts_are_each_what_they_are_alone(run: Path) -> None:
    """Whatever the batches are: prompts of several lengths, more texts than one batch holds."""
    prompts = ["ba", "nu la", "k"]
    count = BATCH // 2
    texts = continuations(run, prompts, count, 8, seed=5)
    assert len(texts) == 3 * count
    for i in (0, count, BATCH - 1, BATCH, 3 * count - 1):
        assert continuations(run, prompts[i // count], 1, 8, seed=5 + i) == [texts[i]]


def test_the_pieces_that_are_written_are_the_text(run: Path) -> None:
    pieces: list[str] = []
    (text,) = continuations(run, "ba", 1, 20, seed=1, write=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert all(pieces)


def test_text_ends_before_a_stop_string(run: Path) -> None:
    (whole,) = continuations(run, "ba", 1, 20, seed=1)
    stop = whole[5:8]
    (text,) = continuations(run, "ba", 1, 20, seed=1, stop=("not there", stop))
    assert text == whole[: whole.index(stop)]


def test_one_row_may_stop_before_another(run: Path) -> None:
    whole = continuations(run, "ba", 4, 20, seed=1)
    stop = whole[0][3]
    texts = continuations(run, "ba", 4, 20, seed=1, stop=(stop,))
    assert texts == [text.partition(stop)[0] for text in whole]
    assert len({len(text) for text in texts}) > 1


def test_a_window_goes_past_the_models_length(run: Path) -> None:
    """The longest of several: each ends where the model ends the document."""
    texts = continuations(run, "ba", 6, 100, seed=1, window=True)
    assert max(len(text) for text in texts) > 2 * 32


@pytest.mark.row("Number formats for inference")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_writes_and_reports_its_departure(
    precision: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao") if precision == "int8" else None
    (text,) = continuations(run, "ba", 1, 8, temperature=0, precision=precision)
    said = capsys.readouterr().err
    assert len(text) > 0
    if precision == "float32":
        assert said == ""
    else:
        assert said.startswith(f"spherelm: weights in {precision}, departure from the sphere ")
        assert 0 < float(said.split()[-1]) < (3e-7 if precision == "int8" else 1e-2)
    capsys.readouterr()
    assert text[:1] == continuations(run, "ba", 1, 1, temperature=0)[0], "greedy, the first token is the same"


def test_a_run_is_folded_for_inference(run: Path) -> None:
    model, tokenizer = load_for_inference(run)
    assert isinstance(model, Folded)
    assert tokenizer.vocab_size == tiny.VOCAB
    with pytest.raises(
        ValueError,
        match=r"unknown precision 'int4' \(did you mean 'int8'\?\): choose one of float32, bfloat16, float16, int8",
    ):
        load_for_inference(run, "int4")


def test_prompts_are_lines_or_objects(tmp_path: Path) -> None:
    plain, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes("ba\r\n\n  nu é\n".encode())
    assert read_prompts(plain) == ["ba", "  nu é"]
    objects.write_text('{"prompt": "two\\nlines", "id": 3}\n\n{"prompt": ""}\n', encoding="utf-8")
    assert read_prompts(objects) == ["two\nlines", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "holds no prompt: write one a line"),
        ("p.txt", b"ba\n\xff", r"is not UTF-8 text \(byte 3\): convert it"),
        (
            "p.jsonl",
            b'{"prompt": "ba"}\n{"text": "ba"}\n',
            'p.jsonl, line 2: expected an object like {"prompt": "text"}',
        ),
        ("p.jsonl", b"ba\n", "line 1: expected an object"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: expected an object"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_of_prompts_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.txt: give a text file with a prompt a line"):
        read_prompts(tmp_path / "none.txt")


def test_a_conversation_is_one_text_that_both_write(run: Path) -> None:
    talk = Conversation(run, seed=0, temperature=0)
    model = load_model(run)
    text = b""
    for said in ("ba", " nu", "k"):
        text += said.encode()
        answer = "".join(talk.answer(said, 5))
        ids = torch.tensor([list(text)])
        for _ in range(5):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        text = bytes(ids[0].tolist())
        assert text.endswith(answer.encode())


def test_a_conversation_goes_past_the_models_length_and_can_begin_anew(run: Path) -> None:
    """Like a text that slides its window, whoever wrote which part of it; a new text draws with the next seed."""
    talk, model = Conversation(run, seed=3), load_model(run)
    said = "ba" * 20
    assert len("".join(talk.answer(said, 60)).encode()) > 32
    with pytest.raises(ValueError, match="the text is empty"):
        talk.answer("", 4)
    talk.restart()
    talk.restart()  # nothing was written: still the second text
    wanted = next(iter(continuations(run, "nu", 1, 20, seed=4)))
    assert "".join(talk.answer("nu", 20)) == wanted
    assert model.config.max_seq_len == 32, "else the window did not slide"


@pytest.mark.row("Generation")
@pytest.mark.parametrize("prompt", ["ba", "nu la " * 4])
def test_text_in_and_text_out(prompt: str, run: Path) -> None:
    model, tokenizer = load_model(run, with_tokenizer=True)
    drawing: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "seed": 3}
    text = generate(model, prompt, 8, tokenizer=tokenizer, **drawing)
    assert text == prompt + continuations(run, prompt, 1, 8, **drawing)[0]
    tokens = generate(model, [tokenizer.encode(prompt)], 8, tokenizer=tokenizer, **drawing)[0]
    assert tokenizer.decode([token for token in tokens if token != tokenizer.eos_id]) == text
    for bad, said in (({}, "is text: give tokenizer=..."), ({"tokenizer": tokenizer}, "the prompt is empty")):
        with pytest.raises(ValueError, match=said):
            generate(model, "" if bad else prompt, 8, **bad)


@pytest.mark.row("Generation")
def test_a_prompt_streams_to_the_terminal(run: Path, command: commands.Command) -> None:
    answer = command("generate", run, "--prompt", "ba", "--max-new-tokens", 9, "--seed", 3)
    (text,) = continuations(run, "ba", 1, 9, temperature=0.8, top_k=50, seed=3)
    assert (answer.code, answer.out, answer.err) == (0, f"ba{text}\n", "")


def test_without_a_number_a_text_is_as_long_as_the_model_allows(run: Path, command: commands.Command) -> None:
    """Behind the longest prompt; with a window there is no end of it."""
    answer = command("generate", run, "--prompt", "ba")
    assert answer.out == "ba" + continuations(run, "ba", 1, 30, temperature=0.8, top_k=50, seed=0)[0] + "\n"
    for window, length in ((False, 26), (True, 100)):
        drawn = [continuations(run, ["ba", "nu kab"], 1, count, seed=3, window=window) for count in (None, length)]
        assert drawn[0] == drawn[1]
    with pytest.raises(ValueError, match="32 prompt tokens and max_new_tokens=1 do not fit"):
        continuations(run, "ba" * 16, 1, None)


@pytest.mark.row("Generation")
def test_a_file_of_prompts_as_json_lines(run: Path, command: commands.Command, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("ba\nnu\n", encoding="utf-8")
    words = ["--max-new-tokens", 6, "--samples", 2, "--seed", 3, "--temperature", 1.1, "--top-p", 0.9, "--min-p", 0.01]
    words += ["--repetition-penalty", 1.2, "--stop", "k", "zz"]
    answer = command("generate", run, "--prompts", tmp_path / "p.txt", "--json", *words)
    assert answer.code == 0
    records = [json.loads(line) for line in answer.out.splitlines()]
    settings: dict[str, Any] = {"temperature": 1.1, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    texts = continuations(run, ["ba", "nu"], 2, 6, seed=3, stop=("k", "zz"), **settings)
    asked = [("ba", 0), ("ba", 1), ("nu", 0), ("nu", 1)]
    assert records == [
        {"prompt": prompt, "sample": sample, "seed": 3 + i, "text": texts[i]}
        for i, (prompt, sample) in enumerate(asked)
    ]
    plain = command("generate", run, "--prompts", tmp_path / "p.txt", *words)
    assert plain.out == "\n---\n".join(prompt + text for (prompt, _), text in zip(asked, texts, strict=True)) + "\n"


@pytest.mark.row("Generation")
def test_a_conversation_on_the_terminal(run: Path, command: commands.Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("ba\n\n nu\n/new\nk\n/quit\nba\n"))
    answer = command("generate", run, "--interactive", "--max-new-tokens", 40, "--temperature", 0)
    assert answer.code == 0
    talk = Conversation(run, temperature=0)
    first, second = ("".join(talk.answer(said, 40)) for said in ("ba", " nu"))
    last = continuations(run, "k", 1, 40, temperature=0, window=True)[0]
    assert answer.out == f"{first}\n{second}\n{last}\n"
    welcome, refusal = answer.err.splitlines()
    assert all(word in welcome for word in (NEW, QUIT, "Ctrl-C", "Ctrl-D"))
    assert refusal == "spherelm: the text is empty: give at least one character"


def test_stopping_a_text_goes_on_with_the_next(
    run: Path, command: commands.Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the answer, not the program."""
    from spherelm.generation.continuation import Continuation

    steps, original = 0, Continuation.step

    def interrupted(self: Continuation) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Continuation, "step", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("ba\nnu\n"))
    answer = command("generate", run, "--interactive", "--max-new-tokens", 8, "--temperature", 0)
    assert answer.code == 0
    first, second = answer.out.splitlines()[:2]
    assert first.endswith(" [stopped]")
    assert second
    assert steps == 4 + 8


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "give exactly one of --prompt, --prompts and --interactive"),
        (["--prompt", "a", "--interactive"], "give exactly one of --prompt, --prompts and --interactive"),
        (["--interactive", "--json"], "--json has no effect with --interactive: leave one of them out"),
        (["--interactive", "--samples", 2], "--samples has no effect with --interactive: leave one of them out"),
        (["--interactive", "--window"], "--window has no effect with --interactive: leave one of them out"),
        (["--prompt", "a", "--max-new-tokens", -1], "max_new_tokens must not be negative, got -1"),
        (["--prompt", "a", "--samples", 0], "samples must be at least 1, got 0"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty: give at least one character"),
        (["--prompt", "a", "--min-p", 2], "min_p must be at most 1, got 2.0"),
    ],
)
def test_requests_to_the_command_that_make_no_sense(
    words: list[object], line: str, run: Path, command: commands.Command
) -> None:
    answer = command("generate", run, *words)
    assert (answer.code, answer.out, answer.err) == (2, "", f"spherelm: {line}\n")
