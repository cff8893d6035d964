"""Flags of every command: lists add up, other flags are given once, and each acts wherever it is taken."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import commands
import pytest
import tiny
import torch

from spherelm import cli
from spherelm.cli.given import Kind, check, flag_name, flags_of, unfold
from spherelm.data.sources import parse_data
from spherelm.recipes import make_run
from spherelm.runs.config import to_dict

FLAGS = [(name, flag) for name, command in cli.COMMANDS.items() for flag in flags_of(command)]
NEEDY = [(name, flag) for name, flag in FLAGS if flags_of(cli.COMMANDS[name])[flag].needs]

FLOORS = {
    "compare": ["experiments.comparison.compare", "report.report.write_report"],
    "train": ["train.trainer.train"],
    "sweep": ["experiments.sweep.sweep", "report.sweep_page.write_page"],
    "evidence": ["experiments.evidence.climb", "experiments.evidence_record.table"],
    "eval": [
        *(f"train.evaluation.{name}_of_run" for name in ("tasks", "perplexity", "translation")),
        *(
            "train.evaluation.about",
            "train.evaluation.trained_length",
            "runs.record.write_json",
            "cli.evaluation.tables",
        ),
    ],
    "inspect": ["report.inspection.inspect"],
    "report": ["report.ladder.write_ladder"],
    "generate": ["generation.samples.continuations", "generation.samples.continues", "generation.samples.Conversation"],
    "export": ["interop.export.export"],
    "push": ["interop.export.push"],
    "bench": [*(f"experiments.bench.{name}" for name in ("bench", "table", "write_result", "profile"))],
    "data prepare": ["data.prepare.prepare"],
    "data pairs": ["data.pairs.prepare_pairs"],
    "import nvidia": ["interop.imported.import_nvidia"],
    "import hub": ["interop.imported.import_hub"],
}
"""What each command calls with all that it was given."""

SAMPLES = {
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
    """What a floor below may answer to anything: it has every key and attribute, and nothing in it."""

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
    return data


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, command: commands.Command) -> Iterator[Callable[..., str]]:
    """`seen(name, word, ...)`: what the command hands to the floors below and prints; addresses in memory left out."""
    calls: list[str] = []

    def recorder(floor: str) -> Callable[..., Any]:
        def record(*given: Any, **named: Any) -> Any:
            calls.append(f"{floor}{given}{named}")
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


def types_of(command: Callable[..., Any]) -> dict[str, Any]:
    """The type behind each flag."""
    found = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        kind, notes = unfold(hint)
        if dataclasses.is_dataclass(kind):
            found |= types_of(kind)  # type: ignore[arg-type]
        else:
            found[flag_name(name, notes)] = kind
    return found


def given(name: str, flag: str, data: Path) -> list[object]:
    """The flag with a value that it does not have by itself."""
    names = {"--data": "data-by-another-name", "--test": "data-by-another-name", "--config": "config.json"}
    path = data.parent / names.get(flag, "val.txt")
    kind = types_of(cli.COMMANDS[name])[flag]
    if kind is bool:
        return [flag]
    inner = next((one for one in get_args(kind) if one not in (type(None), ...)), kind) if get_args(kind) else kind
    if get_origin(kind) is Literal or get_origin(inner) is Literal:
        value: object = get_args(kind if get_origin(kind) is Literal else inner)[-1]
    else:
        value = path if flag in names else {int: 3, float: 0.75, str: "abc", Path: path}[inner]
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
        "data prepare": ["--input", text, *out],
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
    if flag == "--json" and name in ("eval", "bench"):
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
        assert answer.shown == [f"spherelm: {flag} is given twice, with {own[1]} and with {own[1]}: give it once"]
        return
    if flag == "--reference":
        words += ["--translate", data]
    second = {
        "--arms": "gpt", "--recipe": "nugpt", "--sizes": "4m", "--contexts": "256", "--contenders": "nugpt",
        "--set": "n_layers=1", "--vary": "n_layers=1", "--lr": "0.5", "--budgets": "2",
    }.get(flag, data)  # fmt: skip
    assert seen(name, *words, *own, flag, second) == seen(name, *words, *own, second)
    assert seen(name, *words, *own, second) != seen(name, *words, flag, second)


def test_values_that_look_like_flags_add_up_too(seen: Callable[..., str], tmp_path: Path) -> None:
    words = [tmp_path, "--prompt", "a", "--stop=--end", "--stop=--fin", "--stop", "-1"]
    assert "'stop': ('--end', '--fin', '-1')" in seen("generate", *words)


def test_flags_are_read_as_the_parser_reads_them() -> None:
    """Underscores for hyphens, a value behind =, and nothing behind --."""
    flags = {"--batch-size": Kind(False, False, None), "--set": Kind(True, False, None)}
    with pytest.raises(ValueError, match="--batch-size is given twice, with 3 and with 4"):
        check(["--batch_size=3", "--batch-size", "4"], flags)
    with pytest.raises(ValueError, match="--set has no value"):
        check(["--set", "--batch-size", "4"], flags)
    check(["--batch-size", "4", "--", "--batch-size", "5"], flags)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--bach-size", 4], "train has no flag --bach-size: did you mean --batch-size?"),
        (["data", "prepare", "--inputs=a"], "data prepare has no flag --inputs: did you mean --input?"),
        (["bench", "--quickly"], "bench has no flag --quickly: see spherelm bench --help"),
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
