"""`spherelm eval`: runs in, tables and JSON out, one line for what cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny

from spherelm.data.tokenizer import load_tokenizer
from spherelm.evaluate.lengths import LengthPlan, perplexity_by_length, read_documents
from spherelm.evaluate.positions import Positions, place
from spherelm.runs.loading import load_model
from spherelm.train import evaluation
from spherelm.train.trainer import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each arm trained at 16 bytes, and one at 256, which is enough for short questions."""
    place = tmp_path_factory.mktemp("eval")
    data = tiny.make_data(place)
    for arm in tiny.ARMS:
        train(tiny.run_config(arm, data), place / arm, show_progress=False)
    train(tiny.run_config("gpt", data, seq_len=256, steps=1), place / "long", show_progress=False)
    return {name: place / name for name in (*tiny.ARMS, "long")}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    documents = [tiny.text(seed, 60) for seed in (7, 8, 9)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in [*documents, "short"]))
    return path


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_perplexity_at_lengths_beyond_training(
    arm: str, runs: dict[str, Path], text: Path, tmp_path: Path, command: commands.Command
) -> None:
    out = tmp_path / "found.json"
    words = ["--perplexity", text, "--lengths", "64,16,32", "--document-tokens", 128, "--bins", 4, "--json", out]
    answer = command("eval", runs[arm], *words)
    assert answer.code == 0, answer.err
    record = tiny.read_json(out)
    assert (record["arm"], record["step"], record["run"]) == (arm, 6, str(runs[arm]))
    assert record["command"].startswith("spherelm eval ")
    found = record["perplexity"]
    plan = LengthPlan((16, 32, 64), document_tokens=128, bins=4)
    expected = perplexity_by_length(load_model(runs[arm]), read_documents([text], load_tokenizer("bytes")), plan)
    assert found["lengths"] == expected["lengths"]
    assert (found["trained_length"], found["positions"], found["files"]) == (16, "as trained", [str(text)])
    assert (found["documents"], found["documents_left_out"], found["tokens"]) == (3, 1, 3 * 128)
    assert "384 tokens of 3 documents (1 too short)" in answer.out
    for row in found["lengths"]:
        assert f"{row['perplexity']:.2f}" in answer.out
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), rel=1e-3)


def test_positions_reach_the_model(
    runs: dict[str, Path], text: Path, tmp_path: Path, command: commands.Command
) -> None:
    out = tmp_path / "found.json"
    words = ["--perplexity", text, "--lengths", "16,64", "--stride", 8, "--rope-base", 500, "--rope-scaling", "yarn:4"]
    answer = command("eval", runs["ngpt"], *words, "--json", out)
    assert answer.code == 0, answer.err
    model = load_model(runs["ngpt"])
    place(model, Positions(500, "yarn", 4), trained_length=16)
    plan = LengthPlan((16, 64), stride=8)
    expected = perplexity_by_length(model, read_documents([text], load_tokenizer("bytes")), plan)
    assert tiny.read_json(out)["perplexity"]["lengths"] == expected["lengths"]
    assert "windows sliding by 8; positions base 500, yarn:4" in answer.out


def test_tasks_are_scored(runs: dict[str, Path], tmp_path: Path, command: commands.Command, shared: Path) -> None:
    out = tmp_path / "found.json"
    words = ["--tasks", "winogrande, lambada_openai", "--task-data", shared / "data/evals", "--limit", 6, "--json", out]
    answer = command("eval", runs["long"], *words)
    assert (answer.code, answer.err) == (0, ""), "no bars of the harness where there is no terminal"
    record = tiny.read_json(out)
    assert {name: task["documents"] for name, task in record["tasks"].items()} == {"winogrande": 6, "lambada_openai": 6}
    accuracy = record["tasks"]["winogrande"]["metrics"]["acc"]
    assert accuracy["value"] * 6 == pytest.approx(round(accuracy["value"] * 6))
    row = next(line for line in answer.out.splitlines() if line.startswith("winogrande"))
    assert row.split() == ["winogrande", "acc", f"{accuracy['value']:.4f}", f"{accuracy['stderr']:.4f}", "0.500", "6"]
    assert "average" not in answer.out


