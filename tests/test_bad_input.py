"""Users' mistakes end with exit code 2 and one line with the value and the fix, and change nothing on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
import tiny
from torch.distributed.checkpoint.filesystem import FileSystem

from spherelm.cli import COMMANDS
from spherelm.cli.parser import flags_of
from spherelm.data.prepare import prepare as prepare_data
from spherelm.data.shards import BODY_START
from spherelm.data.tokenizer import load_tokenizer
from spherelm.errors import UserError
from spherelm.models import ARMS
from spherelm.recipes import make_run
from spherelm.recipes.overrides import fields_of
from spherelm.recipes.written import parse_axes, parse_fields
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.runs.loading import load_model
from spherelm.train.trainer import train

SMALL = ["--steps", 2, "--seq-len", 16, "--batch-size", 2, "--lr", 0.01, "--dtype", "float32", "--no-compile"]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def good_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_data(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def data(good_data: Path, tmp_path: Path) -> Path:
    """A data directory to be damaged."""
    shutil.copytree(good_data.parent, tmp_path / "text")
    return tmp_path / "text" / "data"


@pytest.fixture
def refused(command: commands.Command) -> Refused:
    """`refused(word, ...)`: the one line with which a command refuses."""

    def refuse(*words: object) -> str:
        answer = command(*words)
        assert answer.code == 2, answer
        assert answer.out == ""
        (line,) = answer.shown
        assert line.startswith("spherelm: ")
        return line.removeprefix("spherelm: ")

    return refuse


def training(out: Path, data: Path | str, *more: object) -> list[object]:
    return ["train", "--arm", "ngpt", "--out", out, "--data", data, *commands.replaced(SMALL, more)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "secret"], "unknown recipe 'secret': choose one of law, paper"),
        (["--preset", "huge"], "unknown preset 'huge': choose one of demo, encoder, pairs, "),
        (["--seq-len", 100_000], "sequence length 100000 needs 100001 tokens, but the train text in "),
        (["--steps", 0], "steps must be more than 0, got 0"),
        (["--set", "base=1"], "base must be a BaseShape, got 1: set base_d_model, base_n_layers and base_steps"),
        (["--dry-run", "--set", "precision=nvfp4", "d_model=24", "n_heads=1"], "precision=nvfp4 takes 16 numbers"),
        (["--dry-run", "--device-memory", "inf"], "device_memory must be a finite number, got inf"),
        (["--dry-run", "--device-memory", "nan"], "device_memory must be a finite number, got nan"),
        (["--batch-size", -4], "batch_size must be more than 0, got -4"),
        (["--micro-batch-size", 3], "micro_batch_size=3 does not divide batch_size=2"),
        (["--lr", 0], "lr must be more than 0, got 0.0"),
        (["--lr", "nan"], "lr must be a finite number, got nan"),
        (["--seed", -1], "seed must be at least 0, got -1"),
        (["--seed", 2**64], "seed must be less than 1.845e+19, got 18446744073709551616"),
        (["--set", "eps=0"], "eps must be at least 1.175e-38, got 0"),
        (["--keep", 0], "keep must be more than 0, got 0"),
        (["--set", "momentum=abc"], "momentum must be a valid number, got 'abc'"),
        (["--set", "eps=x"], "eps must be a valid number, got 'x'"),
        (["--set", "hyperball=1"], "hyperball must be a valid boolean, got 1"),
        (["--set", "matrix_rate=x"], "matrix_rate must be a valid number, got 'x'"),
        (["--set", "schedule=3"], "schedule must be 'constant', 'cosine', 'linear', 'wsd' or 'log', got 3"),
        (["--set", "grad_clip=x"], "grad_clip must be a valid number, got 'x'"),
        (["--set", "betas=0.9"], "betas must be a list, got 0.9"),
        (["--set", "betas=[0.9]"], "betas must be a list of 2, got [0.9]"),
        (["--set", "betas=[]"], "betas must be a list of 2, got []"),
        (["--set", "betas=[0.9,0.9,0.9]"], "betas must be a list of 2, got [0.9, 0.9, 0.9]"),
        (["--set", "betas=[0.9,1.5]"], "betas.1 must be less than 1, got 1.5"),
        (["--set", "optimizer=mouon"], "unknown optimizer 'mouon' (did you mean 'muon'?): choose one of "),
        (["--set", "eps=-1"], "eps must be at least 1.175e-38, got -1"),
        (["--set", "weight_decay=NaN"], "weight_decay must be a finite number, got nan"),
        (["--set", "rho=Infinity"], "rho must be a finite number, got inf"),
        (["--set", "matrix_rate=-1"], "matrix_rate must be at least 0, got -1"),
        (["--set", "s_z.scale=0"], "s_z.scale must be more than 0, got 0"),
        (["--set", "lr=1e-3"], "'lr=1e-3': lr is given by --lr too: give it once"),
        (["--set", "seed=1.5"], "seed must be a valid integer, got 1.5"),
        (["--set", "seed=true"], "seed must be a valid integer, got True"),
        (["--set", "warmup_steps=soon"], "warmup_steps must be a valid integer, got 'soon'"),
        (["--set", "warmup_steps=1000"], "warmup_steps=1000 is more than the run's steps=2: lower it"),
        (["--set", "eval_tasks=winogrande", "eval_limit=-1"], "eval_limit must be more than 0, got -1"),
        (["--set", "d_k=abc"], "d_k='abc' must divide d_model=128, with no n_heads beside it"),
        (["--set", "d_k=64", "d_model=abc"], "d_k=64 must divide d_model='abc', with no n_heads beside it"),
        (["--set", "arm=gpt"], "'arm=gpt': arm is chosen by --arm"),
        (["--set", "vocab_size=100"], "'vocab_size=100': vocab_size is chosen by the tokenizer of --data"),
        (["--set", "steps=5"], "'steps=5': steps is given by --steps too: give it once"),
        (["--set", "rho=0.1", "rho=0.2"], "'rho=0.2': rho is given twice: give it once"),
        (["--set", "schedule=cosine", "kind=log"], "no field is called kind"),
        (["--set", "qknorm=1"], "no field is called qknorm (did you mean 'variant.qk_norm'?)"),
        (["--set", "n_layer=1"], "no field is called n_layer (did you mean 'n_layers'?)"),
        (["--set", "Alpha_Init=1"], "no field is called Alpha_Init (did you mean 'alpha.init'?)"),
        (
            ["--set", "init_std=1"],
            "init_std is no field of ngpt, only of gpt: leave it out for ngpt",
        ),
        (["--set", "hidden_part=0.1"], "hidden_part is a field of the architecture encoder, and this run has decoder"),
        (["--preset", "dmo"], "unknown preset 'dmo' (did you mean 'demo'?): choose one of demo, "),
        (["--recipe", "PAPER"], "unknown recipe 'PAPER' (did you mean 'paper'?): choose one of law, "),
        (["--n-layer", 1], "train has no flag --n-layer: did you mean --n-layers?"),
        (["--set", "tie_embeddings=perhaps"], "tie_embeddings must be a valid boolean, got 'perhaps'"),
        (["--set", "max_angle=true"], "max_angle must be a valid number, got True"),
        (["--set", "matrix_rate=true"], "matrix_rate must be a valid number, got True"),
        (["--set", "rho=0.3"], "rho has no effect in ngpt by 'law': it needs schedule=log"),
        (["--set", "schedule=log", "rho=1e-320"], "rho must be at least 2.225e-308, got 1e-320"),
        (["--set", "momentum=null"], "momentum must be a valid number, got None"),
        (["--set", "base_steps=0"], "base_steps must be more than 0, got 0"),
        (["--set", "betas=[0.9,x"], "cannot read 'betas=[0.9,x': a value in brackets is a list"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)),
)
def test_settings(flags: list[object], message: str, refused: Refused, good_data: Path, tmp_path: Path) -> None:
    assert message in refused(*training(tmp_path / "run", good_data, *flags))
    assert not (tmp_path / "run").exists(), "the same --out can be given again"


def test_validation_text_shorter_than_a_sequence(refused: Refused, data: Path, tmp_path: Path) -> None:
    length = len(tiny.text(2, 200)) + 1
    line = refused(*training(tmp_path / "run", data, "--seq-len", length))
    assert f"sequence length {length} needs {length + 1} tokens, but the val text in {data} has {length}" in line
    assert "use a shorter --seq-len or more text" in line


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("n_heads=3", "n_heads=3 does not divide d_model=128: choose n_heads among the divisors of d_model"),
        ("n_layers=0", "n_layers must be more than 0, got 0"),
        ("d_model=wide", "d_model must be a valid integer, got 'wide'"),
        ("colour=red", "no field is called colour"),
        ("alpha.init", "cannot read 'alpha.init': write a field and its values, such as alpha.init=0.05,0.25"),
        ("batch_size=2,2", "two runs would share the directory"),
        ("seed=0,1", "'seed=0,1': seed is chosen by --seeds"),
        ("lr=1e-3,2e-3", "'lr=1e-3,2e-3': lr is given by --lr too: give it once"),
        ("steps=1,2", "'steps=1,2': steps is given by --steps too: give it once"),
    ],
)
def test_sweeps(vary: str, message: str, refused: Refused, good_data: Path, tmp_path: Path) -> None:
    words = ["--arms", "ngpt", "--lr", 0.01, "--seeds", 1, "--steps", 2]
    assert message in refused("sweep", "--out", tmp_path / "sweep", "--data", good_data, "--vary", vary, *words)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_does_not_write_over_what_is_not_its_own(refused: Refused, good_data: Path, tmp_path: Path) -> None:
    words = ["--data", good_data, "--arms", "ngpt", "--lr", 0.01, "--steps", 2]
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("index.html", "sweep.json"):
        (mine / name).write_text("precious")
        assert "was not written by spherelm sweep: choose another --out" in refused("sweep", "--out", mine, *words)
        assert (mine / name).read_text() == "precious"
        (mine / name).unlink()
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'} is a file: choose another --out" in refused(
        "sweep", "--out", tmp_path / "file", *words
    )
    fields = [f"{name}_rate=1.{'0' * 12}{k}" for k, name in enumerate(("matrix", "scale"), 1)]
    fields += ["grad_clip=1.0000000000001", "alpha.scale=0.0500000001"]
    fields += [
        "weight_decay=0.1000000000001",
        "momentum=0.9000000000001",
        "alpha.init=0.0500000001",
        "s_z.init=8.00000001",
    ]
    fields += [
        "input_embedding_rate=1.5",
        "output_embedding_rate=1.5",
        "logit_preconditioning=0.5",
        "eps=1.00000001e-9",
    ]
    assert "which is too long: vary fewer fields at once" in refused(
        "sweep", "--out", tmp_path / "s", *words, "--vary", *fields
    )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("arm", ARMS)
def test_every_field_that_is_named_as_one_is_one(arm: str) -> None:
    """Whatever is said of its value, or that it has no effect, it is never said that there is no such field."""
    for field in fields_of(arm):
        said = ""
        try:
            make_run(arm, "demo", vocab_size=64, **{"lr": 0.1, field: object()})
        except (ValueError, TypeError) as refusal:
            said = str(refusal)
        assert "no field" not in said, field


def test_truth_is_read_as_json_and_as_python_write_it() -> None:
    words = ["tie_embeddings=True", "compile=FALSE", "hyperball=true", "grad_clip=None", "max_angle=null", "rope=none"]
    expected = {
        "tie_embeddings": True,
        "compile": False,
        "hyperball": True,
        "grad_clip": None,
        "max_angle": None,
        "rope": "none",
    }
    assert parse_fields(words) == expected
    assert parse_axes(["tie_embeddings=True,False"], {}, ()) == {"tie_embeddings": [True, False]}


def test_several_directories_of_text_want_weights(refused: Refused, good_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(good_data)
    for data in (f"{good_data},{other}", f"{good_data}=1,{other}"):
        line = refused(*training(tmp_path / "run", data))
        assert (
            line == f"{data!r} names several directories: give each its weight, such as --data {good_data}=1,{other}=1"
        )


def test_a_directory_of_runs_names_them(refused: Refused, good_data: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(tiny.run_config("ngpt", good_data, steps=1), tmp_path / "runs" / name, show_progress=False)
    runs, text = tmp_path / "runs", good_data.parent / "val.txt"
    (runs / "config.json").write_text("{}")  # as compare and sweep have one beside their runs
    for words in (
        ["generate", runs, "--prompt", "a"],
        ["generate", runs, "--interactive"],
        ["eval", runs, "--perplexity", text],
        ["eval", runs, "--translate", text, "--reference", text],
        ["export", runs, tmp_path / "out"],
        ["inspect", runs, "--out", tmp_path / "out"],
    ):
        line = refused(*words)
        assert line == f"{runs} holds 2 runs but is not a run: give one of them, {runs / 'one'}, {runs / 'two'}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "stream",
    [
        "text.jsonl",
        "text.jsonl,column=number",
        "text.jsonl,column=body,config=en",
        "text.jsonl,column=body,limit=0",
        "text.jsonl,column=body,limit=some",
        "text.jsonl,column=body,val=2",
        "text.jsonl,column=body,val=text.csv",
        "text.jsonl,column=body,val=0.5",
        "text.jsonl,colour=red",
        "text.csv",
        "none.jsonl",
    ],
)
def test_what_is_said_of_a_stream_names_flags_of_train(
    stream: str, command: commands.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": "one text", "number": 1}) + "\n")
    (tmp_path / "text.csv").write_text("a,b")
    answer = command(*training(tmp_path / "run", f"stream:./{stream},tokenizer=bytes"))
    assert answer.code == 2
    named = re.findall(r"--[a-z][a-z-]*", answer.shown[-1])
    assert set(named) <= flags_of(COMMANDS["train"]).keys()
    assert not (tmp_path / "run").exists()


def test_the_coldest_text_is_the_most_probable_one(command: commands.Command, good_data: Path, tmp_path: Path) -> None:
    train(tiny.run_config("ngpt", good_data, steps=1), tmp_path / "run", show_progress=False)
    words = ["generate", tmp_path / "run", "--prompt", "ba", "--max-new-tokens", 5, "--temperature"]
    for temperature in (1e-19, 1e-40, 1e-300):
        assert command(*words, temperature) == command(*words, 0)


def test_a_text_to_which_nothing_is_added_is_its_prompt(
    command: commands.Command, good_data: Path, tmp_path: Path
) -> None:
    train(tiny.run_config("ngpt", good_data, steps=1), tmp_path / "run", show_progress=False)
    answer = command("generate", tmp_path / "run", "--prompt", "ba", "--max-new-tokens", 0)
    assert (answer.code, answer.out, answer.err) == (0, "ba\n", "")


@pytest.mark.parametrize("betas", ["[0,0.95]", "[0,0]", "[0.5,0]"])
def test_a_whole_number_among_the_betas_is_a_number(
    betas: str, command: commands.Command, good_data: Path, tmp_path: Path
) -> None:
    for optimizer in ("adamw", "muon", "gated_adamw"):
        fields = ["--set", f"betas={betas}", f"optimizer={optimizer}", "n_layers=1", "d_model=16", "n_heads=2"]
        answer = command(*training(tmp_path / optimizer, good_data, *fields))
        assert answer.code == 0, answer.err


@pytest.mark.parametrize("flags", [["--lr", 1e38], ["--set", "matrix_rate=1e300"]], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "gated_adamw"])
def test_a_rate_that_float32_does_not_hold_diverges(
    flags: list[object], optimizer: str, command: commands.Command, good_data: Path, tmp_path: Path
) -> None:
    answer = command(*training(tmp_path / "run", good_data, "--set", f"optimizer={optimizer}", *flags))
    assert answer.code == 1
    assert "Traceback" not in answer.err
    assert " at step " in answer.shown[-1]


class Refusal(UserError):
    """An error of a lower floor."""


REFUSING = {
    "the model": ["trainer.build", "checks.build"],
    "the optimizer": ["trainer.build_optimizer", "checks.build_optimizer"],
    "the text": ["checks.open_data"],
    "the tasks": ["checks.task_scorer"],
    "the sinks": ["checks.check_names"],
}
"""Functions that may refuse a run that its configuration allows, in `spherelm.train`."""


@pytest.mark.parametrize("what", REFUSING)
@pytest.mark.parametrize("name", ["train", "compare", "sweep", "evidence"])
def test_what_is_refused_late_leaves_no_trace(
    name: str, what: str, refused: Refused, good_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the corrected command can be given at once."""
    (tmp_path / "test.txt").write_text(tiny.text(3, 200))
    test = tmp_path / "test"
    prepare_data([good_data.parent / "train.txt"], test, "bytes", val=[tmp_path / "test.txt"])
    out, before = tmp_path / "out", sorted(tmp_path.rglob("*"))
    words = {
        "train": training(out, good_data),
        "compare": ["compare", "--out", out, "--data", good_data, "--steps", 4, "--seq-len", 16],
        "sweep": ["sweep", "--out", out, "--data", good_data, "--steps", 2, "--vary", "seq_len=16"],
        "evidence": [
            "evidence",
            "--out",
            out,
            "--data",
            good_data,
            "--test",
            test,
            "--contexts",
            16,
            "--budgets",
            0.01,
        ],
    }[name]

    def refuse(*given: object, **named: object) -> None:
        raise Refusal(f"{what} cannot be: take another")

    for function in REFUSING[what]:
        monkeypatch.setattr(f"spherelm.train.{function}", refuse)
    assert refused(*words) == f"{what} cannot be: take another"
    assert sorted(tmp_path.rglob("*")) == before


