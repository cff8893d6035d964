"""Build the text and the tokenizer that ship inside spherelm.

    python research/build_corpus.py --books ../shared/data/books --out src/spherelm/data/shipped

Reads a folder of ``*.jsonl.xz`` shards of public-domain books, keeps the books listed in `BOOKS`, cleans them and
writes four files: ``train.jsonl.xz``, ``val.jsonl.xz``, ``bpe4096.json`` and ``PROVENANCE.md``. The choice is an
explicit list, there is no randomness, and a second run with the same library versions gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "val")
MAX_BOOK_BYTES = 1_000_000
MAX_TOTAL_BYTES = 7_500_000
OPENING_LENGTH = 150  # characters: a shorter first paragraph is taken for title page, dedication or contents
ENDING_SHARE = 0.85  # "THE END" or "FOOTNOTES" closes a book only in its last part


@dataclass(frozen=True)
class Book:
    """One chosen book: its e-book number, its author (" and " between two), and where its body starts or ends.

    `start` and `end` are exact strings of the cleaned text. Empty means: start at the first long paragraph, end at a
    closing "THE END" or "FOOTNOTES", or at the end of the file. `end` itself is left out, `start` is kept.
    """

    id: int
    author: str
    start: str = ""
    end: str = ""


class Record(TypedDict):
    """One line of the shipped files; `year` is the source's (often the year of the scanned edition)."""

    id: int
    title: str
    author: str
    year: int
    text: str


class SourceRecord(TypedDict):
    """One line of the source shards."""

    id: int
    title: str
    year: int
    source: str
    text: str


# Prose of 1850 to 1918, each between 0.1 and 0.8 MB. Pseudonyms are resolved, so that one person has one name.
# The authors of the validation books have no book in train.
BOOKS: dict[str, tuple[Book, ...]] = {
    "train": (
        Book(45, "Lucy Maud Montgomery"),
        Book(55, "L. Frank Baum"),
        Book(64, "Edgar Rice Burroughs"),
        Book(204, "G. K. Chesterton"),
        Book(210, "Henry James"),
        Book(356, "Arthur Conan Doyle"),
        Book(423, "Arthur Conan Doyle"),
        Book(520, "L. Frank Baum"),
        Book(836, "E. Nesbit"),
        Book(1059, "H. G. Wells"),
        Book(1688, "Jack London"),
        Book(1696, "G. K. Chesterton"),
        Book(1883, "Anton Chekhov"),
        Book(2005, "P. G. Wodehouse"),
        Book(2662, "Thomas Hardy"),
        Book(2814, "James Joyce"),
        Book(3795, "Louisa May Alcott", start="The elm-tree avenue was all overgrown"),
        Book(3809, "Jules Verne"),
        Book(4075, "P. G. Wodehouse"),
        Book(4378, "E. Nesbit"),
        Book(5642, "Anthony Trollope"),
        Book(7890, "Wilkie Collins and Walter Besant"),
        Book(8582, "Mark Twain", start="My brother had just been appointed"),
        Book(8727, "Arthur Conan Doyle"),
        Book(10023, "Charles S. Brooks"),
        Book(10025, "Fannie Hurst"),
        Book(10029, "William Magnay"),
        Book(10049, "Margaret Oliphant"),
        Book(10093, "George MacDonald"),
        Book(10150, "Bram Stoker"),
        Book(10342, "Henry Seton Merriman"),
        Book(10371, "E. Phillips Oppenheim"),
        Book(10377, "J. Sheridan Le Fanu"),
        Book(10398, "Elizabeth McCracken"),
        Book(10452, "Mrs. Henry De La Pasture"),
        Book(10540, "Kate Douglas Wiggin"),
        Book(10556, "Baroness Orczy", start="The man in the corner pushed aside", end="FINIS"),
        Book(10592, "Ray Stannard Baker"),
        Book(10806, "Lord Dunsany"),
        Book(10922, "Richard Le Gallienne"),
        Book(10943, "Jacques Futrelle"),
        Book(11011, "Mildred Aldrich"),
        Book(11052, "Edith Wharton"),
        Book(11325, "Alice Duer Miller", start="Little Miss Severance sat"),
        Book(11328, "James Oliver Curwood", start="It was all new--most of it"),
        Book(11360, "Arnold Bennett", start="For years I had been preoccupied"),
        Book(26654, "J. M. Barrie"),
        Book(30723, "Ivan Turgenev"),
        Book(32572, "Hans Christian Andersen", start="THE flax was in full bloom", end="NOTES\n\nTHE STORKS"),
        Book(33876, "Algernon Blackwood"),
        Book(34990, "Henry David Thoreau", end="THE END\n\nThe Riverside Press"),
        Book(35377, "Nathaniel Hawthorne"),
        Book(35997, "Rudyard Kipling"),
        Book(37332, "Frances Hodgson Burnett", end="Scribner Illustrated Classics for Younger Readers"),
        Book(40897, "Henry A. Hering", start="\"'HE'S one of us,'", end="PRINTED BY CASSELL"),
        Book(41667, "L. Frank Baum"),
        Book(47166, "L. Frank Baum"),
    ),
    "val": (
        Book(1024, "Robert Louis Stevenson and Lloyd Osbourne"),
        Book(11008, "Arthur Ruhl"),
    ),
}

