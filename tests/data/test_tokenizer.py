"""Tokenizers against the libraries they wrap, used directly; saving, and what users get wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from spherelm.data.tokenizer import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

TEXTS = [
    "",
    " leading and trailing ",
    "Line one.\n\n  Line two,\tindented; Zoë's naïve 東京 🙂\r\n",
    "don't 1984 ''quoted'' x=y+1",
    "a <|endoftext|> b </s> <s> c <unk> <|padding|>",
]
FORGED = "a <|endoftext|> b</s><s>c<|endoftext|></s>"


@pytest.fixture(scope="session")
def files(shared: Path) -> Path:
    return shared / "data" / "tokenizers"


EVERY = ["gpt2/tokenizer.json", "gpt-neox-olmo/tokenizer.json", "llama2/tokenizer.json", "llama2/tokenizer.model"]


@pytest.fixture(scope="session", params=["default", "bytes", *EVERY])
def tokenizer(request: pytest.FixtureRequest, files: Path) -> Tokenizer:
    return load_tokenizer(request.param if "/" not in request.param else files / request.param)


def test_round_trips_text_without_adding_anything(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode("") == []


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_a_document_cannot_forge_its_end(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id not in tokenizer.encode(FORGED)
    assert tokenizer.decode([*tokenizer.encode(FORGED), tokenizer.eos_id]) == FORGED


def test_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for field in ("name", "vocab_size", "eos_id", "fingerprint"):
        assert getattr(again, field) == getattr(tokenizer, field)
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    again.save(tmp_path / "copy")
    for path in tmp_path.glob("tokenizer*"):
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "size", "eos"), [("gpt2", 50257, 50256), ("gpt-neox-olmo", 50280, 0), ("llama2", 32000, 2)]
)
def test_json_against_the_library(files: Path, name: str, size: int, eos: int) -> None:
    path = files / name / "tokenizer.json"
    ours, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS[:4]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert (ours.vocab_size, ours.eos_id) == (size, eos)


@pytest.mark.row("Tokenizers")
def test_sentencepiece_against_the_library(files: Path) -> None:
    path = files / "llama2" / "tokenizer.model"
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*TEXTS, FORGED]:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.vocab_size, ours.eos_id) == (theirs.vocab_size(), theirs.eos_id())


def test_both_forms_of_llama2_agree(files: Path) -> None:
    model, json_form = (load_tokenizer(files / "llama2" / f"tokenizer.{kind}") for kind in ("model", "json"))
    for text in [*TEXTS, FORGED]:
        assert model.encode(text) == json_form.encode(text)


@pytest.mark.row("Tokenizers")
def test_hugging_face_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name goes to AutoTokenizer; what it loads gives the ids that it gives itself, and saves without it."""
    transformers = pytest.importorskip("transformers")
    load_tokenizer("default").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")
    names = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: names.append(name) or theirs)
    ours = load_tokenizer("someone/books")
    assert names == ["someone/books"]
    assert ours.eos_id == theirs.eos_token_id
    for text in TEXTS[:4]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_are_utf8(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id]) == text


@cache
def shipped() -> Tokenizer:
    return load_tokenizer("default")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_the_shipped_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = shipped()
    assert tokenizer.vocab_size == 4096
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_that_are_no_text_show_as_replacement() -> None:
    assert ByteTokenizer().decode([65, 255, 66, 256]) == "A\ufffdB"


def definition(model: dict[str, Any], **fields: Any) -> bytes:
    """A tokenizer.json by hand."""
    empty = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None}
    rest = {"version": "1.0", "added_tokens": [], "post_processor": None, "decoder": None}
    return json.dumps({**empty, **rest, "model": model, **fields}).encode()


WORDS = {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1, "<s>": 2, "a": 3, "b": 4}, "unk_token": "<unk>"}
UNIGRAM = {
    "type": "Unigram",
    "unk_id": 0,
    "vocab": [["<unk>", 0.0], ["</s>", 0.0], *([c, -9.0] for c in "</s>ab")],
    "byte_fallback": False,
}


def test_a_model_that_itself_finds_the_end_token_is_kept_from_it() -> None:
    raw = tokenizers.Tokenizer.from_str(definition(UNIGRAM).decode())
    assert raw.encode("a</s>b").ids == [6, 1, 7]
    tokenizer = JsonTokenizer(definition(UNIGRAM), "unigram")
    assert tokenizer.eos_id == 1
    assert tokenizer.encode("a</s>b") == [6, 2, 3, 4, 5, 7]
    assert tokenizer.encode_batch(["a</s>b"]) == [[6, 2, 3, 4, 5, 7]]


