"""Flags of every command: lists add up, other flags are given once, and each acts wherever it is taken."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import commands
import pytest
import tiny
import torch

import spherelm.data.text_files  # noqa: F401, before tests replace the functions that it imports
from spherelm import cli
from spherelm.cli.parser import POSITIONAL, flags_of, parse
from spherelm.data.sources import parse_data
from spherelm.errors import UserError
from spherelm.recipes import PRESET, RECIPE, make_run
from spherelm.runs.config import to_dict
from spherelm.train import precision
from spherelm.train.trainer import train

FLAGS = [
    (name, flag.name)
    for name, command in cli.COMMANDS.items()
    for flag in flags_of(command).values()
    if POSITIONAL not in flag.notes
]
NEEDY = [(name, flag) for name, flag in FLAGS if flags_of(cli.COMMANDS[name])[flag].needs]

FLOORS = {
    "compare": [
        "experiments.comparison.compare",
        "report.comparison_page.write_report",
        "report.comparison_page.conclusion",
    ],
    "train": ["train.trainer.train"],
    "sweep": ["experiments.sweep.sweep", "report.sweep_page.write_page"],
    "evidence": ["experiments.evidence.climb", "experiments.evidence_record.evidence_table"],
    "eval": [
        *(f"train.evaluation.{name}_of_run" for name in ("tasks", "perplexity", "translation")),
        *(
            "train.evaluation.origin_of",
            "train.evaluation.trained_length",
            "data.output.write_json",
            "cli.evaluation.tables",
        ),
    ],
    "inspect": ["report.inspection.inspect"],
    "report": ["report.ends_page.write_ends"],
    "generate": ["generation.samples.continuations", "generation.samples.continues", "generation.samples.Conversation"],
    "export": ["interop.export.export"],
    "push": ["interop.export.push"],
    "bench": [*(f"experiments.bench.{name}" for name in ("bench", "bench_table", "write_result", "profile"))],
    "doctor": ["experiments.doctor.examine", "data.output.write_json"],
    "data prepare": ["data.prepare.prepare"],
    "data tokenizer": ["data.bpe.train_on_files"],
    "data convert": ["data.convert.convert"],
    "data pairs": ["data.pairs.prepare_pairs"],
    "import nvidia": ["interop.imported.import_nvidia"],
    "import hub": ["interop.imported.import_hub"],
}
"""The function that each command calls with its arguments."""

SAMPLES = {
    "--device": "cpu",
    "--task-data": "somewhere",
    ("compare", "--set"): "d_model=64",
    ("sweep", "--set"): "d_model=64",
    ("train", "--d-ff"): "96",
    ("train", "--resume"): "",
    ("train", "--arm"): "ngpt",
    ("sweep", "--arms"): "ngpt",
    "--preset": "0.3m",
    "--recipe": "paper",
    ("train", "--set"): "d_model=64",
    ("train", "--d-model"): "64",
    ("train", "--n-heads"): "4",
    ("sweep", "--vary"): "d_model=64",
    ("evidence", "--sizes"): "1m",
    ("evidence", "--contexts"): "512",
    ("evidence", "--contenders"): "gpt-law",
    ("eval", "--lengths"): "16",
    ("eval", "--rope-scaling"): "linear:4",
    ("bench", "--shape"): "1,8,1,8,1,8",
    ("bench", "--pattern"): "MAM-",
    ("train", "--eval-tasks"): "winogrande",
    ("train", "--log-to"): "tensorboard",
    ("train", "--mfu"): "0.25",
    ("train", "--micro-batch-size"): "2",
    ("train", "--spike-factor"): "2",
    ("train", "--world-size"): "2",
    ("eval", "--document-tokens"): "64",
    ("eval", "--rope-base"): "500",
    "--seeds": "2",
}
"""Values that mean something, where any of the type would not do."""


class Answer(dict[str, Any]):
    """A result for any call to a lower floor: it has every key and attribute, and is empty."""

    def __missing__(self, key: str) -> Any:
        return {}

    room = 0

    def __len__(self) -> int:
        return 0

    def __format__(self, how: str) -> str:
        return "0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tiny.make_data(tmp_path_factory.mktemp("flags"))
    (data.parent / "data-by-another-name").symlink_to(data)
    run = make_run("ngpt", vocab_size=parse_data(str(data)).vocab_size, data=str(data))
    (data.parent / "config.json").write_text(json.dumps(to_dict(run)))
    train(tiny.run_config("gpt", data, steps=1), data.parent / "run", show_progress=False)
    return data


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, command: commands.Command) -> Iterator[Callable[..., str]]:
    """`seen(name, word, ...)`: what the command hands to the floors below and prints; addresses in memory left out."""
    calls: list[str] = []

    def recorder(floor: str) -> Callable[..., Any]:
        def record(*given: Any, **named: Any) -> Any:
            calls.append(f"{floor}{given}{named} on {torch.get_num_threads()} threads of {precision._CHOSEN.get()}")
            return {
                "import_nvidia": torch.nn.Linear(1, 1),
                "continuations": [],
                "trained_length": 16,
                "train": 1.0,
            }.get(floor.rpartition(".")[2], Answer())

        return record

    def watch(name: str, *words: object) -> str:
        for floor in FLOORS[name]:
            module, _, function = floor.rpartition(".")
            monkeypatch.setattr(importlib.import_module(f"spherelm.{module}"), function, recorder(floor))
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        calls.clear()
        answer = command(*name.split(), *words)
        assert answer.code == 0, answer.err
        return re.sub(r"0x[0-9a-f]+", "", "\n".join([*calls, answer.out]))

    return watch


def given(name: str, flag: str, data: Path) -> list[object]:
    """The flag with a value that it does not have by itself."""
    names = {
        "--data": "data-by-another-name",
        "--test": "data-by-another-name",
        "--config": "config.json",
        "--init-from": "run",
    }
    path = data.parent / names.get(flag, "val.txt")
    kind = flags_of(cli.COMMANDS[name])[flag].kind
    if kind is bool:
        return [flag]
    if get_origin(kind) is Literal:
        value: object = get_args(kind)[-1]
    else:
        value = path if flag in names else {int: 3, float: 0.75, str: "abc", Path: path}[kind]
    return [flag, SAMPLES.get((name, flag), SAMPLES.get(flag, value))]


def least(name: str, data: Path, tmp_path: Path) -> list[object]:
    """The fewest words with which a command does something."""
    text = data.parent / "train.txt"
    out = ["--out", tmp_path / "out"]
    return {
        "compare": out,
        "train": ["--arm", "gpt", *out, "--data", data],
        "sweep": [*out, "--data", data],
        "evidence": [*out, "--data", data, "--test", data],
        "eval": [tmp_path],
        "inspect": [tmp_path, *out],
        "report": [tmp_path, *out],
        "generate": [tmp_path, "--prompt", "a"],
        "export": [tmp_path, tmp_path / "out"],
        "push": [tmp_path, "user/name"],
        "bench": [],
        "doctor": [],
        "data prepare": ["--input", text, *out],
        "data tokenizer": ["--input", text, *out],
        "data convert": ["--data", data, "--format", "nanogpt", *out],
        "data pairs": [*(w for side in ("", "val-") for end in ("source", "target") for w in (f"--{side}{end}", text)), *out],
        "import nvidia": [text, tmp_path / "out"],
        "import hub": ["user/name", tmp_path / "out"],
    }[name]  # fmt: skip


def without(words: list[object], flags: Collection[str]) -> list[object]:
    """`words` but these flags, each with the value behind it."""
    return [word for place, word in enumerate(words) if not {word, *words[max(0, place - 1) : place]} & set(flags)]


def needed(name: str, flag: str, data: Path) -> dict[str, list[object]]:
    """The flags with values that a flag needs beside it, and those that these need."""
    found: dict[str, list[object]] = {}
    open_ends = [flag]
    while open_ends:
        needs = flags_of(cli.COMMANDS[name])[open_ends.pop()].needs
        wanted, _, value = (needs.beside[0] if needs and needs.beside else "").partition(" ")
        if wanted and wanted not in (flag, *found):
            found[wanted] = [wanted, value] if value else given(name, wanted, data)
            open_ends.append(wanted)
    return found


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_every_flag_acts_where_it_is_taken(
    name: str, flag: str, seen: Callable[..., str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it, another thing is asked of the floors below than without it."""
    words, own, flags = least(name, data, tmp_path), given(name, flag, data), flags_of(cli.COMMANDS[name])
    more = needed(name, flag, data)
    # Of two flags that need each other, neither is taken alone.
    alone = [
        word for other, found in more.items() for word in found if flag not in getattr(flags[other].needs, "beside", ())
    ]
    plain = [*words, *alone]
    words = without(words, [flag, *(["--arm"] if flag == "--config" else [])])
    if name == "generate" and flag in ("--prompts", "--interactive"):
        words = words[:1]  # in place of --prompt
    if flag == "--json" and name in ("eval", "bench", "doctor"):
        own = [flag, tmp_path / "new.json"]
    if (name, flag) == ("train", "--no-compile"):
        words, plain = [*words, "--preset", "1m"], [*plain, "--preset", "1m"]  # the demo is not compiled anyway
    assert seen(name, *words, *(word for found in more.values() for word in found), *own) != seen(name, *plain)


