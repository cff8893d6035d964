"""Bytes out of a file that may be compressed. Whatever is cut off, damaged or followed by something else is refused.

The libraries' own file readers take damage for the end: `lzma.LZMAFile` and `bz2.BZ2File` at the start of a second
stream, zstandard's stream reader anywhere in a frame. So every format goes stream by stream through its
bare decompressor.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from spherelm.errors import UserError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_READ_BYTES = 1 << 20
_COMPRESSED_BYTES = 1 << 14  # few, since one may stand for thousands


class DocumentError(UserError):
    """An input that cannot be read as documents; the message names the file, the place and the fix."""


def sha256_of(path: Path, said: Callable[[int], object] = lambda size: None) -> str:
    """The sha256 of a file, in hexadecimal; `said` is called with the number of bytes read since its last call."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while data := content.read(_READ_BYTES):
            digest.update(data)
            said(len(data))
    return digest.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    """The bytes of a file, and what says how far it is read; the suffix says how it is compressed, if it is.

    Reading raises DocumentError for a file that is not whole or not what its suffix says, or where the library for .zst
    is missing.
    """
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        yield (open_compressed(file, suffix, str(path)) if suffix in COMPRESSIONS else file), file.tell


def read_bytes(path: Path) -> Iterator[tuple[bytes, int]]:
    """(bytes, how far the file is read) piece by piece, of what `opened` gives."""
    with opened(path) as (content, position):
        while data := content.read1(_READ_BYTES):
            yield data, position()


def open_compressed(file: IO[bytes], suffix: str, name: str) -> io.BufferedReader:
    """The decompressed content of `file` as a file that is read once; `name` is for the message if it is damaged."""
    return io.BufferedReader(_Decompressed(_decompressed(file, suffix, name)), _READ_BYTES)


class _Decompressed(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._held = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._held = self._held or memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


def _decompressed(file: IO[bytes], suffix: str, name: str) -> Iterator[bytes]:
    """The content of the streams stored one after another in `file`; zeros may follow a stream."""
    start, fault = _decompressor(suffix)
    damaged = DocumentError(f"{name}: damaged or cut off, or not a {suffix} file; get it again")
    stream, streams = None, 0
    while data := file.read(_COMPRESSED_BYTES):
        while data:
            if stream is None:
                data = data.lstrip(b"\0") if streams else data
                if not data:
                    break
                stream, streams = start(), streams + 1
            try:
                out = stream.decompress(data)
            except fault as error:
                raise damaged from error
            if out:
                yield out
            data, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
    if stream is not None or not streams:
        raise damaged


def _decompressor(suffix: str) -> tuple[Callable[[], Any], type[Exception]]:
    """The decompressor of one stream of this format, and the exceptions it raises for damaged data."""
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DocumentError("a .zst file needs zstandard: pip install '.[data]' in a clone of spherelm") from error
        return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), zstandard.ZstdError
    formats: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
        ".gz": (lambda: zlib.decompressobj(wbits=31), zlib.error),
        ".xz": (lzma.LZMADecompressor, lzma.LZMAError),
        ".bz2": (bz2.BZ2Decompressor, OSError),
    }
    return formats[suffix]
