"""The data of a run: what `--data` may name, a dataclass each, which know how to open themselves."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from spherelm.data.compression import sha256_of
from spherelm.data.corpus import shipped_directory
from spherelm.data.cutting import Cutter
from spherelm.data.documents import check_input, read_blocks
from spherelm.data.hub import HubRequest, HubText
from spherelm.data.loader import Batch, Batches, Loader, validation_windows
from spherelm.data.mixture import MixtureLoader, shares
from spherelm.data.pair_loader import PairLoader, held_out_pairs
from spherelm.data.pairs import holds_pairs, open_pairs, read_pairs_manifest
from spherelm.data.plan import check_held_out
from spherelm.data.rows import RowSettings
from spherelm.data.shards import SPLITS, Split, Tokens, open_tokens, read_manifest
from spherelm.data.stream import StreamLoader, held_out_windows
from spherelm.data.token_files import find_files, open_files, part_of
from spherelm.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from spherelm.errors import UserError


@dataclass(frozen=True)
class Reading:
    """How a run reads its data, in the process `rank` of `world_size`; the rest as in `TrainConfig`."""

    seq_len: int
    batch_size: int
    seed: int
    eval_windows: int
    mask_documents: bool
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class HeldOut:
    """Validation windows of one source of text, as one batch. The weights of all sources sum to 1."""

    name: str
    weight: float
    batch: Batch
    tokens_per_byte: float


@dataclass(frozen=True)
class RunData:
    """The text of a run. end_token: the id that ends documents where they are masked from each other, else `None`.

    tokens_per_update: where updates have another number of tokens than batch_size sequences of
    seq_len, that on average.
    shards: the prepared texts that are read as they are needed; others were verified when they were opened.
    """

    loader: Batches
    held_out: tuple[HeldOut, ...]
    tokenizer: Tokenizer
    identity: dict[str, str]
    end_token: int | None = None
    tokens_per_update: int | None = None
    shards: tuple[Tokens, ...] = ()

    @property
    def tokens_per_byte(self) -> float:
        """How many tokens a UTF-8 byte of the validation text takes, its sources mixed by their weights."""
        return 1 / sum(part.weight / part.tokens_per_byte for part in self.held_out)


class Data(ABC):
    """The training and validation data of a run."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of token ids."""

    @property
    def proportions(self) -> tuple[object, ...]:
        """Facts beyond the texts' identity: data of equal identity and proportions is the same,
        wherever it is stored.
        """
        return (Fraction(1),)

    @abstractmethod
    def epochs(self, sequences: int, seq_len: int) -> dict[str, float]:
        """How often a run of so many sequences reads each of its training texts, by name;
        empty where no end is known.
        """

    @abstractmethod
    def open(self, how: Reading) -> RunData:
        """The batches and validation windows. Raises `UserError` if it cannot be read or does not fit the lengths."""


class Prepared(Data):
    """Tokens in files, of one or several paths."""

    tokenizer: str | None = None
    val: str | None = None

    @abstractmethod
    def weights(self) -> Mapping[Path, Fraction]:
        """The texts and their weights, which sum to 1."""

    def has_val(self, path: Path) -> bool:
        """Whether one part has validation text."""
        files = find_files(path)
        return bool(self.val or files["val"]) if files else "val" in read_manifest(path)["splits"]

    def text(self, path: Path, split: Split) -> Tokens:
        """The tokens of one split of one part."""
        if find_files(path):
            return open_files(path, split, self.tokenizer_of(path), self.val)
        if (self.tokenizer or self.val) and path.exists():
            raise UserError(f"tokenizer= and val= in --data are for token files of other programs, {path} is none")
        return open_tokens(path, split)

    def tokenizer_of(self, path: Path) -> Tokenizer:
        """That of the text `path`."""
        if self.tokenizer is None and find_files(path) and not holds_tokenizer(path):
            raise UserError(
                f"{path} does not say which tokenizer its ids are of: add one, such as --data {path},tokenizer=gpt2"
            )
        return load_tokenizer(self.tokenizer or path)

    @property
    def vocab_size(self) -> int:
        return self.text(next(iter(self.weights())), "train").vocab_size

    @property
    def proportions(self) -> tuple[object, ...]:
        return tuple(self.weights().values())

    def epochs(self, sequences: int, seq_len: int) -> dict[str, float]:
        tokens = sequences * seq_len
        return {str(path): float(w) * tokens / len(self.text(path, "train")) for path, w in self.weights().items()}

    def open(self, how: Reading) -> RunData:
        parts, given = self.weights(), (how.seq_len, how.batch_size, how.seed, how.rank, how.world_size)
        texts, held_out = ([self.text(path, split) for path in parts] for split in SPLITS)
        loader = Loader(texts[0], *given) if len(texts) == 1 else MixtureLoader(texts, [*parts.values()], *given)
        windows = [validation_windows(text, how.seq_len, how.eval_windows) for text in held_out]
        return RunData(
            loader=loader,
            held_out=tuple(
                HeldOut(str(path), float(weight), batch, tokens_per_byte(text))
                for (path, weight), batch, text in zip(parts.items(), windows, held_out, strict=True)
            ),
            tokenizer=self.tokenizer_of(next(iter(parts))),
            identity={
                "train": ",".join(text.fingerprint for text in texts),
                "val": ",".join(text.fingerprint for text in held_out),
                "tokenizer": texts[0].tokenizer_fingerprint,
            },
            end_token=texts[0].eos_id if how.mask_documents else None,
            shards=(*texts, *held_out),
        )


