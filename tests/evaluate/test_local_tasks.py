"""Local copies of evaluation sets: read as the hub's records, and refused where they are corrupt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from spherelm.evaluate.local_tasks import LOCAL_TASKS, local_records

SIZES = {
    "arc_easy": {"validation": 570, "test": 2376},
    "arc_challenge": {"validation": 299, "test": 1172},
    "hellaswag": {"validation": 10042},
    "winogrande": {"validation": 1267},
    "wsc273": {"test": 273},
    "lambada_openai": {"test": 5153},
}


@pytest.mark.parametrize("name", sorted(LOCAL_TASKS))
def test_the_sets_are_whole(name: str, shared: Path) -> None:
    records = local_records(name, shared / "data/evals")
    assert {split: len(rows) for split, rows in records.items()} == SIZES[name]


def arc_files(directory: Path, records: list[dict[str, Any]]) -> Path:
    path = directory / "arc_easy/ARC-Easy.test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


PROMPT = {"id": "x", "query": "Question: What is wet?\nAnswer:", "choices": ["fire", "rain", "sand"], "gold": 1}
PLAIN = {
    "id": "x",
    "question": "What is wet?",
    "choices": {"text": ["fire", "rain", "sand"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}


def test_both_forms_of_arc_are_the_hubs(tmp_path: Path) -> None:
    arc_files(tmp_path, [PROMPT, PLAIN])
    assert local_records("arc_easy", tmp_path) == {"test": [PLAIN, PLAIN]}


def with_choices(texts: list[str], key: str) -> dict[str, Any]:
    return {**PLAIN, "choices": {"text": texts, "label": list("ABCD")[: len(texts)]}, "answerKey": key}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (with_choices(["fire", "fire", "rain"], "B"), "question 2 has a choice twice"),
        (with_choices(["fire", "rain", "sand"], "D"), "question 2: its answer D is not a choice"),
        ({**PROMPT, "gold": 3}, "question 2: its answer choice 3 is not a choice"),
        ({**PROMPT, "gold": -1}, "question 2: its answer choice -1 is not a choice"),
    ],
)
def test_a_corrupt_question_is_found(record: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = arc_files(tmp_path, [PLAIN, record])
    with pytest.raises(ValueError, match="corrupt copy of ARC: get the set of allenai/ai2_arc") as error:
        local_records("arc_easy", tmp_path)
    assert f"{path}, {reason}" in str(error.value)


@pytest.mark.parametrize("moved", [1, 71])
def test_moved_keys_are_found_in_a_whole_set(moved: int, tmp_path: Path, shared: Path) -> None:
    """As in the copy that circulates, but with choices that are all different; even one question is enough."""
    lines = (shared / "data/evals/arc_easy/ARC-Easy.test.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    arc_files(tmp_path, list(reversed(records)))
    assert len(local_records("arc_easy", tmp_path)["test"]) == 2376, "the order is free"
    for record in [r for r in records if r["gold"] < len(r["choices"]) - 1][:moved]:
        record["gold"] += 1
    (tmp_path / "bad").mkdir()
    arc_files(tmp_path / "bad", records)
    with pytest.raises(ValueError, match="not all of its 2376 answers are AI2's: this is a corrupt copy"):
        local_records("arc_easy", tmp_path / "bad")


def test_winograd_schemas_are_cut_at_their_pronoun(tmp_path: Path) -> None:
    path = tmp_path / "wsc273/WSCollection.xml"
    path.parent.mkdir()
    schema = """<schema><text><txt1> The  dog
        saw a cat. </txt1><pron> It </pron><txt2> ran. </txt2></text>
        <answers><answer>The dog </answer><answer> a cat</answer></answers><correctAnswer> B. </correctAnswer></schema>"""
    path.write_text(f"<collection>{schema * 280}</collection>", encoding="utf-8")
    records = local_records("wsc273", tmp_path)["test"]
    assert len(records) == 273
    expected = {"text": "The dog saw a cat. It ran.", "pronoun": "It", "pronoun_loc": 19, "label": 1}
    assert records[0] == {**expected, "options": ["The dog", "a cat"]}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "lambada_openai/llm-foundry.lambada_openai.jsonl", '{"text": "a b"}\n{oops\n')
    with pytest.raises(ValueError, match=r"lambada_openai\.jsonl, line 2 is not JSON"):
        local_records("lambada_openai", tmp_path)
    write(tmp_path / "lambada_openai/llm-foundry.lambada_openai.jsonl", '{"words": "a b"}\n')
    with pytest.raises(ValueError, match="is damaged or has other fields \\(KeyError: 'context'\\)"):
        local_records("lambada_openai", tmp_path)
    write(tmp_path / "winogrande/winogrande_xl.validation.jsonl", "")
    with pytest.raises(ValueError, match="holds no record"):
        local_records("winogrande", tmp_path)
    write(tmp_path / "wsc273/WSCollection.xml", "<collection>")
    with pytest.raises(ValueError, match="is damaged or has other fields \\(ParseError"):
        local_records("wsc273", tmp_path)
    packed = tmp_path / "hellaswag/hellaswag_val.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(b'{"label": 1}\n' * 500)[:-9])
    with pytest.raises(ValueError, match="is damaged or has other fields \\(EOFError"):
        local_records("hellaswag", tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no file .*winogrande_xl\.validation\.jsonl: docs/evaluation\.md says"
    ):
        local_records("winogrande", tmp_path)
    with pytest.raises(ValueError, match="no local copy of mmlu can be read: choose among arc_easy"):
        local_records("mmlu", tmp_path)