@pytest.mark.parametrize("unknown", [0, 2])
def test_a_unigram_model_that_knows_its_unknown_token_by_number(unknown: int, tmp_path: Path) -> None:
    """As of T5 (number 2) and XLM-R: the unknown token is declared special, and text is full of what it stands for."""
    names = {unknown: "<unk>", 1: "</s>"}
    vocab = [[names.get(i, f"<pad{i}>"), 0.0] for i in range(3)] + [[c, -1.0 - i] for i, c in enumerate("▁abcé")]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": piece, "special": True, **flags} for i, (piece, _) in enumerate(vocab[:3])]
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    model = {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": False}
    content = definition(model, added_tokens=added, pre_tokenizer=spaces, decoder=spaces)
    (tmp_path / "tokenizer.json").write_bytes(content)
    ours, theirs = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_str(content.decode())
    texts = ["abc cab", "the cat", "slow 東京 é", "x"]
    assert ours.encode_batch(texts) == [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert unknown in ours.encode("x")
    assert ours.eos_id == 1
    assert 1 not in ours.encode("a</s>b"), "the end token still cannot be forged"


def test_truncation_padding_and_end_tokens_of_the_file_are_off() -> None:
    spaces = {"type": "Whitespace"}
    fields = {
        "pre_tokenizer": spaces,
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<unk>"},
        "post_processor": {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 2]},
    }  # fmt: skip
    tokenizer = JsonTokenizer(definition(WORDS, **fields), "words")
    assert tokenizer.encode("a b a b") == [3, 4, 3, 4]


def test_end_token_from_a_hugging_face_directory(tmp_path: Path) -> None:
    vocab = {**WORDS["vocab"], "[STOP]": 5}
    vocab.pop("</s>")
    (tmp_path / "tokenizer.json").write_bytes(definition({**WORDS, "vocab": vocab}))
    with pytest.raises(ValueError, match=r"no end-of-text token found.*tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    for eos in ("[STOP]", {"content": "[STOP]"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(tmp_path).eos_id == 5
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="'</s>' is not in its vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "spec", ["no/such/file/at-all", "missing.json", "missing.model", "what is this", "../no-such-folder"]
)
def test_unknown_tokenizer(spec: str) -> None:
    with pytest.raises(ValueError, match=r"unknown tokenizer .* 'default', 'bytes'"):
        load_tokenizer(spec)


def test_unknown_hugging_face_name(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def offline(name: str) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nMore lines.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"unknown tokenizer 'nobody'.*couldn't connect") as error:
        load_tokenizer("nobody")
    assert "\n" not in str(error.value)


def test_hugging_face_name_without_a_tokenizer_json(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow tokenizer is read from its SentencePiece file, and one that has none is refused."""
    transformers = pytest.importorskip("transformers")
    loaded = SimpleNamespace(vocab_file=str(files / "llama2" / "tokenizer.model"), eos_token="</s>")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: loaded)
    assert load_tokenizer("nobody").fingerprint == load_tokenizer(files / "llama2" / "tokenizer.model").fingerprint
    loaded.vocab_file = None
    with pytest.raises(ValueError, match=r"'nobody': has no tokenizer\.json and no SentencePiece model"):
        load_tokenizer("nobody")


def test_optional_libraries_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[hf\]' in a clone of spherelm"):
        load_tokenizer("nobody")
    (tmp_path / "x.model").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"pip install '\.\[data\]' in a clone of spherelm"):
        load_tokenizer(tmp_path / "x.model")


def test_damaged_definitions(tmp_path: Path) -> None:
    for name, problem in [("t.json", "not a readable tokenizer.json"), ("t.model", "not a readable SentencePiece")]:
        (tmp_path / name).write_bytes(b'{"version": \xff')
        with pytest.raises(ValueError, match=problem):
            load_tokenizer(tmp_path / name)
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must end in \.json"):
        load_tokenizer(tmp_path / "t.txt")


def test_damaged_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    JsonTokenizer(definition(WORDS), "words").save(tmp_path)
    changed = definition({**WORDS, "vocab": {**WORDS["vocab"], "c": 5}})
    (tmp_path / "tokenizer.json").write_bytes(changed)
    with pytest.raises(ValueError, match="was changed after it was saved"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no file for tokenizer kind 'json'"):
        load_tokenizer(tmp_path)
    for text, problem in [("{", "is not JSON"), ("[]", "where an object was expected")]:
        (tmp_path / "tokenizer.meta.json").write_text(text)
        with pytest.raises(ValueError, match=problem):
            load_tokenizer(tmp_path)


def test_fingerprint_is_of_the_content(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "llama2" / "tokenizer.model", tmp_path / "other-name.model")
    copy, original = load_tokenizer(tmp_path / "other-name.model"), load_tokenizer(files / "llama2" / "tokenizer.model")
    assert isinstance(copy, SentencePieceTokenizer)
    assert copy.fingerprint == original.fingerprint
    everything = [load_tokenizer(s) for s in ("default", "bytes", files / "gpt2" / "tokenizer.json")]
    assert len({t.fingerprint for t in [copy, *everything]}) == 4


def test_a_file_in_the_working_directory_named_without_a_folder(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(files / "gpt2" / "tokenizer.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("tokenizer.json").name == f"{os.path.basename(tmp_path)}/tokenizer.json"