@dataclass(frozen=True)
class Shipped(Prepared):
    """The text that ships with spherelm, prepared on first use."""

    def weights(self) -> Mapping[Path, Fraction]:
        return {shipped_directory(): Fraction(1)}

    @property
    def proportions(self) -> tuple[object, ...]:
        return (Fraction(1),)

    def epochs(self, sequences: int, seq_len: int) -> dict[str, float]:
        return {"the text that ships with spherelm": sum(super().epochs(sequences, seq_len).values())}


@dataclass(frozen=True)
class Shards(Prepared):
    """A directory of `spherelm data prepare`, or files of other programs.

    tokenizer, val: of those files, as for `load_tokenizer` and `open_files`; None takes what lies beside them.
    """

    path: Path
    tokenizer: str | None = None
    val: str | None = None

    def weights(self) -> Mapping[Path, Fraction]:
        return {self.path: Fraction(1)}


@dataclass(frozen=True)
class Mixture(Prepared):
    """Several such, with weights that sum to 1; all files of other programs have the same `tokenizer` and `val`."""

    parts: Mapping[Path, Fraction]
    tokenizer: str | None = None
    val: str | None = None

    def weights(self) -> Mapping[Path, Fraction]:
        return self.parts


@dataclass(frozen=True)
class Hub(Data):
    """Text that is read as it is needed. val: the part of the documents that is held out,
    or a file of validation text.
    """

    request: HubRequest
    tokenizer: str = "default"
    val: str = "0.01"

    @property
    def vocab_size(self) -> int:
        return load_tokenizer(self.tokenizer).vocab_size

    @property
    def proportions(self) -> tuple[object, ...]:
        try:
            return (float(self.val),)
        except ValueError:
            return ("a file",)

    def epochs(self, sequences: int, seq_len: int) -> dict[str, float]:
        return {}

    def open(self, how: Reading) -> RunData:
        text, tokenizer = HubText(self.request), load_tokenizer(self.tokenizer)
        file = Path(self.val)
        part = 0.0 if file.is_file() else part_of(self.val)
        if part:
            blocks = text.blocks(None)
        else:
            check_input(file)
            check_held_out(file, sha256_of(file), text.local_files)
            blocks = read_blocks(file, cutter=Cutter(tokenizer), rows=RowSettings(self.request.column, skip_bad=None))
        with closing(blocks):
            windows, per_byte, fingerprint = held_out_windows(
                blocks, tokenizer, part or 1.0, how.seq_len, how.eval_windows
            )
        loader = StreamLoader(text, tokenizer, how.seq_len, how.batch_size, how.seed, part, how.rank, how.world_size)
        return RunData(
            loader=loader,
            held_out=(HeldOut(self.request.name, 1.0, windows, per_byte),),
            tokenizer=tokenizer,
            identity={"train": text.fingerprint, "val": fingerprint, "tokenizer": tokenizer.fingerprint},
            end_token=tokenizer.eos_id if how.mask_documents else None,
        )