def test_the_papers_five_are_the_default(
    runs: dict[str, Path], command: commands.Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tasks_of_run(run: Path, names: Any, settings: Any) -> dict[str, Any]:
        assert list(names) == ["arc_easy", "hellaswag", "winogrande", "wsc273", "lambada_openai"]
        scores = {"acc": {"value": 0.25, "stderr": None}, "perplexity": {"value": 31415926.5, "stderr": 0.5}}
        tasks = {names[0]: {"metrics": scores, "chance": 0.25, "documents": 1234}}
        return {"tasks": tasks, "average": {"acc": {"value": 0.5, "stderr": 0.01}}}

    monkeypatch.setattr(evaluation, "tasks_of_run", tasks_of_run)
    answer = command("eval", runs["gpt"])
    assert [line.split() for line in answer.out.splitlines()[1:]] == [
        ["arc_easy", "acc", "0.2500", "-", "0.250", "1,234"],
        ["arc_easy", "perplexity", "3.14e+07", "0.5000", "-", "1,234"],
        ["average", "of", "the", "five", "acc", "0.5000", "0.0100"],
    ]


def test_what_cannot_be_is_one_line(
    runs: dict[str, Path], text: Path, tmp_path: Path, command: commands.Command
) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    run = runs["ngpt"]
    cases = [
        ([run, "--perplexity", text, "--json", taken], "taken.json already exists: choose another --json"),
        ([run, "--json", tmp_path / "no" / "a.json"], "no for --json: make it, or choose another"),
        ([run, "--lengths", "16"], "--lengths acts only with --perplexity: give both"),
        ([run, "--perplexity", text, "--lengths", "a,b"], "--lengths: 'a' is not a valid whole number"),
        ([run, "--perplexity", text, "--lengths", "24,64"], "lengths 24 does not divide 64"),
        ([run, "--perplexity", text, "--lengths", "4096"], "no document has the 4097 tokens"),
        ([run, "--perplexity", text, "--rope-scaling", "yarn"], "'yarn' is not a way to scale positions"),
        ([run, "--perplexity", tmp_path / "none.txt"], "no input file"),
        ([tmp_path, "--perplexity", text], "holds no run"),
        ([tmp_path, "--task-data", tmp_path], "holds no run"),
        ([run, "--task-data", tmp_path], "docs/evaluation.md says what --task-data must hold"),
        ([run, "--tasks", "winogrande", "--limit", 0], "limit must be more than 0, got 0"),
        ([run, "--tasks", ","], "--tasks is empty"),
    ]
    for words, message in cases:
        answer = command("eval", *words)
        assert answer.code == 2, words
        assert message in answer.err
        assert len(answer.shown) == 1, answer.err
        assert answer.out == ""
    assert taken.read_text() == "mine"


def test_a_sentencepiece_run_has_perplexity_only(tmp_path: Path, shared: Path) -> None:
    load_tokenizer(shared / "data/tokenizers/llama2/tokenizer.model").save(tmp_path)
    with pytest.raises(ValueError, match="is a SentencePiece model: for this run only --perplexity works"):
        evaluation.transformers_tokenizer(tmp_path)


@pytest.mark.row("Downstream tasks")
def test_tasks_are_scored_in_training(tmp_path: Path, command: commands.Command, shared: Path) -> None:
    """Into metrics.jsonl, the losses as without; a resumed run may ask for others;
    a name that is wrong stops it at once.
    """
    data, evals = tiny.make_data(tmp_path), shared / "data/evals"
    sizes = ["--steps", 4, "--seq-len", 256, "--batch-size", 1, "--dtype", "float32", "--no-compile", "--eval-every", 2]
    words = ["train", "--arm", "ngpt", "--data", data, *sizes]
    tasks = ["--eval-tasks", "winogrande", "--eval-tasks-every", 3, "--task-data", evals, "--eval-limit", 5]
    answer = command(*words, "--out", tmp_path / "scored", *tasks)
    assert answer.code == 0, answer.err
    assert command(*words, "--out", tmp_path / "plain").code == 0
    records = tiny.metrics(tmp_path / "scored")
    scores = [record for record in records if record["kind"] == "eval"]
    assert [record for record in records if record["kind"] != "eval"] == tiny.metrics(tmp_path / "plain")
    assert [(record["step"], record["tokens"]) for record in scores] == [(3, 768), (4, 1024)]
    found = evaluation.tasks_of_run(tmp_path / "scored", ["winogrande"], evaluation.TaskSettings(evals, limit=5))
    metrics = found["tasks"]["winogrande"]["metrics"]["acc"]
    assert scores[-1]["tasks"] == {"winogrande": {"acc": metrics["value"], "acc_stderr": metrics["stderr"]}}
    answer = command(*words, "--out", tmp_path / "plain", *tasks, "--resume")
    assert answer.code == 0, answer.err
    for wrong, message in (
        (["--eval-tasks", "mmlu", "--task-data", evals], "no local copy of mmlu can be read"),
        (["--eval-tasks", "wsc273", "--task-data", tmp_path], "docs/evaluation.md says what --task-data must hold"),
        (["--eval-tasks-every", 2], "--eval-tasks-every acts only with --eval-tasks: give both"),
    ):
        answer = command(*words, "--out", tmp_path / "new", *wrong)
        assert (answer.code, answer.out) == (2, "")
        assert message in answer.err
        assert not (tmp_path / "new").exists()