@pytest.mark.parametrize(("name", "flag"), NEEDY)
def test_a_flag_that_cannot_act_is_refused(
    name: str, flag: str, command: commands.Command, data: Path, tmp_path: Path
) -> None:
    """Alone where it needs another, and beside each that leaves it nothing to do; nothing is read or written."""
    flags = flags_of(cli.COMMANDS[name])
    needs = flags[flag].needs
    assert needs is not None
    words = least(name, data, tmp_path)
    for other in needs.without or [""]:
        blocking, _, value = other.partition(" ")
        if blocking == "--interactive":
            words = words[:1]
        more = [] if not other else [blocking, value] if value else given(name, blocking, data)
        words = without(words, [flag, *(one for one in flags if other in getattr(flags[one].needs, "without", ()))])
        answer = command(*name.split(), *words, *given(name, flag, data), *more)
        assert (answer.code, answer.out) == (2, "")
        (line,) = answer.shown
        assert line.startswith(f"spherelm: {flag} ")
        assert all(word in line for word in (other, *needs.beside))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "flag"), NEEDY)
def test_what_a_flag_needs_is_there(name: str, flag: str) -> None:
    flags = flags_of(cli.COMMANDS[name])
    needs = flags[flag].needs
    assert needs is not None
    others = {other.partition(" ")[0] for other in (*needs.beside, *needs.without)}
    assert others
    assert others <= flags.keys() - {flag}


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_a_flag_that_is_repeated(
    name: str, flag: str, seen: Callable[..., str], command: commands.Command, data: Path, tmp_path: Path
) -> None:
    """Of a list it says the same as all values behind one flag; of anything else it is refused."""
    kind = flags_of(cli.COMMANDS[name])[flag]
    if kind.is_switch:
        return
    words = least(name, data, tmp_path)
    own = given(name, flag, data)
    if flag in words:
        place = words.index(flag)
        words = [*words[:place], *words[place + 2 :]]
    if not kind.is_list:
        answer = command(*name.split(), *words, *own, *own)
        assert (answer.code, answer.out) == (2, "")
        value = flags_of(cli.COMMANDS[name])[flag].value(str(own[1]))
        line = f"spherelm: {flag} is given twice, with {value} and with {value}: give it once"
        assert answer.shown == [" ".join(line.split())]
        return
    if flag == "--reference":
        words += ["--translate", data]
    if flag == "--lengths":
        words += ["--perplexity", data]
    second = {
        "--arms": "gpt", "--recipe": "nugpt", "--sizes": "4m", "--contexts": "256", "--contenders": "nugpt",
        "--set": "n_layers=1", "--vary": "n_layers=1", "--lr": "0.5", "--budgets": "2", "--lengths": "32",
    }.get(flag, data)  # fmt: skip
    assert seen(name, *words, *own, flag, second) == seen(name, *words, *own, second)
    assert seen(name, *words, *own, second) != seen(name, *words, flag, second)


