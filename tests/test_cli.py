"""The command line: names, flags, help, exit codes, and that each command reaches the floor below
with what was asked.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny

import spherelm
from spherelm import cli
from spherelm.cli.parser import flags_of, parse
from spherelm.data.corpus import shipped_directory
from spherelm.data.shards import open_tokens
from spherelm.errors import NotFoundError, StorageError, UserError
from spherelm.experiments import comparison
from spherelm.experiments import sweep as sweep_module
from spherelm.experiments.jobs import Job
from spherelm.models import parameter_count
from spherelm.recipes import RECIPES, WAYS, make_run
from spherelm.report import comparison_page, sweep_page
from spherelm.runs.config import from_dict
from spherelm.runs.metrics import read_metrics
from spherelm.runs.record import flat
from spherelm.train import trainer
from spherelm.train.guard import Diverged
from spherelm.train.signals import Interrupted

PINNED = {
    "compare": "--out --data --preset --steps --seq-len --seeds --quick",
    "train": """--arm --out --data --preset --recipe --steps --seq-len --batch-size --lr --seed --dtype --no-compile
        --eval-every --save-every --resume --dry-run""",
    "data prepare": "--input --out --tokenizer --val --val-fraction",
    "generate": "--prompt",
    "sweep": "--out",
    "bench": "--shape --json",
}
"""The commands and flags that the design pins; more of both are free."""

SMALL = ["--steps", 2, "--seq-len", 16, "--batch-size", 2, "--dtype", "float32", "--no-compile"]


def plain(text: str) -> str:
    """A help page on one line."""
    return " ".join(text.split())


@pytest.mark.parametrize("name", sorted({*cli.COMMANDS, *PINNED}))
def test_every_command_explains_itself(name: str, command: commands.Command) -> None:
    answer = command(*name.split(), "--help")
    assert (answer.code, answer.err) == (0, "")
    page = plain(answer.out)
    assert page.startswith(f"usage: spherelm {name} ")
    assert set(PINNED.get(name, "").split()) <= set(re.findall(r"^  (--[a-z][a-z0-9-]*)\b", answer.out, re.MULTILINE))
    assert not re.search(r"None|default: \)|default: ''|default: False|\bSTR\b", page), "choices and defaults are plain"
    for flag in flags_of(cli.COMMANDS[name]).values():
        assert len(flag.about.split()) > 2 or flag.name in ("--steps", "--n-layers"), flag.name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_example_is_understood(name: str, command: commands.Command) -> None:
    """Each page has one, of flags that there are with values that can be."""
    (line,) = re.findall(r"^Example: spherelm (.+)$", command(*name.split(), "--help").out, re.MULTILINE)
    words = shlex.split(line)
    assert words[: len(name.split())] == name.split()
    assert parse(cli.COMMANDS[name], name, words[len(name.split()) :])


def test_the_program_lists_its_commands(command: commands.Command) -> None:
    answer = command("--help")
    assert answer.code == 0
    assert all(f"\n  {name} " in answer.out for name in cli.COMMANDS)
    assert command() == command("-h") == answer
    group = command("data", "--help")
    assert group.code == 0
    assert {name for name in cli.COMMANDS if f"\n  {name} " in group.out} == {
        "data prepare",
        "data tokenizer",
        "data convert",
        "data pairs",
        "data verify",
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "no command 'trian' (did you mean 'train'?): spherelm --help lists them"),
        (["data", "prepar"], "no command 'data prepar' (did you mean 'data prepare'?): spherelm --help lists them"),
        (["xyz", "--help"], "no command 'xyz': spherelm --help lists them"),
        (["train", "--arm", "ngtp"], "--arm: 'ngtp' is not one of gpt, ngpt (did you mean 'ngpt'?); see spherelm train --help"),
        (["train", "--steps", "many"], "--steps: 'many' is not a valid whole number; see spherelm train --help"),
        (["list", "preset"], "WHAT: 'preset' is not one of presets, recipes, fields, tasks (did you mean 'presets'?); see "
         "spherelm list --help"),
        (["compare"], "the following arguments are required: --out; see spherelm compare --help"),
        (["export", "a", "b", "c"], "unrecognized arguments: c; see spherelm export --help"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_in_one_line(words: list[str], line: str, command: commands.Command) -> None:
    answer = command(*words)
    assert (answer.code, answer.out, answer.shown) == (2, "", [f"spherelm: {line}"])


def test_the_version_is_said(command: commands.Command) -> None:
    assert command("--version") == commands.Answer(0, f"spherelm {spherelm.__version__}\n", "")


def test_defaults_are_shown_with_their_values(command: commands.Command) -> None:
    page = plain(command("generate", "--help").out)
    for text in ("(default: 1)", "(default: 0.8)", "(default: 50)"):
        assert text in page


@pytest.mark.parametrize("words", [["train"], ["fly"], ["train", "--arm", "bert", "--out", "x"], ["train", "--steps"]])
def test_what_cannot_be_read_is_code_2(words: list[str], command: commands.Command) -> None:
    answer = command(*words)
    assert answer.code == 2
    assert "Traceback" not in answer.err


def test_the_module_is_the_program(command: commands.Command, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = entry_points(group="console_scripts", name="spherelm")
    assert script.load() is cli.main
    expected = command("train", "--help")
    runpy.run_module("spherelm", run_name="__main__")
    assert capsys.readouterr().out == expected.out


def test_both_ways_to_start_it_say_the_same() -> None:
    """In processes of their own; one line of complaint and code 2 from both, the same help from both."""
    installed = shutil.which("spherelm", path=str(Path(sys.executable).parent))
    starts = [[sys.executable, "-m", "spherelm"]] + ([[installed]] if installed else [])
    helps = [subprocess.run([*start, "compare", "--help"], capture_output=True, text=True) for start in starts]
    assert {answer.stdout for answer in helps} == {helps[0].stdout}
    assert {(answer.returncode, answer.stderr) for answer in helps} == {(0, "")}
    wrong = [*starts[-1], "train", "--arm", "gpt", "--out", "x", "--data", "no such directory"]
    answer = subprocess.run(wrong, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (2, "")
    line = "spherelm: no data directory no such directory: make it with spherelm data prepare --out no such directory\n"
    assert answer.stderr == line


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`spherelm ... | head` ends quietly."""
    words = [sys.executable, "-m", "spherelm", "train", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_from_text_to_text(command: commands.Command, tmp_path: Path) -> None:
    """Prepare, train, go on, generate: what a first-time user does."""
    (tmp_path / "a.txt").write_text(tiny.text(1))
    (tmp_path / "b.txt").write_text(tiny.text(2))
    data, run = tmp_path / "data", tmp_path / "run"
    words = ["--input", tmp_path / "a.txt", "--val", tmp_path / "b.txt", "--out", data, "--tokenizer", "bytes"]
    answer = command("data", "prepare", *words, "--workers", 1)
    assert answer.code == 0
    size = len(tiny.text(1)) + 1
    assert f"train: 1 document, {size:,} tokens" in answer.out
    assert "val: 1 document," in answer.out

    answer = command("train", "--arm", "ngpt", "--out", run, "--data", data, *SMALL)
    assert answer.code == 0
    loss = read_metrics(run / "metrics.jsonl")[-1]["loss"]
    assert answer.out == f"final validation loss {loss:.4f} nats per token; the run is in {run}\n"
    assert "2/2" in answer.err
    again = command("train", "--arm", "ngpt", "--out", run, "--data", data, *SMALL, "--resume")
    assert (again.code, again.out) == (0, answer.out)

    answer = command("generate", run, "--prompt", "ba", "--max-new-tokens", 5, "--samples", 2)
    assert answer.code == 0
    assert answer.err == ""
    first, second = answer.out.split("\n---\n")
    assert first.startswith("ba")
    assert second.startswith("ba")
    assert command("generate", run, "--prompt", "ba", "--max-new-tokens", 5, "--samples", 2).out == answer.out
    other = command("generate", run, "--prompt", "ba", "--max-new-tokens", 5, "--samples", 2, "--seed", 1)
    assert other.out != answer.out


def test_a_dry_run_resolves_and_stops(command: commands.Command, data: Path, tmp_path: Path) -> None:
    words = ["--arm", "ngpt", "--out", tmp_path / "run", "--data", data, "--lr", 0.5, "--dry-run", "--json"]
    answer = command("train", *words, *SMALL)
    assert answer.code == 0
    record = json.loads(answer.out)
    config = from_dict(record)
    assert record["parameters"] == parameter_count(config.model)
    assert (config.optim.lr, config.train.steps, config.model.vocab_size) == (0.5, 2, tiny.VOCAB)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_paper_size_needs_no_data(command: commands.Command, tmp_path: Path) -> None:
    words = ["--arm", "gpt", "--out", tmp_path / "run", "--preset", "0.5b-1k", "--recipe", "paper", "--dry-run"]
    answer = command("train", *words, "--json")
    assert answer.code == 0
    record = json.loads(answer.out)
    assert record["parameters"] // 100_000 == 4682
    table = command("train", *words)
    assert table.code == 0
    assert f"{record['parameters']:,}" in table.out
    assert f"{record['tokens']:,}" in table.out
    assert from_dict(record) == make_run("gpt", "0.5b-1k", "paper")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "encoder", "--mask-documents"], "--mask-documents is for models that predict the next token: "),
        (["--preset", "pairs"], "an encoder-decoder learns from pairs and the shipped text holds none: "),
        (["--log-to", "diary"], "--log-to diary is unknown: choose among "),
        (["--seq-len", "9000000"], "sequence length 9000000 needs 9000001 tokens, but the train text in "),
        (["--device", "gpu"], "unknown device 'gpu': choose one of cpu"),
        (["--batch-size", "4", "--set", "micro_batch_size=3"], "micro_batch_size=3 does not divide batch_size=4"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_dry_run_refuses_what_training_does(
    words: list[str], said: str, command: commands.Command, tmp_path: Path
) -> None:
    asked = ["train", "--arm", "gpt", "--out", tmp_path / "run", "--steps", 1, *words]
    real, dry = (command(*asked, *more) for more in ([], ["--dry-run"]))
    assert (real.code, dry.code, dry.err) == (2, 2, real.err)
    assert said in dry.err


def test_a_dry_run_refuses_weights_and_directories_as_training_does(
    command: commands.Command, data: Path, tmp_path: Path
) -> None:
    run, settings = tmp_path / "run", tmp_path / "settings.json"
    words = ["train", "--arm", "ngpt", "--data", data, *SMALL]
    assert command(*words, "--out", run).code in (0, 1)
    record = json.loads((run / "config.json").read_text())
    settings.write_text(json.dumps({**record, "init_from": str(tmp_path / "nowhere")}))
    files = sorted(tmp_path.rglob("*"))
    for asked, said in (
        (["train", "--config", settings, "--out", tmp_path / "new"], f"no directory {tmp_path / 'nowhere'}"),
        ([*words, "--out", run], f"{run} already holds something: choose another --out"),
        ([*words, "--out", settings / "x"], f"{settings} is a file: choose another --out"),
        (["train", "--resume", run, "--lr", 7], f"{run} was made with another config: optim.lr is "),
    ):
        real, dry = (command(*asked, *more) for more in ([], ["--dry-run"]))
        assert (real.code, dry.code, dry.err) == (2, 2, real.err)
        assert said in dry.err
    settings.write_text(json.dumps({**record, "init_from": str(run)}))
    for asked in (["--config", settings, "--out", tmp_path / "new"], ["--resume", run]):
        assert command("train", *asked, "--dry-run").code == 0
    assert sorted(tmp_path.rglob("*")) == files


def test_a_dry_run_tries_the_tasks_as_training_does(
    command: commands.Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise UserError("no task is called so: take another")

    monkeypatch.setattr("spherelm.train.checks.task_scorer", refuse)
    words = ["train", "--arm", "ngpt", "--out", tmp_path / "run", "--data", data, *SMALL]
    for more in ([], ["--dry-run"]):
        assert command(*words, *more).shown == ["spherelm: no task is called so: take another"]


def test_a_dry_run_says_which_device_its_numbers_are_not_of(
    command: commands.Command, data: Path, tmp_path: Path
) -> None:
    words = ["train", "--arm", "ngpt", "--out", tmp_path / "run", "--data", data, *SMALL, "--dry-run"]
    away = "no device xpu:7 is here: training would be refused on this machine"
    for device, said in (("xpu:7", away), ("cpu", "training would use its processor")):
        assert said in command(*words, "--device", device).out
        found = json.loads(command(*words, "--device", device, "--json").out)
        assert found["device"] == {"name": device, "is_here": device == "cpu"}
        assert (found["device_memory"] == 80 * 2**30) == (device != "cpu")


def test_a_dry_run_says_what_does_not_fit_and_what_is_repeated(command: commands.Command, tmp_path: Path) -> None:
    """The paper's 0.5B on one device, and on the shipped text."""
    words = ["train", "--arm", "gpt", "--out", tmp_path / "run", "--preset", "0.5b-1k", "--dry-run"]
    record = json.loads(command(*words, "--device-memory", 100, "--json").out)
    size = len(open_tokens(shipped_directory(), "train"))
    assert record["epochs"] == {"the text that ships with spherelm": pytest.approx(record["tokens"] / size)}
    total = record["memory_per_device"]["total"] / 2**30
    for memory, fits in ((total - 1, False), (total + 1, True)):
        told = command(*words, "--device-memory", memory)
        assert ("It does not fit" in told.out) != fits
        assert json.loads(command(*words, "--device-memory", memory, "--json").out)["fits"] == fits
        assert "warning: the text that ships with spherelm is read" in told.out
    answer = command(*words, "--device-memory", 0)
    assert (answer.code, answer.shown) == (2, ["spherelm: --device-memory must be positive, got 0"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_shows_what_a_recipe_decides(
    recipe: str, command: commands.Command, data: Path, tmp_path: Path
) -> None:
    words = ["--out", tmp_path / "run", "--data", data, "--recipe", recipe, "--dry-run"]
    for arm in tiny.ARMS if recipe in WAYS else ("ngpt",):
        answer = command("train", "--arm", arm, *words, "--json")
        assert answer.code == 0, answer.err
        record = json.loads(answer.out)
        assert from_dict(record) == make_run(arm, "demo", recipe, vocab_size=tiny.VOCAB, data=str(data), seed=0)
        table = command("train", "--arm", arm, *words).out
        for part in ("model", "optim", "schedule"):
            assert all(f"{name}={value}" in table for name, value in flat(record[part]).items())


def test_train_takes_single_fields(command: commands.Command, tmp_path: Path) -> None:
    words = ["--out", tmp_path / "run", "--preset", "0.5b-1k", "--dry-run", "--json", "--arm", "ngpt", "--lr", "1e-3"]
    fields = [
        "schedule=log",
        "rho=0.05",
        "optimizer=gated_adamw",
        "max_angle=0.2",
        "logit_preconditioning=1",
        "matrix_rate=2",
    ]
    record = json.loads(command("train", *words, "--set", *fields).out)
    assert (record["schedule"]["kind"], record["schedule"]["rho"]) == ("log", 0.05)
    assert (record["optim"]["optimizer"]["kind"], record["optim"]["max_angle"]) == ("gated_adamw", 0.2)
    assert (record["model"]["logit_preconditioning"], record["optim"]["multipliers"]["matrix"]) == (1, 2)
    for wrong, line in (
        ("rho", "cannot read 'rho'"),
        ("rho=1,2", "rho has 2 values, [1, 2]: a run has one"),
        ("zeal=1", "no field is called zeal"),
    ):
        answer = command("train", *words, "--set", wrong)
        assert answer.code == 2
        assert line in answer.err


def test_train_passes_on_what_was_asked(
    command: commands.Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def record(*arguments: Any) -> float:
        asked.extend(arguments)
        return 1.0

    monkeypatch.setattr(trainer, "train", record)
    words = [
        "--recipe",
        "paper",
        "--micro-batch-size",
        1,
        "--lr",
        0.25,
        "--seed",
        5,
        "--eval-every",
        3,
        "--save-every",
        4,
    ]
    answer = command(
        "train", "--arm", "gpt", "--out", tmp_path, "--data", data, *SMALL, *words, "--keep", 7, "--resume"
    )
    assert answer.out == f"final validation loss 1.0000 nats per token; the run is in {tmp_path}\n"
    config, out, resume = asked
    assert (config.arm, config.recipe, config.optim.lr, out, resume) == ("gpt", "paper", 0.25, tmp_path, True)
    train = config.train
    assert (train.steps, train.seq_len, train.batch_size, train.micro_batch_size, train.seed) == (2, 16, 2, 1, 5)
    assert (train.dtype, train.compile, train.eval_every, train.save_every, train.keep) == ("float32", False, 3, 4, 7)


def test_compare_passes_on_what_was_asked(
    command: commands.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    pages: list[Path] = []

    def page_of(out: Path) -> Path:
        pages.append(out)
        return out / "page.html"

    monkeypatch.setattr(comparison, "compare", lambda *arguments: asked.extend(arguments))
    monkeypatch.setattr(comparison_page, "write_report", page_of)
    monkeypatch.setattr(comparison_page, "conclusion", lambda out: f"What {out} says.")
    words = [
        "--seeds",
        3,
        "--quick",
        "--lr-gpt",
        0.1,
        "--lr-ngpt",
        0.2,
        "--workers",
        2,
        "--preset",
        "p",
        "--recipe",
        "r",
    ]
    answer = command("compare", "--out", tmp_path, "--data", "d", *SMALL, *words, "--resume")
    assert answer.code == 0
    config, out, resume, workers = asked
    assert (out, resume, workers) == (tmp_path, True, 2)
    assert pages == [tmp_path]
    assert config == comparison.CompareConfig(
        preset="p", recipe="r", data="d", seeds=3, quick=True, steps=2, seq_len=16, batch_size=2, lr_gpt=0.1,
        lr_ngpt=0.2, dtype="float32", compile=False,
    )  # fmt: skip
    assert answer.out.splitlines() == [f"What {tmp_path} says.", f"The page: {tmp_path / 'report.html'}"]


def test_sweep_passes_on_what_was_asked(
    command: commands.Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Job] = []

    def record(jobs: list[Job], *_: Any) -> list[float]:
        seen.extend(jobs)
        return [2.5] * len(jobs)

    monkeypatch.setattr(sweep_module, "run_jobs", record)
    monkeypatch.setattr(sweep_page, "write_page", lambda *_: None)
    words = [
        "--arms",
        "ngpt",
        "--lr",
        0.1,
        0.2,
        "--vary",
        "alpha.init=0.1,0.3",
        "seq_len=16",
        "--steps",
        9,
        "--seeds",
        2,
    ]
    (tmp_path / "sweep").mkdir()
    answer = command("sweep", "--out", tmp_path / "sweep", "--data", data, "--recipe", "law", "paper", *words)
    assert answer.code == 0, answer.err
    assert len(seen) == 2 * 2 * 2 * 2
    keys = {(j.config.recipe, j.config.optim.lr, j.config.model.alpha.init, j.config.train.seed) for j in seen}  # type: ignore[union-attr]
    assert keys == {(r, lr, a, s) for r in ("law", "paper") for lr in (0.1, 0.2) for a in (0.1, 0.3) for s in (0, 1)}
    assert {(j.config.train.steps, j.config.train.seq_len, j.config.data) for j in seen} == {(9, 16, str(data))}
    assert len(answer.out.splitlines()) == 2 + 8
    assert "| ngpt | demo | law | 0.1 | 16 | 0.1 | 9 | 2.5000 | 0.0000 |  | 2 |" in answer.out.splitlines()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a wrong\n  value"), 2, "spherelm: a wrong value"),
        (FileNotFoundError(2, "no file", "x"), 2, "spherelm: [Errno 2] no file: 'x'"),
        (OSError(28, "No space left on device"), 2, "spherelm: [Errno 28] No space left on device"),
        (Diverged("the loss is nan"), 1, "spherelm: the loss is nan"),
        (Interrupted("saved", 15), 143, "spherelm: saved"),
        (Interrupted("saved", 2), 130, "spherelm: saved"),
        (KeyboardInterrupt(), 130, "spherelm: interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_each_way_to_fail_has_its_code_and_one_line(
    error: BaseException, code: int, line: str, command: commands.Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    answer = command("train", "--arm", "gpt", "--out", "x", "--data", data, *SMALL)
    assert (answer.code, answer.out, answer.err) == (code, "", line + "\n")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a mistake of ours"),
        TypeError("another"),
        AssertionError("and another"),
        ValueError("not what the user gave"),
        OSError("not the system's"),
    ],
)
def test_our_own_mistakes_keep_their_traceback(
    error: Exception,
    command: commands.Command,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(type(error), match=str(error)):
        command("train", "--arm", "gpt", "--out", "x", "--data", data, *SMALL)
    assert re.fullmatch(r"spherelm: this is a bug in spherelm .*: please report it .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("error", [UserError("too many"), NotFoundError("no file"), StorageError("full")])
def test_what_the_user_can_mend_is_one_line(
    error: Exception, command: commands.Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    answer = command("train", "--arm", "gpt", "--out", "x", "--data", data, *SMALL)
    assert (answer.code, answer.out, answer.err) == (2, "", f"spherelm: {error}\n")


def test_training_that_diverges_is_code_1(command: commands.Command, data: Path, tmp_path: Path) -> None:
    answer = command("train", "--arm", "gpt", "--out", tmp_path / "run", "--data", data, *SMALL, "--lr", 1e30)
    assert answer.code == 1
    assert answer.out == ""
    assert re.fullmatch(
        r"spherelm: .*run: the (loss|gradient norm|validation loss) is nan at step \d \(.*\): lower --lr or check .*",
        answer.err.splitlines()[-1],
    )


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert spherelm.__version__ == version("spherelm")
