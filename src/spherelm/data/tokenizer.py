"""Tokenizers behind one small protocol: bytes, the shipped BPE, any tokenizer.json, SentencePiece, Hugging Face names.

Text is always plain text here: the spelling of a special token inside a document is encoded as ordinary characters,
so no document can forge an end of document, and nothing is added before or after what was asked for.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from spherelm.errors import UserError, read_object

META_FILE = "tokenizer.meta.json"
_JSON_FILE = "tokenizer.json"
_MODEL_FILE = "tokenizer.model"
_END_TOKENS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<|end|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "<EOS>",
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    `fingerprint` is a sha256 (hex) over the definition and the end token: two tokenizers with the same fingerprint
    give the same ids. `eos_id` ends every document. `vocab_size` is the largest id + 1.
    """

    name: str
    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of `text` and nothing else: no begin or end token, special spellings taken as plain text."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`[encode(t) for t in texts]`, in parallel threads where the library has them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens such as the end of a document are left out."""
        ...

    def entries(self) -> Iterator[bytes]:
        """The text that an entry of the vocabulary may stand for, of every entry of more than one byte."""
        ...

    def save(self, directory: Path) -> None:
        """Write the definition into `directory` so that `load_tokenizer(directory)` gives this tokenizer again."""
        ...


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names.

    `spec`: "default" (the shipped 4096-entry BPE), "bytes" (256 bytes and an end token), a path of a `tokenizer.json`
    or of a SentencePiece `.model`, a directory written by `save` (or one of Hugging Face's with a `tokenizer.json`),
    or, where none of these, a name on the Hugging Face hub (needs `transformers`).
    Raises ValueError for a name that is none of these, a damaged definition, or one without an end token.
    """
    if spec == "default":
        return _shipped()
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_directory(path)
    if path.is_file():
        return _from_file(path, eos_token=None)
    if isinstance(spec, Path) or path.suffix in {".json", ".model"} or not _HUB_NAME.fullmatch(spec):
        raise UserError(
            f"unknown tokenizer {str(spec)!r}: no such file; give 'default', 'bytes', a tokenizer.json, "
            "a SentencePiece .model or a Hugging Face name"
        )
    return _from_hub(spec)


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, the end token as 256."""

    def __init__(self) -> None:
        self.name = "bytes"
        self.vocab_size = 257
        self.eos_id = 256
        self.fingerprint = _fingerprint("bytes", 256, b"utf-8")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 (a model may emit any) show as U+FFFD."""
        return bytes(int(i) for i in ids if i != self.eos_id).decode("utf-8", errors="replace")

    def entries(self) -> Iterator[bytes]:
        return iter(())

    def save(self, directory: Path) -> None:
        _write_meta(self, "bytes", directory)


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library, with truncation, padding and BPE dropout switched off.

    `definition`: the file's bytes. `eos_token`: the end token's spelling, looked for when None.
    Raises ValueError for a damaged definition or when no end token is found.
    """

    def __init__(self, definition: bytes, name: str, eos_token: str | None = None) -> None:
        self.name = name
        self._definition = definition
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {name}: not a readable tokenizer.json ({_first_line(error)})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eos_token, self.eos_id = _find_end(name, eos_token, vocabulary.get)
        self.vocab_size = max(vocabulary.values()) + 1
        # Declared special so that `encode_special_tokens` (take special spellings as text) and decode cover it.
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(self.eos_token, special=True, normalized=False)])
        self._tokenizer.encode_special_tokens = True
        unknown = _unknown_id(self._tokenizer, definition)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {i: t.content for i, t in added.items() if t.special and i != unknown}
        self.fingerprint = _fingerprint("json", self.eos_id, definition)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._plain(text, ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self._plain(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def entries(self) -> Iterator[bytes]:
        return _readings(self._tokenizer.get_vocab(with_added_tokens=True))

    def save(self, directory: Path) -> None:
        _write_meta(self, "json", directory, self.eos_token)
        (directory / _JSON_FILE).write_bytes(self._definition)

    def _plain(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, unless the model itself (Unigram, WordLevel) made a special token of plain text:
        then cut inside it.
        """
        if self._special.keys().isdisjoint(ids):
            return ids
        spellings = sorted((s for s in self._special.values() if len(s) > 1), key=len, reverse=True)
        inside = "|".join(f"(?<={re.escape(s[:1])})(?={re.escape(s[1:])})" for s in spellings)
        parts = self._tokenizer.encode_batch(re.split(inside, text), add_special_tokens=False)
        ids = [i for part in parts for i in part.ids]
        if self._special.keys().isdisjoint(ids):
            return ids
        raise UserError(f"tokenizer {self.name}: makes special tokens of plain text; choose another tokenizer")


class SentencePieceTokenizer:
    """A SentencePiece `.model` (needs `sentencepiece`). `definition`: the file's bytes; `eos_token` as above."""

    def __init__(self, definition: bytes, name: str, eos_token: str | None = None) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(
                f"tokenizer {name} needs sentencepiece: pip install '.[data]' in a clone of spherelm"
            ) from error
        self.name = name
        self._definition = definition
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(definition)
        except RuntimeError as error:
            raise UserError(f"tokenizer {name}: not a readable SentencePiece model") from error
        self.vocab_size = int(self._model.vocab_size())
        if eos_token is None and self._model.eos_id() >= 0:
            eos_token = self._model.id_to_piece(self._model.eos_id())
        self.eos_token, self.eos_id = _find_end(name, eos_token, self._lookup)
        self.fingerprint = _fingerprint("sentencepiece", self.eos_id, definition)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode(texts)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(i) for i in ids if i != self.eos_id])
        return text

    def entries(self) -> Iterator[bytes]:
        return _readings(self._model.id_to_piece(i) for i in range(self.vocab_size))

    def save(self, directory: Path) -> None:
        _write_meta(self, "sentencepiece", directory, self.eos_token)
        (directory / _MODEL_FILE).write_bytes(self._definition)

    def _lookup(self, piece: str) -> int | None:
        index = int(self._model.piece_to_id(piece))
        return None if index == self._model.unk_id() else index


def _unknown_id(tokenizer: tokenizers.Tokenizer, definition: bytes) -> int | None:
    """The id of what the model cannot spell. Unigram has it as a number, which the library does not show."""
    if isinstance(tokenizer.model, tokenizers.models.Unigram):
        index: int | None = json.loads(definition)["model"].get("unk_id")
        return index
    token = getattr(tokenizer.model, "unk_token", None)
    return None if token is None else tokenizer.token_to_id(token)


def _byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level vocabularies write bytes (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(0x100) if byte not in shown)
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _readings(spellings: Iterable[str]) -> Iterator[bytes]:
    """The texts that entries of a vocabulary may mean, written with ▁ for a space or in bytes."""
    for spelling in spellings:
        yield spelling.replace("▁", " ").encode("utf-8")
        if _BYTES.keys() >= set(spelling):
            yield bytes(_BYTES[char] for char in spelling)


def _find_end(name: str, eos_token: str | None, lookup: Any) -> tuple[str, int]:
    """(spelling, id) of the end token: `eos_token`, or the first known spelling that `lookup` has."""
    for token in _END_TOKENS if eos_token is None else (eos_token,):
        index = lookup(token)
        if index is not None:
            return token, int(index)
    if eos_token is not None:
        raise UserError(f"tokenizer {name}: the end token {eos_token!r} is not in its vocabulary")
    raise UserError(
        f"tokenizer {name}: no end-of-text token found (looked for {' '.join(_END_TOKENS[:5])} ...); put the file into "
        'a directory with a tokenizer_config.json that holds {"eos_token": "..."} and give that directory'
    )


def _shipped() -> JsonTokenizer:
    resource = importlib.resources.files("spherelm.data") / "shipped" / "bpe4096.json"
    return JsonTokenizer(resource.read_bytes(), name="default")


def _from_file(path: Path, eos_token: str | None, name: str | None = None, advice: str = "") -> Tokenizer:
    name = name or f"{path.resolve().parent.name}/{path.name}"
    kinds: dict[str, Callable[[bytes, str, str | None], Tokenizer]]
    kinds = {".json": JsonTokenizer, ".model": SentencePieceTokenizer}
    if path.suffix not in kinds:
        raise UserError(f"tokenizer {path}: must end in .json (tokenizers) or .model (SentencePiece)")
    try:
        return kinds[path.suffix](path.read_bytes(), name, eos_token)
    except UserError as error:
        raise UserError(f"{path}: {error}{advice}") from error


def holds_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer lies in `directory`, as `load_tokenizer` reads it."""
    return any((directory / name).is_file() for name in (META_FILE, _JSON_FILE, _MODEL_FILE))


def _from_directory(directory: Path) -> Tokenizer:
    """The tokenizer saved in `directory`; the meta file, where there is one, must agree with it."""
    meta = _read_json(directory / META_FILE) or {}
    if not all(isinstance(meta.get(key, ""), str | None) for key in ("kind", "name", "eos_token")):
        raise UserError(f"{directory / META_FILE}: holds what no tokenizer was saved with: {RESTORE}")
    name, eos_token = meta.get("name"), meta.get("eos_token") or _configured_end(directory)
    files = {"json": _JSON_FILE, "sentencepiece": _MODEL_FILE}
    kinds = [meta["kind"]] if "kind" in meta else [kind for kind, file in files.items() if (directory / file).is_file()]
    if not kinds:
        raise UserError(f"no tokenizer in {directory}: expected {META_FILE}, {_JSON_FILE} or {_MODEL_FILE}")
    tokenizer: Tokenizer
    if kinds[0] == "bytes":
        tokenizer = ByteTokenizer()
    elif kinds[0] in files and (directory / files[kinds[0]]).is_file():
        tokenizer = _from_file(directory / files[kinds[0]], eos_token, name, f": {RESTORE}" if meta else "")
    else:
        lacking = directory / files.get(kinds[0], META_FILE)
        raise UserError(f"{lacking}: no file for tokenizer kind {kinds[0]!r}: {RESTORE}")
    if meta.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"the tokenizer in {directory} was changed after it was saved: {RESTORE}")
    return tokenizer


RESTORE = "restore it (data and the runs on it hold the same one), or prepare the data again"
"""What to do about a file that was saved with data or a run."""


def _configured_end(directory: Path) -> str | None:
    """`eos_token` of a Hugging Face tokenizer_config.json, where there is one."""
    token = (_read_json(directory / "tokenizer_config.json") or {}).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _from_hub(name: str) -> Tokenizer:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"unknown tokenizer {name!r}: neither 'default', 'bytes' nor a file; "
            "for a Hugging Face name: pip install '.[hf]' in a clone of spherelm"
        ) from error
    try:
        loaded: Any = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"unknown tokenizer {name!r}: neither 'default', 'bytes' nor a file, and Hugging Face says: "
            f"{_first_line(error)}"
        ) from error
    if getattr(loaded, "is_fast", False):
        return JsonTokenizer(loaded.backend_tokenizer.to_str().encode("utf-8"), name, loaded.eos_token)
    file = getattr(loaded, "vocab_file", None)
    if file and str(file).endswith(".model"):
        return SentencePieceTokenizer(Path(file).read_bytes(), name, loaded.eos_token)
    raise UserError(f"tokenizer {name!r}: has no tokenizer.json and no SentencePiece model; choose another")


def _fingerprint(kind: str, eos_id: int, definition: bytes) -> str:
    return hashlib.sha256(f"{kind} eos={eos_id}\n".encode() + definition).hexdigest()


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer described by files."""
    return {name: getattr(tokenizer, name) for name in ("name", "vocab_size", "eos_id", "fingerprint")}


def _write_meta(tokenizer: Tokenizer, kind: str, directory: Path, eos_token: str | None = None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    meta = {"kind": kind, "eos_token": eos_token, **described(tokenizer)}
    (directory / META_FILE).write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_object(path, RESTORE) if path.is_file() else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
