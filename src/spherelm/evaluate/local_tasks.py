"""Local copies of the evaluation sets, as the records that the harness's own task definitions expect of
the hub's data sets.

One row of `LOCAL_TASKS` says where a task's copy lies below the directory given, and how it is read. Prompts,
continuations and scores are the harness's business (`harness.py`); what is made here is only the fields that its
definitions name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from spherelm.errors import NotFoundError, UserError, nearest

Record = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """A task with a local copy: the harness's definition (below its `tasks`), files by split, how a file is read.

    answers: sha256 (hex) by number of records of what is known to be right (see `check_answers`).
    """

    definition: str
    files: dict[str, str]
    read: Callable[[Path], Iterator[Record]]
    answers: tuple[tuple[int, str], ...] = ()


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a .jsonl or .jsonl.gz file. Raises `ValueError` naming the line that is none."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: get the file again") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number} is not a JSON object: get the file again")
            yield record


def plain(path: Path) -> Iterator[Record]:
    """Records that have the hub's fields already."""
    yield from json_lines(path)


def read_arc(path: Path) -> Iterator[Record]:
    """ARC as the hub has it (question, choices, answerKey), or as ready-made prompts (query, choices, gold)."""
    for record in json_lines(path):
        yield from_prompt(record) if "query" in record else record


def from_prompt(record: Record) -> Record:
    """An ARC record whose question stands in a prompt and whose answer is an index."""
    texts, gold = list(record["choices"]), record["gold"]
    labels = [chr(ord("A") + i) for i in range(len(texts))]
    question = record["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    key = labels[gold] if 0 <= gold < len(labels) else f"choice {gold}"
    return {"id": record["id"], "question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}


def read_hellaswag(path: Path) -> Iterator[Record]:
    """HellaSwag, whose label is a string on the hub."""
    for record in json_lines(path):
        yield {**record, "label": str(record["label"])}


def read_lambada(path: Path) -> Iterator[Record]:
    """LAMBADA as the hub has it (text), or cut before the last word (context, continuation)."""
    for record in json_lines(path):
        yield {"text": record.get("text") or f"{record['context']} {record['continuation']}"}


def read_wsc(path: Path) -> Iterator[Record]:
    """The first 273 schemas of the Winograd Schema Challenge's XML collection,
    with the fields of the hub's data set.
    """

    def clean(text: str | None) -> str:
        return " ".join((text or "").split())

    for schema in ElementTree.parse(path).getroot().findall("schema")[:273]:
        before, pronoun, after = (clean(schema.findtext(f"text/{name}")) for name in ("txt1", "pron", "txt2"))
        yield {
            "text": " ".join((before, pronoun, after)).strip(),
            "pronoun": pronoun,
            "pronoun_loc": len(before) + 1 if before else 0,
            "options": [clean(answer.text) for answer in schema.findall("answers/answer")],
            "label": int("B" in clean(schema.findtext("correctAnswer"))),
        }


def arc(name: str, *answers: tuple[int, str]) -> LocalTask:
    """ARC's easy or challenge set."""
    folder = name.lower().replace("-", "_")
    files = {split: f"{folder}/{name}.{split}.jsonl" for split in ("validation", "test")}
    return LocalTask(f"arc/{folder}.yaml", files, read_arc, answers)


LOCAL_TASKS = {
    "arc_easy": arc(
        "ARC-Easy",
        (2376, "8f07085e9c9996a92647c4bef5b49efbc3324d50bb7af43fc0da17660c3d1cf4"),
        (570, "cd19b6fcb93f381aeefaa0c4d5fe994b9348394db20b75e19725db24217df611"),
    ),
    "arc_challenge": arc(
        "ARC-Challenge",
        (1172, "1401eaf6d0c3fa8888066ae8425c58113cb58c2a235170f498b19c2dd80ec035"),
        (299, "162e253ec8e01120447343becf8c396b773424af2228eb7002b29ab7e1a84087"),
    ),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml", {"validation": "hellaswag/hellaswag_val.jsonl.gz"}, read_hellaswag
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml", {"validation": "winogrande/winogrande_xl.validation.jsonl"}, plain
    ),
    "wsc273": LocalTask("wsc273/default.yaml", {"test": "wsc273/WSCollection.xml"}, read_wsc),
    "lambada_openai": LocalTask(
        "lambada/lambada_openai.yaml",
        {"test": "lambada_openai/llm-foundry.lambada_openai.jsonl"},
        read_lambada,
    ),
}
"""By the harness's name of the task."""


def answers_digest(records: list[Record]) -> str:
    """sha256 (hex) of ARC's questions with the texts of their right answers, in any order,
    however spaces are written.
    """
    pairs = []
    for record in records:
        choices = record["choices"]
        answer = choices["text"][choices["label"].index(record["answerKey"])]
        pairs.append("\t".join(" ".join(text.split()) for text in (record["question"], answer)))
    return hashlib.sha256("\n".join(sorted(pairs)).encode()).hexdigest()


def check_answers(records: list[Record], task: LocalTask, path: Path) -> None:
    """Raise `ValueError` for a corrupt copy of ARC.

    Copies circulate in which questions with numeric keys have their key moved by one and their first choice twice (71
    of 2376 in one of ARC-Easy, 20 of 1172 of ARC-Challenge). No question of the true sets has a choice twice or a key
    without a choice, and a complete set has known right answers.
    """
    advice = "this is a corrupt copy of ARC: get the set of allenai/ai2_arc"
    for number, record in enumerate(records, 1):
        texts, labels = record["choices"]["text"], record["choices"]["label"]
        if len(set(texts)) < len(texts):
            raise UserError(f"{path}, question {number} has a choice twice: {advice}")
        if record["answerKey"] not in labels or len(labels) != len(texts):
            raise UserError(f"{path}, question {number}: its answer {record['answerKey']} is not a choice: {advice}")
    known = dict(task.answers).get(len(records))
    if known is not None and answers_digest(records) != known:
        raise UserError(f"{path}: not all of its {len(records)} answers are AI2's: {advice}")


def local_records(name: str, directory: Path) -> dict[str, list[Record]]:
    """The records of each split of a task's local copy in `directory`; a split whose file is missing is left out.

    Raises `FileNotFoundError` if no split to be scored is there, `ValueError` for a task that has no local form, a file
    that is damaged, and a corrupt ARC.
    """
    if name not in LOCAL_TASKS:
        known = ", ".join(LOCAL_TASKS)
        raise UserError(
            f"no local copy of {name}{nearest(name, LOCAL_TASKS)} can be read: choose among {known}, or leave --task-data out"
        )
    task, found = LOCAL_TASKS[name], {}
    scored = directory / list(task.files.values())[-1]
    if not scored.is_file():
        raise NotFoundError(f"no file {scored}: docs/evaluation.md says what --task-data must hold")
    for split, file in task.files.items():
        path = directory / file
        if path.is_file():
            found[split] = read_split(task, path)
    return found


def read_split(task: LocalTask, path: Path) -> list[Record]:
    """All records of one file, checked."""
    try:
        records = list(task.read(path))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, EOFError, ElementTree.ParseError) as error:
        raise UserError(f"{path} is damaged or has other fields ({type(error).__name__}: {error})") from error
    if not records:
        raise UserError(f"{path} holds no record: get the file again")
    if task.read is read_arc:
        check_answers(records, task, path)
    return records