LATE = {
    "inspect": "spherelm.report.inspection.write_tables",
    "report": "spherelm.report.ends_page.write_json",
    "export": "spherelm.interop.huggingface.folder.save_folder",
    "data pairs": "spherelm.data.pairs.write_json",
    "data prepare": "spherelm.data.prepare._Work.run",
}
"""A function that each command with an output directory calls near its end."""


@pytest.mark.parametrize("name", LATE)
def test_a_directory_appears_whole_or_not_at_all(
    name: str,
    refused: Refused,
    command: commands.Command,
    good_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that is full near the end, and the same command again."""
    run, out, text = tmp_path / "run", tmp_path / "out", good_data.parent / "train.txt"
    train(tiny.run_config("ngpt", good_data, seq_len=64), run, show_progress=False)
    sides = [f"--{split}{side}" for split in ("", "val-") for side in ("source", "target")]
    words = {
        "inspect": [run, "--out", out, "--text", text, "--sentence", "ba", "--tokens", 64],
        "report": [run, "--out", out],
        "export": [run, out],
        "data pairs": [
            *(word for side in sides for word in (side, good_data.parent / "val.txt" if "val" in side else text)),
            "--out",
            out,
            "--tokenizer",
            "bytes",
            "--max-tokens",
            9000,
        ],
        "data prepare": ["--input", text, "--out", out, "--tokenizer", "bytes", "--workers", 1],
    }[name]
    before = sorted(tmp_path.rglob("*"))

    def full(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LATE[name], full)
        assert "No space left on device" in refused(*name.split(), *words)
    assert sorted(tmp_path.rglob("*")) == before
    answer = command(*name.split(), *words)
    assert answer.code == 0, answer.err
    assert any(out.iterdir())


@pytest.mark.parametrize("name", ["eval --json", "eval --write", "bench --json", "doctor --json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    name: str, refused: Refused, good_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*given: object, **named: object) -> None:
        raise AssertionError("that was the work")

    models = ("train.evaluation.load_decoder", "train.evaluation.load_for_inference")
    for floor in (*models, "experiments.bench.bench", "experiments.doctor.examine"):
        monkeypatch.setattr(f"spherelm.{floor}", work)
    (tmp_path / "taken").write_text("mine")
    text, flag = good_data.parent / "val.txt", name.split()[1]
    words = {
        "eval --json": [tmp_path, "--perplexity", text, "--lengths", 8],
        "eval --write": [tmp_path, "--translate", text, "--reference", text],
        "bench --json": [],
        "doctor --json": [],
    }[name]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")  # root may write everywhere
    (tmp_path / "closed").mkdir()
    for path, line in (
        ("taken", f"{tmp_path / 'taken'} already exists: choose another {flag}"),
        ("none/here", f"no directory {tmp_path / 'none'} for {flag}: make it, or choose another"),
        ("closed/here", f"nothing may be written in {tmp_path / 'closed'}: choose another {flag}"),
    ):
        assert refused(name.split()[0], *words, flag, tmp_path / path) == line
    assert (tmp_path / "taken").read_text() == "mine"


def test_no_workers(refused: Refused, good_data: Path, tmp_path: Path) -> None:
    for workers in (0, -1):
        for words in (["sweep", "--arms", "ngpt"], ["compare"], ["evidence", "--test", good_data]):
            shared = ["--out", tmp_path / "out", "--data", good_data, "--workers", workers]
            assert refused(*words, *shared) == f"--workers must be at least 1, got {workers}"
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--seeds", "--steps"])
def test_nothing_to_sweep(flag: str, refused: Refused, good_data: Path, tmp_path: Path) -> None:
    line = refused("sweep", "--out", tmp_path / "sweep", "--data", good_data, flag, 0)
    assert line.startswith(f"{flag[2:]} must be ")
    assert line.endswith("got 0")


def test_missing_data(refused: Refused, tmp_path: Path) -> None:
    line = refused(*training(tmp_path / "run", tmp_path / "none"))
    assert (
        line == f"no data directory {tmp_path / 'none'}: make it with spherelm data prepare --out {tmp_path / 'none'}"
    )
    (tmp_path / "books.txt").write_text("text")
    line = refused(*training(tmp_path / "run", tmp_path / "boks.txt"))
    assert line.startswith(f"no file {tmp_path / 'boks.txt'} (did you mean {tmp_path / 'books.txt'}?): ")
    (tmp_path / "empty").mkdir()
    line = refused(*training(tmp_path / "run", tmp_path / "empty"))
    assert line == f"{tmp_path / 'empty'} is not a data directory (no manifest.json): use spherelm data prepare"
    assert not (tmp_path / "run").exists()


def edit(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def damage_manifest(data: Path) -> None:
    manifest = tiny.read_json(data / "manifest.json")
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a header's bit": (lambda d: edit(d / "train-00000.bin", 60, b"X"), "train-00000.bin: damaged header"),
    "another file": (lambda d: edit(d / "train-00000.bin", 0, b"GIF89a"), "train-00000.bin: not a token shard, or its header"),
    "a newer version": (lambda d: edit(d / "train-00000.bin", 8, b"\7"), "shard version 7, this spherelm reads version 1"),
    "a wrong hash": (damage_manifest, "train-00000.bin: not the shard that manifest.json describes"),
    "a cut body": (lambda d: cut(d / "train-00000.bin"), "train-00000.bin: truncated ("),
    "a missing shard": (lambda d: (d / "val-00000.bin").unlink(), "val-00000.bin: is missing; restore it"),
    "an id too large": (
        lambda d: edit(d / "val-00000.bin", BODY_START, b"\xff\xff"),
        "val-00000.bin: holds token id 65535 >= vocab_size 257",
    ),
    "a cut manifest": (lambda d: cut(d / "manifest.json"), "manifest.json: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_data(what: str, refused: Refused, data: Path, tmp_path: Path) -> None:
    do, message = DAMAGE[what]
    do(data)
    line = refused(*training(tmp_path / "run", data))
    assert message in line
    assert "prepare" in line or "restore" in line, "what to do"
    assert not (tmp_path / "run").exists()


def test_a_token_that_is_found_wrong_in_mid_run(command: commands.Command, data: Path, tmp_path: Path) -> None:
    """A body is read as it is needed; what is wrong there shows in a line of its own behind the progress bar."""
    edit(data / "train-00000.bin", BODY_START, b"\xff\xff" * 1000)
    answer = command(*training(tmp_path / "run", data))
    assert answer.code == 2
    assert "Traceback" not in answer.err
    line = answer.err.splitlines()[-1]
    assert line.startswith(f"spherelm: {data / 'train-00000.bin'}: holds token id 65535 >= vocab_size 257; ")


def prepare(tmp_path: Path, content: bytes, *more: object, name: str = "in.txt") -> list[object]:
    (tmp_path / name).write_bytes(content)
    words = ["--input", tmp_path / name, "--out", tmp_path / "out", "--workers", 1]
    return ["data", "prepare", *words, *(more or ("--tokenizer", "bytes"))]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "in.txt is empty: remove it from the inputs"), (b"\xe9t\xe9", "in.txt is not UTF-8 (byte 0): convert it")],
    ids=["empty", "latin 1"],
)
def test_text_that_is_none(content: bytes, message: str, command: commands.Command, tmp_path: Path) -> None:
    answer = command(*prepare(tmp_path, content))
    assert answer.code == 2
    assert message in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    line = refused("data", "prepare", "--input", tmp_path / "none.txt", "--out", tmp_path / "out")
    assert line == f"no input file {tmp_path / 'none.txt'}: check the path"


@pytest.mark.parametrize("name", ["no such thing", "missing.json", "missing.model", "/nowhere/at/all"])
def test_an_unknown_tokenizer(name: str, refused: Refused, tmp_path: Path) -> None:
    line = refused(*prepare(tmp_path, b"text", "--tokenizer", name))
    assert line.startswith(f"unknown tokenizer '{name}': no such file; give 'default', 'bytes', a tokenizer.json")
    assert not (tmp_path / "out").exists()


def test_damage_that_only_reading_all_of_it_shows(command: commands.Command, data: Path) -> None:
    """Another letter in the text: found when `prepare` is asked for what it made."""
    edit(data / "train-00000.bin", BODY_START, b"z")
    text = data.parent
    words = ["--input", text / "train.txt", "--val", text / "val.txt", "--tokenizer", "bytes", "--workers", 1]
    answer = command("data", "prepare", "--out", data, *words)
    assert answer.code == 2
    assert "damaged: the tokens do not match the sha256 in the header; delete the directory" in answer.err


def test_an_output_directory_that_is_taken(refused: Refused, good_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny.run_config("ngpt", good_data), out, show_progress=False)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for words in (training(out, good_data), ["compare", "--out", out, "--data", good_data, *SMALL[:4], "--seeds", 1]):
        line = refused(*words)
        assert line == f"{out} already holds something: choose another --out, or --resume to continue the run there"
    line = refused(*training(out, good_data, "--resume"))
    assert line.startswith(f"{out} was made with another config: ")
    line = refused("data", "prepare", "--input", good_data.parent / "train.txt", "--out", out, "--tokenizer", "bytes")
    assert "holds something other than prepared data: choose another --out" in line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_going_on_with_something_that_is_no_run(refused: Refused, good_data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    line = refused(*training(tmp_path, good_data, "--resume"))
    assert line == f"{tmp_path} holds nothing to resume (no config.json): choose another --out"
    line = refused(*training(tmp_path / "thesis.tex", good_data))
    assert line == f"{tmp_path / 'thesis.tex'} is a file: choose another --out"


def test_a_checkpoint_of_another_config(
    refused: Refused, command: commands.Command, good_data: Path, tmp_path: Path
) -> None:
    assert command(*training(tmp_path / "run", good_data)).code == 0
    line = refused(*training(tmp_path / "run", good_data, "--lr", 0.02, "--resume"))
    assert (
        "made with another config: optim.lr is 0.01 there and 0.02 now; give the same value, or another --out" in line
    )


def test_generating_from_what_is_no_run(refused: Refused, good_data: Path, tmp_path: Path) -> None:
    line = refused("generate", tmp_path / "none", "--prompt", "ba")
    assert line == f"there is no directory {tmp_path / 'none'}: give the path of a run"
    run = tmp_path / "run"
    train(tiny.run_config("ngpt", good_data, steps=1), run, show_progress=False)
    assert refused("generate", run, "--prompt", "") == "the prompt is empty: give at least one character"
    line = refused("generate", run, "--prompt", "ba", "--max-new-tokens", 100)
    assert line.startswith("2 prompt tokens and max_new_tokens=100 do not fit the model's max_seq_len=16")
    small = ["--prompt", "ba", "--max-new-tokens", 3]
    assert "temperature must be at least 0, got -1.0" in refused("generate", run, *small, "--temperature", -1)
    weights = run / "checkpoints" / "step-00000001" / "model.safetensors"
    edit(weights, weights.stat().st_size - 3, b"\x7f")
    assert "is damaged (its sha256 differs)" in refused("generate", run, *small)


def test_a_full_disk_while_saving(
    command: commands.Command, good_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint does not fit; the first is there, and training goes on from it when there is room again."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", tiny.full_disk(2))
        answer = command(*training(run, good_data, "--save-every", 1))
    assert answer.code == 2
    assert "Traceback" not in answer.err
    line = answer.err.splitlines()[-1]
    good = run / "checkpoints" / "step-00000001"
    assert line.startswith(f"spherelm: could not save a checkpoint in {run / 'checkpoints'} ([Errno 28] No space left")
    assert line.endswith(f"the last good checkpoint is {good}: free some space and --resume")
    assert latest_checkpoint(run) == good
    load_model(run)
    assert command(*training(run, good_data, "--save-every", 1, "--resume")).code == 0
    assert command(*training(tmp_path / "whole", good_data, "--save-every", 1)).code == 0
    ours, theirs = latest_checkpoint(run), latest_checkpoint(tmp_path / "whole")
    assert ours is not None
    assert theirs is not None
    tiny.assert_bitwise(ours, theirs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "arm: ngpt\nrecipe: [law]\n", "recipe must be text, got ['law']"),
        ("a.yaml", "arm: ngpt\ninit_from: 3\n", "init_from must be text, got 3"),
        ("a.json", "[" * 100_000, "a.json cannot be used: it is nested too deeply"),
    ],
)
def test_a_settings_file_of_wrong_types_is_refused(
    name: str, content: str, message: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert message in refused("train", "--out", tmp_path / "run", "--config", tmp_path / name, "--dry-run")


@pytest.mark.parametrize("command_name", ["sweep", "compare"])
def test_a_format_that_does_not_fit_one_of_the_runs_leaves_nothing(
    command_name: str, command: commands.Command, good_data: Path, tmp_path: Path
) -> None:
    """Before the runs that it fits are trained."""
    formats = ["--vary", "precision=float32,nvfp4"] if command_name == "sweep" else []
    words = ["--set", "d_model=24", "n_heads=1", "n_layers=1", *([] if formats else ["precision=nvfp4"])]
    answer = command(command_name, "--out", tmp_path / "out", "--data", good_data, *formats, *words, "--steps", 2)
    assert answer.code == 2
    line = answer.shown[-1]
    assert "precision=nvfp4 takes 16 numbers at a time" in line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tiny_run(good_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, to be copied."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    train(tiny.run_config("ngpt", good_data, d_model=16, n_heads=2, n_layers=1, steps=2, eval_every=1), run)
    return run


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "not a readable tokenizer.json (EOF while parsing"),
        ("tokenizer.json", b"{}", "not a readable tokenizer.json (Model missing."),
        ("tokenizer.json", None, "no file for tokenizer kind 'json'"),
        ("tokenizer.meta.json", b"\xff", "is not JSON ("),
        ("tokenizer.meta.json", b'{"kind": []}', "holds what no tokenizer was saved with"),
        ("tokenizer.meta.json", b'{"kind": "bytes", "eos_token": 3}', "holds what no tokenizer was saved with"),
    ],
)
def test_a_damaged_tokenizer_is_named_with_its_path(
    name: str, content: bytes | None, message: str, refused: Refused, good_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    run, text = tmp_path / "run", good_data.parent / "val.txt"
    shutil.copytree(tiny_run, run)
    load_tokenizer("default").save(run)
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    for words in (
        ["generate", run, "--prompt", "a"],
        ["export", run, tmp_path / "out"],
        ["eval", run, "--perplexity", text, "--lengths", 8],
        ["train", "--init-from", run, "--data", good_data, "--out", tmp_path / "new", "--seq-len", 16],
        ["data", "prepare", "--input", text, "--tokenizer", run, "--out", tmp_path / "new"],
    ):
        line = refused(*words)
        assert line.startswith(str(run / name))
        assert message in line
        assert "restore it" in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "new").exists()


OUTPUTS: dict[str, list[str]] = {
    "train": ["--arm", "ngpt", "--data", "DATA", "--steps", "1"],
    "compare": ["--data", "DATA", "--steps", "1"],
    "sweep": ["--data", "DATA", "--steps", "1"],
    "evidence": ["--data", "DATA", "--test", "DATA"],
    "inspect": ["RUN"],
    "report": ["RUN"],
    "data prepare": ["--input", "TEXT", "--tokenizer", "bytes"],
    "data tokenizer": ["--input", "TEXT"],
    "data convert": ["--data", "DATA", "--format", "nanogpt"],
    "data pairs": ["--source", "TEXT", "--target", "TEXT", "--val-source", "TEXT", "--val-target", "TEXT"],
    "export": ["RUN"],
    "import nvidia": ["TEXT"],
    "import hub": ["RUN"],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_directory_that_cannot_be_made(
    name: str, refused: Refused, good_data: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = good_data.parent / "val.txt"
    found = {"DATA": good_data, "RUN": tiny_run, "TEXT": text}
    words = [*name.split(), *(found.get(word, word) for word in OUTPUTS[name])]
    flag = ["--out"] if "--out" in flags_of(COMMANDS[name]) else []
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")  # root may write everywhere
    for out, said in (
        (text / "a" / "b", f"{text} is a file: choose another "),
        (tmp_path / "closed" / "a", f"nothing may be written in {tmp_path / 'closed'}: choose another "),
    ):
        assert refused(*words, *flag, out).startswith(said)
    assert list((tmp_path / "closed").iterdir()) == []


def test_every_command_with_a_directory_to_make_is_in_that_table() -> None:
    takes = {name for name, do in COMMANDS.items() if {"--out", "out"} & flags_of(do).keys()}
    assert takes == OUTPUTS.keys()


@pytest.mark.parametrize("state", ["[]", '{"sha256": []}', '"x"', "3", "{}"])
def test_a_state_of_another_shape_is_a_damaged_checkpoint(
    state: str, refused: Refused, tiny_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/*/state.json"):
        file.write_text(state, encoding="utf-8")
    assert "is not a complete checkpoint" in refused("generate", tmp_path / "run", "--prompt", "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\n{}\n", "line 1 is not JSON"),
        (b"1\n2\n", "line 1 is no record"),
        (b'{"step": 1}\n{}\n', "line 1 is no record"),
        (b'{"kind": "val", "step": "1"}\n{}\n', "line 1 is no record"),
        (b'{"kind": "val", "step": 1}\n{}\n', "line 1 is a validation without a loss"),
    ],
)
@pytest.mark.parametrize("asked", ["export", "report"])
def test_damaged_metrics_are_named(
    asked: str, content: bytes, message: str, refused: Refused, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "metrics.jsonl").write_bytes(content)
    words = [run, tmp_path / "out"] if asked == "export" else [run, "--out", tmp_path / "out"]
    line = refused(asked, *words)
    assert f"{run / 'metrics.jsonl'}, {message}" in line


@pytest.mark.parametrize("content", [b"{", b"3", b"[]", b"\xff", b'{"inputs": 3}', b'{"inputs": [3]}'])
def test_a_damaged_manifest_of_the_data_is_no_hindrance_to_an_export(
    content: bytes, command: commands.Command, tiny_run: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "config.json").write_text(json.dumps({**tiny.read_json(run / "config.json"), "data": str(data)}))
    (data / "manifest.json").write_bytes(content)
    answer = command("export", run, tmp_path / "out")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("content", [b"{", b"3", b'{"data_identity": 3}', None])
def test_a_report_names_the_config_that_is_damaged(
    content: bytes | None, refused: Refused, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_bytes(content)
    line = refused("report", run, "--out", tmp_path / "page")
    assert str(run / "config.json") in line
    assert "Errno" not in line
    assert "iterable" not in line


def test_a_damaged_run_of_a_sweep_is_named_when_it_is_resumed(
    refused: Refused, command: commands.Command, good_data: Path, tmp_path: Path
) -> None:
    words = ["sweep", "--out", tmp_path / "sweep", "--data", good_data, "--arms", "gpt", "--steps", 1, "--workers", 1]
    words += ["--set", "seq_len=16", "d_model=16", "n_heads=2", "n_layers=1"]
    assert command(*words).code == 0
    (run,) = (path.parent for path in (tmp_path / "sweep").glob("*/metrics.jsonl"))
    log = run / "metrics.jsonl"
    log.write_bytes(b"nonsense\n3\n" + log.read_bytes())
    answer = command(*words)
    assert (answer.code, "Traceback" in answer.err) == (2, False)
    assert f"{log}, line 1 is not JSON" in answer.shown[-1]
    (run / "config.json").write_text("{")
    assert str(run / "config.json") in refused(*words)


def test_json_files_of_the_users_are_passed_over(command: commands.Command, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    strange = [b"{broken", b"\xff", b'{"tasks": [1], "step": 2}', b'{"perplexity": {"a": 1}}', b'{"tasks": {"a": 3}}']
    for number, content in enumerate(strange):
        (run / f"mine-{number}.json").write_bytes(content)
    assert command("export", run, tmp_path / "out").code == 0
    answer = command("report", run, "--out", tmp_path / "page")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", 0], "--threads must be at least 1, got 0"),
        (["--beams", 2, "--length-penalty", 1000], "length_penalty must be at most 10, got 1000"),
    ],
)
def test_settings_of_generation_have_bounds(
    flags: list[object], message: str, refused: Refused, tiny_run: Path
) -> None:
    assert message in refused("generate", tiny_run, "--prompt", "a", *flags)
