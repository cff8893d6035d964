"""Documents streamed by `datasets`: from the Hugging Face hub, or from files on this disk through the same code.

Nothing is downloaded whole and no cache is made. The position in a stream is a small JSON value, so that reading goes
on where it stopped, even in another process. This module alone imports `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from spherelm.data.compression import open_compressed, sha256_of
from spherelm.data.documents import BLOCK_SIZE, Block, DocumentError
from spherelm.data.rows import RowSettings, no_column, top_field
from spherelm.errors import UserError

_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_REVISION = re.compile(r"^hf://datasets/[^@]+@([^/]+)/")
_COMPRESSED = re.compile(r"\.(gz|xz|bz2|zst)$")


@dataclass(frozen=True)
class HubRequest:
    """A dataset to stream.

    Attributes:
        name: Its name on the hub (NAME@REVISION for one revision), a .parquet or .jsonl file, or a folder of such.
        config: The configuration of the dataset, where it has several.
        split: The split of the dataset to read.
        column: The field with the text, as in `RowSettings`.
        limit: Number of rows of the dataset to read; all if left out.
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str = RowSettings.field
    limit: int | None = None


class HubText:
    """The documents of one dataset in their order, from any position.

    `identity` (JSON) names what is read: two streams with the same one give the same documents. `local_files` are those
    of its files that lie on this disk, by their sha256. Raises DocumentError for what cannot be opened,
    with one line that says why. `skip_bad`: as in `RowSettings`.
    """

    def __init__(self, request: HubRequest, skip_bad: bool | None = None) -> None:
        if request.limit is not None and request.limit < 1:
            raise UserError(f"the limit of rows must be at least 1, got {request.limit}")
        self.request = request
        with _said_in_one_line(request.name):
            builder = _open_builder(request)
            stream = builder.as_streaming_dataset(split=request.split)
        columns = stream.column_names
        self._rows_read = RowSettings(request.column, skip_bad)
        column = None if columns is None else top_field(request.column, columns)
        if columns is not None and column is None:
            raise no_column(Path(request.name), self._rows_read, columns)
        self._stream = stream if column is None else stream.select_columns([column])
        files = _files(request, builder)
        self.local_files = {version[0]: Path(file) for file, version in files if Path(file).is_file()}
        self.identity = _identity(request, builder, files)
        self._start = json.dumps(self._stream.state_dict())

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def documents(self, position: dict[str, Any] | None = None) -> Generator[str, None, None]:
        """The texts from `position` on (the start where None), Bad for a row that is skipped.

        One such iterator at a time: `position` follows the last.
        """
        given = position or {"rows": 0, "stream": json.loads(self._start)}
        self._rows = int(given["rows"])
        self._stream.load_state_dict(given["stream"])
        limit = self.request.limit
        with _said_in_one_line(self.request.name), closing(iter(self._stream)) as rows:
            while limit is None or self._rows < limit:
                row = next(rows, None)
                if row is None:
                    return
                self._rows += 1
                yield self._rows_read.text(f"{self.request.name}, row {self._rows}", row)

    def position(self) -> dict[str, Any]:
        """Where the document after the last one given begins (JSON)."""
        return {"rows": self._rows, "stream": json.loads(json.dumps(self._stream.state_dict()))}

    def blocks(self, after: dict[str, Any] | None, block_size: int = BLOCK_SIZE) -> Generator[Block, None, None]:
        """The documents in blocks of `block_size` characters, starting after the block whose `after` is given."""
        read = int(after["characters"]) if after else 0
        held, texts = 0, list[str]()
        with closing(self.documents(after)) as documents:
            for text in documents:
                texts.append(text)
                held += len(text)
                if held >= block_size:
                    read += held
                    yield self._block(texts, read)
                    held, texts = 0, []
            if texts:
                yield self._block(texts, read + held)

    def _block(self, texts: list[str], characters: int) -> Block:
        after = {**self.position(), "characters": characters}
        return Block(Path(self.request.name), texts, characters, after=after)