# Names under which the source files the author of a book where that is not the name in `BOOKS`.
PEN_NAMES = {"Ray Stannard Baker": "David Grayson"}

# One way of writing quotes, dashes and spaces: the source mixes two, and a small model should not have to learn both.
PUNCTUATION = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "…": "...", "\u00a0": " ", "\ufeff": None, "|": None}
)
PICTURE = re.compile(r"\[(?:Illustration|Picture)\b[^\]\n]*\]", re.IGNORECASE)
ITALICS = re.compile(r"_((?:[^_\n]|\n(?!\n))+)_")
CLOSING = re.compile(r"\n\n(?:THE END\.?|FINIS\.?|FOOTNOTES:?)$", re.IGNORECASE | re.MULTILINE)


class CorpusError(ValueError):
    """The input or a result is not what this script expects; the message is one line for the user."""


def read_source(folder: Path) -> Iterator[SourceRecord]:
    """Yield every record of every ``*.jsonl.xz`` in `folder`, in the order of the file names."""
    shards = sorted(folder.glob("*.jsonl.xz"))
    if not shards:
        raise CorpusError(f"no *.jsonl.xz files in {folder}: give the folder of the books with --books")
    for shard in shards:
        try:
            with lzma.open(shard, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    yield parse(line, f"{shard}, line {number}")
        except CorpusError:
            raise
        except (lzma.LZMAError, EOFError, ValueError) as error:
            raise CorpusError(f"{shard} is not a whole xz file of JSON lines: {error}") from error


def parse(line: str, place: str) -> SourceRecord:
    """One line of a shard; raises CorpusError naming `place` when it is not a record with the source's fields."""
    record = json.loads(line)
    missing = SourceRecord.__annotations__.keys() - record.keys() if isinstance(record, dict) else {"{}"}
    if missing:
        raise CorpusError(f"{place} lacks {', '.join(sorted(missing))}: give records of id, title, year, source, text")
    return cast(SourceRecord, record)


def clean(text: str) -> str:
    """Unify the punctuation, drop picture captions and italics marks, and keep at most one empty line in a row."""
    text = PICTURE.sub("", text.translate(PUNCTUATION))
    text = ITALICS.sub(r"\1", text)
    lines = (line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def body(text: str, book: Book) -> str:
    """Cut title page, contents, advertisements and notes off a cleaned text.

    Raises CorpusError where a marker of `book` is missing.
    """
    for marker in (book.start, book.end):
        if marker not in text:
            raise CorpusError(f"book {book.id}: {marker!r} is not in its text: the source has changed")
    begin = text.index(book.start) if book.start else first_paragraph(text)
    if book.end:
        return text[begin : text.rindex(book.end)].rstrip()
    closing = CLOSING.search(text, int(ENDING_SHARE * len(text)))
    return text[begin : closing.start() if closing else len(text)].rstrip()


def first_paragraph(text: str) -> int:
    """The position of the first line of at least `OPENING_LENGTH` characters (paragraphs are one line each)."""
    match = re.search(rf"^.{{{OPENING_LENGTH},}}$", text, re.MULTILINE)
    return match.start() if match else 0


def check_author(book: Book, record: SourceRecord) -> None:
    """Raise CorpusError unless each author's surname stands in the title, the source's file name or the text's head."""
    evidence = clean(f"{record['title']} {record['source']} {record['text'][:3000]}").lower()
    for author in book.author.split(" and "):
        name = PEN_NAMES.get(author, author)
        if name.split()[-1].lower() not in evidence:
            raise CorpusError(f"book {book.id}: no trace of {name} in {record['title']!r}")


def make_record(book: Book, source: SourceRecord) -> Record:
    """The shipped form of one source record."""
    check_author(book, source)
    text = body(clean(source["text"]), book)
    size = len(text.encode())
    if not 0 < size <= MAX_BOOK_BYTES:
        raise CorpusError(f"book {book.id} has {size} bytes: choose books of 1 to {MAX_BOOK_BYTES}")
    title = clean(source["title"]).rsplit(" by ", 1)[0]
    return {"id": book.id, "title": title, "author": book.author, "year": int(source["year"]), "text": text}


def select(folder: Path) -> tuple[dict[str, list[Record]], dict[int, str]]:
    """Choose and clean the books: the records of each split by rising id, and the source string of each id.

    Raises CorpusError when a book is missing from `folder` or an author stands in both splits.
    """
    check_splits()
    wanted = {book.id: book for split in SPLITS for book in BOOKS[split]}
    found = {record["id"]: record for record in read_source(folder) if record["id"] in wanted}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise CorpusError(f"{folder} lacks {len(missing)} of the chosen books, the first is id {missing[0]}")
    records = {
        split: [make_record(book, found[book.id]) for book in sorted(BOOKS[split], key=lambda book: book.id)]
        for split in SPLITS
    }
    return records, {number: record["source"] for number, record in found.items()}


def check_splits() -> None:
    """Raise CorpusError when a book is listed twice or one person wrote for both splits."""
    numbers = [book.id for split in SPLITS for book in BOOKS[split]]
    if len(set(numbers)) != len(numbers):
        raise CorpusError("a book is listed twice in BOOKS: give each id once")
    train, val = ({name for book in BOOKS[split] for name in book.author.split(" and ")} for split in SPLITS)
    if train & val:
        raise CorpusError(f"in both splits: {', '.join(sorted(train & val))}; move all books of an author to one side")


def to_jsonl(records: Iterable[Record]) -> bytes:
    """Records as UTF-8 JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` entries: lossless on any text, end of text is id 0.

    Splitting is that of GPT-2 (letters, digits, other signs and white space apart; one space leads a word).
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread: the same counts in the same order each time
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise CorpusError(f"the tokenizer has {tokenizer.get_vocab_size()} entries instead of {VOCAB_SIZE}: add text")
    return tokenizer


def book_table(split: str, records: list[Record], sources: dict[int, str]) -> str:
    """The Markdown rows of one split."""
    rows = (
        (r["id"], r["title"], r["author"], r["year"], split, len(r["text"].encode()), f"`{sources[r['id']]}`")
        for r in records
    )
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows)


def provenance(records: dict[str, list[Record]], sources: dict[int, str], files: dict[str, bytes]) -> str:
    """The text of PROVENANCE.md: what was chosen and how, the licence, every book and every hash."""
    sizes = {split: sum(len(r["text"].encode()) for r in records[split]) for split in SPLITS}
    hashes = "\n".join(
        f"| `{name}` | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |" for name, data in files.items()
    )
    tables = "\n".join(book_table(split, records[split], sources) for split in SPLITS)
    splits = "\n".join(
        f"- {split}: {len(records[split])} books, {sizes[split]} bytes of UTF-8 text "
        f"({100 * sizes[split] / sum(sizes.values()):.1f} %)"
        for split in SPLITS
    )
    return PROVENANCE.format(splits=splits, hashes=hashes, tables=tables)


PROVENANCE = """# The text and the tokenizer in this directory

Public-domain English prose, most of it of 1851 to 1918, and a 4096-entry byte-level BPE trained on its train
split only. This page is written by `research/build_corpus.py`; rebuild everything with

    python research/build_corpus.py --books ../shared/data/books --out src/spherelm/data/shipped

## Licence
Every book is in the public domain in the United States: all were in print before 1919. Elsewhere the author's year of
death decides. The texts were transcribed by the volunteers of an e-book project whose name is a registered trademark;
its headers, licence text and name are removed from the texts, and the name is not used as a trademark here. "Source"
in the table is the repository and file that a text was taken from. The selection, this page and the tokenizer are
under the licence of spherelm (Apache-2.0).

## Selection
The source is a set of books from the list of the PG19 data set (all before 1919), taken from the repositories
`rcdm-uga/Gutenberg_Text` and `tmgondal/Project-Gutenberg`. Chosen by hand, as an explicit list of e-book numbers in
the script: novels, short stories, children's books, essays, travel and reportage, each below 1 MB; no plays, verse,
dictionaries or tables, little non-ASCII text, no books that lean on racial slurs. They are books of their time, and
their views are not ours.

The split is by author: nobody who wrote a validation book wrote a train book. Authors were read from the title, the
title page and the source's file name, and checked by eye; pen names are resolved where the source uses one (David
Grayson is Ray Stannard Baker); translators are not counted. Years are the source's, often of a later edition.

{splits}

## Cleaning
The source had already removed headers and transcribers' notes and put each paragraph of prose on one line. Here:

- curly quotes, dashes, ellipses and no-break spaces become `'`, `"`, `--`, `-`, `...` and a space;
- picture captions, the underscores of italics and stray vertical bars go;
- title page, contents and dedication go: all before the first paragraph of 150 characters;
- what follows a closing "THE END" or "FOOTNOTES" goes, advertisements too;
- a few books have exact marks of their own for start and end, in the script;
- there is never more than one empty line in a row.

## Files
`*.jsonl.xz`: one object a line with `id`, `title`, `author`, `year`, `text`. `bpe4096.json`: read it with
`tokenizers.Tokenizer.from_file`; id 0 is `<|endoftext|>`. The last two rows are the unpacked contents, which do not
depend on the version of the compressor.

| file | bytes | sha256 |
|---|---|---|
{hashes}

## Books
| id | title | author | year | split | bytes | source |
|---|---|---|---|---|---|---|
{tables}
"""


def build(folder: Path, out: Path) -> dict[str, int]:
    """Write the four files into `out` and return their sizes in bytes by name."""
    records, sources = select(folder)
    raw = {split: to_jsonl(records[split]) for split in SPLITS}
    packed = {f"{split}.jsonl.xz": lzma.compress(raw[split], preset=9 | lzma.PRESET_EXTREME) for split in SPLITS}
    total = sum(map(len, packed.values()))
    if total > MAX_TOTAL_BYTES:
        raise CorpusError(f"the compressed text has {total} bytes, more than {MAX_TOTAL_BYTES}: choose fewer books")
    tokenizer = train_tokenizer(record["text"] for record in records["train"])
    files = {**packed, "bpe4096.json": (tokenizer.to_str(pretty=False) + "\n").encode()}
    unpacked = {f"{split}.jsonl": raw[split] for split in SPLITS}
    page = provenance(records, sources, {**files, **unpacked})
    out.mkdir(parents=True, exist_ok=True)
    for name, data in {**files, "PROVENANCE.md": page.encode()}.items():
        (out / name).write_bytes(data)
    return {name: len(data) for name, data in {**files, **unpacked}.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 with one line on stderr when something is wrong."""
    parser = argparse.ArgumentParser(description="Build the text and the tokenizer that ship inside spherelm.")
    parser.add_argument("--books", type=Path, default=Path("../shared/data/books"), help="folder of *.jsonl.xz books")
    parser.add_argument("--out", type=Path, default=Path("src/spherelm/data/shipped"), help="folder to write into")
    options = parser.parse_args(arguments)
    try:
        for name, size in build(options.books, options.out).items():
            print(f"{name:16} {size / 1e6:8.3f} MB")
    except (CorpusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