@dataclass(frozen=True)
class Pairs(Data):
    """A directory of `spherelm data pairs`."""

    path: Path

    @property
    def vocab_size(self) -> int:
        size: int = read_pairs_manifest(self.path)["tokenizer"]["vocab_size"]
        return size

    def epochs(self, sequences: int, seq_len: int) -> dict[str, float]:
        return {str(self.path): sequences / read_pairs_manifest(self.path)["splits"]["train"]["pairs"]}

    def open(self, how: Reading) -> RunData:
        manifest, tokenizer = read_pairs_manifest(self.path), load_tokenizer(self.path)
        longest = max(split["longest"] for split in manifest["splits"].values())
        if longest > how.seq_len:
            raise UserError(
                f"{self.path} has texts of up to {longest} tokens, the run is for seq_len={how.seq_len}: give --seq-len "
                f"{longest}, or prepare the pairs with --max-tokens {how.seq_len}"
            )
        pairs, val = (open_pairs(self.path, split) for split in SPLITS)
        held_out, counts = held_out_pairs(val, how.eval_windows, tokenizer.eos_id), manifest["splits"]["val"]
        per_byte = (counts["target_tokens"] + counts["pairs"]) / counts["target_bytes"]
        loader = PairLoader(pairs, tokenizer.eos_id, how.batch_size, how.seed, how.rank, how.world_size)
        return RunData(
            loader=loader,
            held_out=(HeldOut(str(self.path), 1.0, held_out, per_byte),),
            tokenizer=tokenizer,
            identity={"train": pairs.fingerprint, "val": val.fingerprint, "tokenizer": tokenizer.fingerprint},
            tokens_per_update=loader.tokens_per_update,
        )


def parse_data(said: str | None) -> Data:
    """The data that `--data`, or the `data` of a run's config.json, names.

    `None` is the text that ships with spherelm; `stream:NAME,KEY=VALUE,...` a stream; `DIR=WEIGHT,DIR=WEIGHT,...` a
    mixture, unless a directory is called so; all else is one directory, of shards or of pairs, or files of other
    programs. Behind the paths, `tokenizer=NAME` and `val=FILE-OR-PART` say what such files do not. Raises `UserError`
    for what is none.
    """
    if said is None:
        return Shipped()
    if said.startswith("stream:"):
        return _hub(said)
    if Path(said).is_dir():
        return Pairs(Path(said)) if holds_pairs(Path(said)) else Shards(Path(said))
    parts, options = said.split(","), dict[str, str]()
    while len(parts) > 1 and (match := _OPTION.fullmatch(parts[-1])) and not Path(match[1]).is_dir():
        options[match[1]] = match[2]
        parts.pop()
    found = [_WEIGHTED.fullmatch(part) for part in parts]
    if not all(found):
        named = [match[1] if match else part for match, part in zip(found, parts, strict=True)]
        if len(named) > 1 and all(Path(part).is_dir() for part in named):
            weighted = ",".join(f"{part}=1" for part in named)
            raise UserError(f"{said!r} names several directories: give each its weight, such as --data {weighted}")
        return Shards(Path(",".join(parts)), **options)
    weights = [(Path(match[1]), Fraction(match[2])) for match in found if match]
    if len(dict(weights)) < len(weights):
        raise UserError(f"{said!r} names a directory twice: add its weights up")
    whole = shares([weight for _, weight in weights])
    if len(weights) == 1:
        return Shards(weights[0][0], **options)
    return Mixture(
        {path: Fraction(part, sum(whole)) for (path, _), part in zip(weights, whole, strict=True)}, **options
    )


_WEIGHTED = re.compile(r"(.+)=(\d+\.?\d*|\.\d+)")
_OPTION = re.compile(r"(tokenizer|val)=(.+)")


def _hub(said: str) -> Hub:
    name, *pairs = said.removeprefix("stream:").split(",")
    given = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    known = {"config", "split", "column", "limit", "tokenizer", "val"}
    if not name or len(given) < len(pairs) or given.keys() - known:
        raise UserError(
            f"{said!r} is not a stream: write stream:NAME,KEY=VALUE,... with keys {', '.join(sorted(known))}"
        )
    limit = given.pop("limit", None)
    if limit is not None and not limit.isdecimal():
        raise UserError(f"{said!r}: limit={limit} is not a number of rows")
    own: Any = {key: given.pop(key) for key in ("tokenizer", "val") if key in given}
    return Hub(HubRequest(name, **given, limit=None if limit is None else int(limit)), **own)


def tokens_per_byte(tokens: Tokens) -> float:
    """How many tokens a UTF-8 byte of this text takes on average."""
    return len(tokens) / tokens.bytes_total
