"""Rows of JSON, CSV and Parquet files as documents:
which field holds the text, and what becomes of a row without one.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from spherelm.data.compression import COMPRESSIONS, DocumentError, opened, read_bytes

_BATCH = 256
Read = tuple[list[str], int, int]
"""The texts of some rows, Bad for those that are left out; their size, by which blocks are made;
the bytes read of the file.
"""

_MISSING = object()
_NAMES = 12
_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
          (codecs.BOM_UTF16_BE, "UTF-16"))  # fmt: skip
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class Bad(str):
    """In place of the text of a row that is left out: why it cannot be read."""


@dataclass(frozen=True)
class RowSettings:
    """How rows are read; a row may also be a string. `skip_bad` is None where no flag chooses: as False.

    Attributes:
        field: Field of a row that holds the text, in every input; body.text for "text" within "body".
        skip_bad: Leave out rows without readable text, and count them; without this flag they are errors.
    """

    field: str = "text"
    skip_bad: bool | None = False

    @property
    def other_field(self) -> str:
        """How to fix a wrong field."""
        return "name another field" if self.skip_bad is None else "name another with --field"

    def text(self, where: str, record: Any) -> str:
        """The text of one row, Bad for one that is skipped. Raises DocumentError naming `where` it is."""
        found = record if isinstance(record, str) else value_in(record, self.field)
        if not isinstance(found, str):
            names = ", ".join(_names_in(record)[:_NAMES])
            missing = f"it has {names}" if names else "it is not an object"
            reason = missing if found is _MISSING else f"it is {_KINDS.get(type(found), type(found).__name__)}"
            fix = self.other_field if found is _MISSING and names else "fix that row"
            return self.refuse(where, f'no string under "{self.field}"', f" ({reason}); {fix}")
        try:
            found.encode("utf-8")
        except UnicodeEncodeError as error:
            return self.refuse(where, "half of a surrogate pair", f" at character {error.start}; fix it")
        return found

    def refuse(self, where: str, reason: str, more: str) -> Bad:
        """Raise DocumentError, unless bad rows are skipped."""
        if self.skip_bad:
            return Bad(reason)
        way_out = "" if self.skip_bad is None else ", or leave such rows out with --skip-bad"
        raise DocumentError(f"{where}: {reason}{more}{way_out}")


def value_in(record: Any, field: str) -> Any:
    """The value in `record` of `field`, which may be a path of names joined by points."""
    if not isinstance(record, dict):
        return _MISSING
    if field in record:
        return record[field]
    head, point, rest = field.partition(".")
    return value_in(record[head], rest) if point and head in record else _MISSING


def top_field(field: str, names: Iterable[str]) -> str | None:
    """The one of the columns `names` that holds `field`, if any does."""
    return next((name for name in (field, field.partition(".")[0]) if name in names), None)


def _names_in(record: Any, before: str = "") -> list[str]:
    """The fields of an object, those within others by points."""
    if not isinstance(record, dict):
        return []
    inner = ((f"{before}{name}", value) for name, value in record.items())
    return [name for path, value in inner for name in (_names_in(value, f"{path}.") or [path])]


def no_column(path: Path, rows: RowSettings, names: Iterable[str]) -> DocumentError:
    """The error of a table without the column of the text."""
    return DocumentError(f'{path} has no column "{rows.field}" (it has {", ".join(names)}): {rows.other_field}')


def line_rows(path: Path, rows: RowSettings) -> Iterator[Read]:
    """The lines of a .jsonl file."""
    offset = 0
    with opened(path) as (content, position):
        for number, line in enumerate(content, start=1):
            text = [_text_of_line(path, number, offset, line, rows)] if line.strip() else []
            offset += len(line)
            yield text, len(line), position()


def _text_of_line(path: Path, number: int, offset: int, line: bytes, rows: RowSettings) -> str:
    where = f"{path}, line {number}"
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        if rows.skip_bad:
            return Bad("not UTF-8")
        raise not_utf8(path, f"byte {offset + error.start}") from error
    except (ValueError, RecursionError) as error:
        return rows.refuse(where, "not JSON", f" ({error}); make each line one JSON object")
    return rows.text(where, record)


def csv_rows(path: Path, rows: RowSettings, delimiter: str) -> Iterator[Read]:
    """The rows of a .csv or .tsv file whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)
    with opened(path) as (content, position):
        reader = csv.reader(TextIOWrapper(content, "utf-8-sig", newline=""), strict=True, delimiter=delimiter)
        try:
            names = next(reader, [])
            if rows.field not in names:
                raise no_column(path, rows, names)
            for values in filter(None, reader):
                text = rows.text(f"{path}, line {reader.line_num}", dict(zip(names, values, strict=False)))
                yield [text], len(text), position()
        except csv.Error as error:
            raise DocumentError(f"{path}, line {reader.line_num}: not CSV ({error}); fix that line") from error
        except UnicodeDecodeError as error:
            raise not_utf8(path, f"after line {reader.line_num}") from error


def is_list(path: Path) -> bool:
    """Whether JSON is one list; else it has a row a line."""
    with opened(path) as (content, _):
        line = next((line for line in content if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
    return line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def list_rows(path: Path, rows: RowSettings) -> Iterator[Read]:
    """The entries of a .json file that is one list, which is read into memory whole."""
    with opened(path) as (content, position):
        data = content.read()
        try:
            records = json.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise not_utf8(path, f"byte {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise DocumentError(f"{path}: not JSON ({error}); fix it, or write a row a line") from error
        for number, record in enumerate(records, start=1):
            text = rows.text(f"{path}, entry {number}", record)
            yield [text], len(text), position()


def parquet_rows(path: Path, rows: RowSettings) -> Iterator[Read]:
    """The rows of a Parquet file, some at a time; a compressed one is read into memory,
    since its end says what it holds.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DocumentError(f"{path} needs pyarrow: pip install '.[data]' in a clone of spherelm") from error
    try:
        with opened(path) as (content, _):
            whole = BytesIO(content.read()) if path.suffix.lower() in COMPRESSIONS else path
            file = pyarrow.parquet.ParquetFile(whole)
            columns, size, row = [column.path for column in file.schema], path.stat().st_size, 0
            if not any(f"{column}.".startswith(f"{rows.field}.") for column in columns):
                raise no_column(path, rows, columns)
            for batch in file.iter_batches(batch_size=_BATCH, columns=[rows.field]):
                texts = [
                    rows.text(f"{path}, row {row + i}", record) for i, record in enumerate(batch.to_pylist(), start=1)
                ]
                row += len(batch)
                yield texts, sum(map(len, texts)), size * row // file.metadata.num_rows
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}: text between rows {row + 1} and {row + len(batch)} is not UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DocumentError(f"{path}: damaged, or not a Parquet file; get it again") from error


def not_utf8(path: Path, place: str) -> DocumentError:
    """The error of a file in another encoding."""
    start = next((data for data, _ in read_bytes(path)), b"")
    found = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    is_not = f"is {found}, not UTF-8" if found else f"is not UTF-8 ({place})"
    example = "" if found else "for example "
    return DocumentError(f"{path} {is_not}: convert it, {example}iconv -f {found or 'LATIN1'} -t UTF-8 {path.name}")