@contextmanager
def cache_alone_without_network() -> Iterator[None]:
    """Have `datasets` read only its cache where the hub does not answer, instead of trying for minutes."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    try:
        urlopen(Request(config.HF_ENDPOINT, method="HEAD"), timeout=5).close()
    except HTTPError:
        pass  # an answer
    except OSError:
        config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _open_builder(request: HubRequest) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DocumentError(
            f"streaming {request.name} needs datasets: pip install '.[data]' in a clone of spherelm"
        ) from error
    _refuse_damage()
    path = Path(request.name).expanduser()
    if path.is_file():
        loader = _LOADERS.get(Path(_COMPRESSED.sub("", path.name)).suffix)
        if loader is None:
            raise DocumentError(
                f"{path}: only .parquet, .jsonl and .json files are streamed; prepare others with spherelm data prepare"
            )
        if request.config is not None:
            raise DocumentError(f"{path} is one file, which has no configurations: leave its name out")
        files = [str(path.resolve())]
        return datasets.load_dataset_builder(loader, data_files={request.split: files})
    if path.is_dir():
        return datasets.load_dataset_builder(str(path.resolve()), request.config)
    name, _, revision = request.name.partition("@")
    return datasets.load_dataset_builder(name, request.config, revision=revision or None)


@cache
def _refuse_damage() -> None:
    """Have compressed files read by `open_compressed`:
    the readers that fsspec comes with take some damage for the end.
    """
    from fsspec.compression import compr, register_compression

    def opened(suffix: str, other: Any, file: Any, mode: str = "rb", **given: Any) -> Any:
        if "r" not in mode:
            return other(file, mode=mode, **given)
        return open_compressed(file, suffix, str(getattr(file, "path", f"a {suffix} file")))

    for name, suffix in (("xz", ".xz"), ("bz2", ".bz2"), ("zstd", ".zst")):
        register_compression(name, partial(opened, suffix, compr.get(name)), suffix[1:], force=True)


def _files(request: HubRequest, builder: Any) -> list[tuple[str, list[str]]]:
    """Each file of the split and what tells it apart:
    the sha256 of a local one, address and version of a remote one.
    """
    files = (builder.config.data_files or {}).get(request.split, [])
    versions = getattr(files, "origin_metadata", [()] * len(files))
    return [(str(file), _version_of(str(file), version)) for file, version in zip(files, versions, strict=True)]


def _identity(request: HubRequest, builder: Any, files: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """The source: the request, and its files."""
    described = [version for _, version in files]
    local = Path(request.name).expanduser().exists()
    revisions = {found[1] for file, _ in files if (found := _REVISION.match(file))}
    return {
        **asdict(request),
        "name": None if local else request.name,  # a folder may be moved
        "config": builder.config.name,
        "revision": ",".join(sorted(revisions)) or None,
        "files": len(described),
        "sha256": hashlib.sha256(json.dumps(described or [builder.hash]).encode()).hexdigest(),
    }


def _version_of(file: str, version: tuple[str, ...]) -> list[str]:
    path = Path(file)
    return [sha256_of(path)] if path.is_file() else [file, *map(str, version)]


@contextmanager
def _said_in_one_line(name: str) -> Iterator[None]:
    """Errors of `datasets` as one-line errors."""
    try:
        yield
    except DocumentError:
        raise
    except ConnectionError as error:
        raise DocumentError(
            f"cannot reach the Hugging Face hub for {name!r} ({_one_line(error)}): check the name and the network, or give "
            "a local folder; finished work is kept"
        ) from error
    except FileNotFoundError as error:
        raise DocumentError(f"no dataset {name!r} ({_one_line(error)}): check the name") from error
    except Exception as error:  # the library raises of every kind: bad config names, damaged files, timeouts
        raise DocumentError(f"cannot read dataset {name!r}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = " ".join(str(error).split()) or type(error).__name__
    reason = " ".join(str(cause).split())
    return text if cause is error or not reason else f"{text} {reason}"
