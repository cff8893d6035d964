"""Runs that are resumed, that start from the weights of another, and that read a text file as their data."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import commands
import pytest
import tiny

from spherelm.errors import UserError
from spherelm.recipes import make_run
from spherelm.runs.config import read_config
from spherelm.runs.loading import load_model

SMALL = ["--seq-len", 16, "--batch-size", 2, "--dtype", "float32", "--no-compile", "--quiet", "--eval-every", 0]
SHAPE = ["--d-model", 16, "--n-layers", 1, "--n-heads", 2, "--d-ff", 24]


def words(out: Path, data: Path, *more: object) -> list[object]:
    return ["train", "--arm", "ngpt", "--out", out, "--data", data, *SMALL, *SHAPE, *more]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in tiny.metrics(run) if line["kind"] == "train"]


@pytest.mark.parametrize("fields", [["schedule=constant"], ["schedule=wsd", "decay_fraction=0.5"]], ids=lambda f: f[0])
def test_a_run_that_is_made_longer_is_the_longer_run(
    fields: list[str], command: commands.Command, data: Path, tmp_path: Path
) -> None:
    """Where the schedule allows it. Its rates were chosen for the shorter run, so the longer one is given the same."""
    made, whole = tmp_path / "made", tmp_path / "whole"
    assert command(*words(made, data, "--steps", 4, "--save-every", 2, "--set", *fields)).code in (0, 1)
    if fields[0] == "schedule=wsd":
        refused = command("train", "--resume", made, "--steps", 8)
        assert (refused.code, "extended before its decay" in refused.err) == (2, True)
        shutil.rmtree(made / "checkpoints" / "step-00000004")  # as if it had been stopped before its decay
    answer = command("train", "--resume", made, "--steps", 8)
    assert answer.code in (0, 1)
    assert "now has 8 updates instead of 4" in answer.err
    assert read_config(made / "config.json").train.steps == 8
    assert command("train", "--config", made / "config.json", "--out", whole).code in (0, 1)
    assert losses(made) == losses(whole)


def test_a_resumed_run_needs_its_directory_alone(command: commands.Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = command(*words(run, data, "--steps", 2))
    assert first.code in (0, 1)
    for asked in (["--resume", run], ["--out", run, "--resume"], ["--resume", run, "--save-every", 1, "--seed", 0]):
        again = command("train", *asked)
        assert (again.code, again.out) == (first.code, first.out)
    for asked, said in (
        (["--resume", run, "--preset", "1m"], "--preset has no effect with --resume"),
        (["--resume", run, "--seed", 1], "train.seed is 0 there and 1 now"),
        (["--resume", run, "--steps", 3], "with schedule=linear"),
        (["--resume", tmp_path], f"holds 1 run but is not a run: give {run}"),
        (["--resume", run, "--out", tmp_path], "leave out --out"),
        (["--resume"], "no directory is given"),
    ):
        answer = command("train", *asked)
        assert (answer.code, len(answer.shown)) == (2, 1)
        assert said in answer.err
    assert read_config(run / "config.json").train.steps == 2


def test_a_new_run_begins_with_the_weights_of_another(command: commands.Command, data: Path, tmp_path: Path) -> None:
    source, new, text = tmp_path / "source", tmp_path / "new", data.parent / "train.txt"
    assert command(*words(source, data, "--steps", 3)).code in (0, 1)
    answer = command("train", "--init-from", source, "--out", new, "--data", text, "--steps", 2, *SMALL, "--lr", 0.01)
    assert answer.code in (0, 1), answer.err
    config = read_config(new / "config.json")
    assert (config.model, config.arm) == (read_config(source / "config.json").model, "ngpt")
    assert config.optim.lr == 0.01
    start = next(line["loss"] for line in tiny.metrics(new) if line["kind"] == "val")
    assert start < 0.98 * next(line["loss"] for line in tiny.metrics(source) if line["kind"] == "val")
    assert "with the tokenizer of" in answer.err
    for asked, said in (
        (["--d-model", 32], "d_model=32 differs from the model in"),
        (["--arm", "gpt"], "--arm gpt differs from the arm of"),
        (["--set", "alpha.init=0.9"], "alpha.init=0.9 differs from the model in"),
    ):
        wrong = command("train", "--init-from", source, "--out", tmp_path / "no", "--data", data, *asked)
        assert (wrong.code, len(wrong.shown)) == (2, 1)
        assert said in wrong.err
    other = command("train", "--init-from", source, "--out", tmp_path / "no", *SMALL, "--steps", 1)  # the shipped text
    assert (other.code, "token ids, the model only" in other.err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_a_new_run_begins_with_an_exported_folder(command: commands.Command, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    from spherelm.interop.initial import read_model, read_model_config

    source, folder = tmp_path / "source", tmp_path / "folder"
    assert command(*words(source, data, "--steps", 1)).code in (0, 1)
    assert command("export", source, folder).code == 0
    assert dataclasses.replace(read_model_config(folder), n_kv_heads=None) == load_model(source).config
    expected = load_model(source).state_dict()
    found = read_model(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(bool((found[name] == value).all()) for name, value in expected.items())
    asked = ["train", "--init-from", folder, "--out", tmp_path / "new", "--data", data, "--steps", 1, *SMALL]
    assert command(*asked).code in (0, 1)


def test_text_is_prepared_beside_the_run(command: commands.Command, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(tiny.text(number, 3000))
    for said in ("0.txt", "*.txt", "0.txt,1.txt"):
        out = tmp_path / said.replace("*", "all").replace(".txt", "")
        answer = command("train", "--arm", "gpt", "--out", out, "--data", tmp_path / said if "," not in said else
                         ",".join(str(tmp_path / one) for one in said.split(",")), "--dry-run", *SHAPE)  # fmt: skip
        made = out.with_name(f"{out.name}-data")
        if answer.code == 2:  # of so few documents none may be held out
            assert "spherelm data prepare has more choices" in answer.err
            continue
        assert answer.code == 0, answer.err
        assert f"is prepared in {made}: " in answer.err
        assert f"epochs of {made}" in answer.out or str(made) in answer.out


def test_a_stream_of_a_local_file_is_not_taken_for_text(command: commands.Command, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra data")
    file, val = tmp_path / "text.jsonl", tmp_path / "val.jsonl"
    for path, first in ((file, 0), (val, 9)):
        path.write_text("".join(json.dumps({"text": tiny.text(first + i, 60)}) + "\n" for i in range(9)))
    out = tmp_path / "run"
    data = f"stream:{file},tokenizer=bytes,val={val}"
    answer = command("train", "--arm", "gpt", "--out", out, "--data", data, "--dry-run")
    assert answer.code == 0, answer.err
    assert not out.with_name("run-data").exists()


def test_an_unknown_key_of_a_whole_config_is_refused(command: commands.Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command(*words(run, data, "--steps", 1)).code in (0, 1)
    record = json.loads((run / "config.json").read_text())
    (tmp_path / "more.json").write_text(json.dumps({**record, "shedule": {}}))
    answer = command("train", "--config", tmp_path / "more.json", "--out", tmp_path / "no")
    assert (answer.code, len(answer.shown)) == (2, 1)
    assert "it has no field 'shedule' (did you mean 'schedule'?)" in answer.err


def test_without_a_vocabulary_it_is_said_what_to_give() -> None:
    with pytest.raises(UserError, match="give vocab_size="):
        make_run("gpt", "hybrid")