def test_values_that_look_like_flags_add_up_too(seen: Callable[..., str], tmp_path: Path) -> None:
    words = [tmp_path, "--prompt", "a", "--stop=--end", "--stop=--fin", "--stop", "-1"]
    assert "'stop': ('--end', '--fin', '-1')" in seen("generate", *words)


def test_words_are_read_in_every_way_to_write_them(tmp_path: Path) -> None:
    """Underscores for hyphens, a value behind =, lists by commas and spaces, nothing behind --."""
    command = cli.COMMANDS["sweep"]
    (tmp_path / "a,b.txt").touch()
    words = "--out o --arms ngpt,gpt --lr 1,2 3 --vary a=1,2,b=[3,4] c=5 --recipe x"
    again = "--lr=1 --lr 2,3 --arms ngpt --arms gpt --out=o --vary a=1,2 --vary b=[3,4],c=5 --recipe=x,"
    first = parse(command, "sweep", words.split(" "))
    assert first == parse(command, "sweep", again.split(" "))
    assert first["lr"] == (1, 2, 3)
    assert first["vary"] == ("a=1,2", "b=[3,4]", "c=5")
    files = parse(
        cli.COMMANDS["data prepare"], "data prepare", ["--out", "o", "--input", str(tmp_path / "a,b.txt"), "c,d"]
    )
    assert files["input"] == (tmp_path / "a,b.txt", Path("c"), Path("d"))
    assert parse(cli.COMMANDS["bench"], "bench", ["--no_compile"])["no_compile"] is True
    with pytest.raises(UserError, match="--batch-size is given twice, with 3 and with 4"):
        parse(cli.COMMANDS["train"], "train", ["--batch_size=3", "--batch-size", "4"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--bach-size", 4], "train has no flag --bach-size: did you mean --batch-size?"),
        (["data", "prepare", "--inputs=a"], "data prepare has no flag --inputs: did you mean --input?"),
        (["bench", "--quickly"], "bench has no flag --quickly: see spherelm bench --help"),
        (["train", "--rho", 1], "train has no flag --rho: did you mean --set rho=VALUE?"),
        (["compare", "--alpha.init", 1], "compare has no flag --alpha.init: did you mean --set alpha.init=VALUE?"),
        (["sweep", "--d-model", 64], "sweep has no flag --d-model: did you mean --set d_model=VALUE?"),
    ],
)
def test_an_unknown_flag(words: list[object], line: str, command: commands.Command) -> None:
    answer = command(*words)
    assert (answer.code, answer.out, answer.shown) == (2, "", [f"spherelm: {line}"])


def test_fields_that_are_set_count_as_their_flags(command: commands.Command, tmp_path: Path) -> None:
    words = ["train", "--arm", "gpt", "--out", tmp_path / "run", "--dry-run", "--shard-size", 2, "--world-size", 4]
    assert command(*words, "--set", "strategy=hybrid").code == 0
    answer = command(*words)
    line = "--shard-size acts only with --strategy hybrid: give both, or leave --shard-size out"
    assert (answer.code, answer.shown) == (2, [f"spherelm: {line}"])


@pytest.mark.parametrize("name", ["train", "compare", "sweep"])
def test_help_says_what_is_trained_where_nothing_is_named(name: str) -> None:
    flags = flags_of(cli.COMMANDS[name])
    assert f"; {PRESET} if left out" in flags["--preset"].about
    assert f"; {RECIPE} if left out" in flags["--recipe"].about
