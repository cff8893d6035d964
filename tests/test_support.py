"""The table of supported combinations (docs/reference/support.md).

Of the table of features, each row is held by the tests that are marked with its title, and what it names is what there
is. The table by kind of model is run cell by cell: "yes" works, "no" is refused in one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import commands
import pytest
import tiny
import tiny_pairs
import torch
from test_docs import ROOT
from train.test_spread import assert_same, train_alone_and_spread

from spherelm import load_model
from spherelm.data.compression import COMPRESSIONS
from spherelm.data.documents import SUFFIXES
from spherelm.generation.samples import PRECISIONS
from spherelm.models import ARMS
from spherelm.optim.schedule import ScheduleConfig
from spherelm.recipes import ABLATIONS, PRESETS, WAYS
from spherelm.runs.config import TrainConfig
from spherelm.train.sinks import SINKS

PAGE = (ROOT / "docs" / "reference" / "support.md").read_text(encoding="utf-8")
FEATURES = dict(
    re.findall(r"^\| ([A-Z][^|]*?) \| (.*) \|$", PAGE.partition("## Features")[2].partition("\n## ")[0], re.MULTILINE)
)
MARK = re.compile(r"^@pytest\.mark\.row\(\"(.+)\"\)$", re.MULTILINE)


def test_every_feature_is_run_by_tests_that_carry_its_name() -> None:
    """A mark stands on the test that runs what the row says, and goes where the test goes."""
    files = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert {title for file in files for title in MARK.findall(file)} == set(FEATURES)


NAMED: dict[str, Iterable[str]] = {
    "Models": ARMS,
    "Recipes": WAYS,
    "Sizes": PRESETS,
    "Schedules": get_args(get_type_hints(ScheduleConfig)["kind"]),
    "Number formats": {*get_args(get_type_hints(TrainConfig)["dtype"])} - {"auto"},
    "Number formats for inference": [*PRECISIONS, "spherelm generate --dtype", "load_model(run, dtype)"],
    "Input files": [*SUFFIXES, *COMPRESSIONS, "--field"],
    "Logs": [*SINKS, "metrics.jsonl", "--log-to"],
}
"""The names in backticks in rows that list all of a kind."""


@pytest.mark.parametrize("title", NAMED)
def test_a_feature_names_all_there_is(title: str) -> None:
    assert sorted(re.findall(r"`([^`]+)`", FEATURES[title])) == sorted(NAMED[title])
    assert title != "Recipes" or f" {len(ABLATIONS)} ablations" in FEATURES[title]


BY_NAME: dict[str, Callable[[str], list[object]]] = {
    "Models": lambda name: ["--arm", name],
    "Recipes": lambda name: ["--recipe", name],
    "Schedules": lambda name: ["--set", f"schedule={name}"],
    "Number formats": lambda name: ["--dtype", name],
    "Number formats for inference": lambda name: ["--dtype", name],
}
"""The flags by which the names of a row are used, in `train`, or in `generate` where the row is about inference."""


@pytest.mark.parametrize(
    ("title", "name"),
    [(title, name) for title in BY_NAME for name in re.findall(r"`([^` ]+)`", FEATURES[title]) if "(" not in name],
)
def test_each_name_of_a_row_works(
    title: str,
    name: str,
    words: dict[str, list[object]],
    runs: dict[str, Path],
    tmp_path: Path,
    command: commands.Command,
) -> None:
    flags = BY_NAME[title](name)
    if title == "Number formats for inference":
        answer = command("generate", runs["decoders"], "--prompt", "ba", "--max-new-tokens", 3, *flags)
    else:
        given = commands.replaced(words["decoders"], flags) if flags[0] == "--arm" else [*words["decoders"], *flags]
        answer = command("train", "--out", tmp_path / "run", *LENGTH, *given)
        assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert answer.code == 0, answer.err


@pytest.mark.row("Commands")
def test_the_commands_are_those_that_the_command_line_lists(command: commands.Command) -> None:
    listed = re.findall(r"^  (\w+(?: \w+)?)  ", command("--help").out, re.MULTILINE)
    assert sorted(re.findall(r"`([^`]+)`", FEATURES["Commands"])) == sorted(listed)


@pytest.mark.row("Platforms")
def test_the_platforms_are_those_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in project
    assert all(f"Operating System :: {name}" in project for name in ("MacOS", "POSIX :: Linux"))


# ------------------------------------------------------------------------------------------------- by kind of model

SHAPE = ["d_model=16", "n_heads=2", "d_ff=24", "eval_windows=3"]
KINDS = {
    "decoders": ("demo", ["n_layers=2"]),
    "encoder-decoders": ("pairs", ["n_layers=2", "n_encoder_layers=2"]),
    "encoders": ("encoder", ["n_layers=2"]),
    "hybrids": ("hybrid", ["pattern=MA-O", "mamba_d_head=8", "mamba_d_state=4", "mamba_chunk=8", "n_experts=4"]),
}
"""The preset of each kind of model, and fields that make it tiny."""
LENGTH = ["--steps", 4, "--seq-len", 128, "--batch-size", 4, "--save-every", 2, "--keep", 9, "--no-compile"]
TASKS = ROOT.parent / "shared" / "data" / "evals"


@dataclass(frozen=True)
class Case:
    """A kind of model: the words of a command that trains it, a run of them, and what a check needs beside."""

    kind: str
    words: list[object]
    run: Path
    command: commands.Command
    tmp_path: Path
    request: pytest.FixtureRequest

    def train(self, out: str, *more: object) -> commands.Answer:
        """Train in a directory of this test."""
        return self.command("train", "--out", self.tmp_path / out, *LENGTH, "--dtype", "float32", *more, *self.words)


def trains_and_resumes(case: Case) -> Iterator[commands.Answer]:
    yield case.train("run")
    ends = [run / "checkpoints" / "step-00000004" for run in (case.run, case.tmp_path / "run")]
    (ends[1] / "state.json").unlink()
    yield case.train("run", "--resume")
    tiny.assert_bitwise(*ends)


def is_spread(case: Case) -> Iterator[commands.Answer]:
    assert_same(case.request.getfixturevalue("spread")[case.kind])
    yield from ()


def is_estimated(case: Case) -> Iterator[commands.Answer]:
    answer = case.train("none", "--dry-run", "--json")
    yield answer
    assert json.loads(answer.out)["parameters"] == sum(p.numel() for p in load_model(case.run).parameters())


def keeps_documents_apart(case: Case) -> Iterator[commands.Answer]:
    yield case.train("apart", "--mask-documents")
    yield case.train("none", "--mask-documents", "--dry-run")


def writes(case: Case) -> Iterator[commands.Answer]:
    for flags in ([5], [5, "--beams", 2], [130, "--window"]):
        yield case.command("generate", case.run, "--prompt", "ba", "--max-new-tokens", *flags)


def is_measured(case: Case) -> Iterator[commands.Answer]:
    text = case.tmp_path / "text.txt"
    text.write_text(tiny.text(5, 200))
    yield case.command("eval", case.run, "--perplexity", text, "--lengths", "32,256", "--document-tokens", 512)
    pytest.importorskip("lm_eval")
    if not TASKS.is_dir() and (EVAL, case.kind) not in REFUSED:
        pytest.skip(f"the tasks are not here: no folder {TASKS}")
    yield case.command("eval", case.run, "--tasks", "winogrande", "--task-data", TASKS, "--limit", 2)


def is_looked_into(case: Case) -> Iterator[commands.Answer]:
    pytest.importorskip("matplotlib")
    flags = ["--sentence", "ba", "--tokens", 256, "--no-images"]
    yield case.command("inspect", case.run, "--out", case.tmp_path / "inside", *flags)


def is_exported(case: Case) -> Iterator[commands.Answer]:
    transformers = pytest.importorskip("transformers")
    out = case.tmp_path / "exported"
    yield case.command("export", case.run, out)
    if (EXPORT, case.kind) not in REFUSED:
        seq2seq = case.kind == "encoder-decoders"
        hf = (transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM).from_pretrained(out)
        tokens = torch.randint(tiny.VOCAB - 1, (2, 6))
        written = hf.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        ours = load_model(case.run)
        rest = {"decoder_input_ids": written[:, :-1]} if seq2seq else {}
        logits = hf(tokens, **rest).logits
        torch.testing.assert_close(logits, ours(tokens, *rest.values()), rtol=0, atol=1e-5)


MASK, GENERATE, EVAL = (
    "documents kept apart (`--mask-documents`)",
    "`generate` with a cache, beams, `--window`",
    ("`eval --tasks`, `--perplexity`"),
)
INSPECT, EXPORT = "`inspect`", "`export`, `from_pretrained`, transformers' `generate`"
ROWS: dict[str, Callable[[Case], Iterator[commands.Answer]]] = {
    "`train`, `--resume` to the bit": trains_and_resumes,
    "many processes: FSDP2, copies, recomputation": is_spread,
    "`--dry-run`": is_estimated,
    MASK: keeps_documents_apart,
    GENERATE: writes,
    EVAL: is_measured,
    INSPECT: is_looked_into,
    EXPORT: is_exported,
}
"""The meaning of each row: commands that all work, or are all refused."""
REFUSED = {
    (MASK, "encoder-decoders"): "--mask-documents is for running text: pairs are always separate",
    (EVAL, "encoder-decoders"): "is an encoder-decoder: use --translate",
    (MASK, "encoders"): "--mask-documents is for models that predict the next token",
    (GENERATE, "encoders"): "writes no text",
    (EVAL, "encoders"): "predicts no next token",
    (INSPECT, "encoders"): "is an encoder",
    (EXPORT, "encoders"): "no Hugging Face class for MaskedModel",
}
"""The messages for the cells that are "no"."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """The words of a command that say which model of each kind is trained, and on what."""
    place = tmp_path_factory.mktemp("texts")
    text, pairs = tiny.make_data(place), tiny_pairs.make_pairs(place)
    of_kind = {kind: [pairs if preset == "pairs" else text, preset, fields] for kind, (preset, fields) in KINDS.items()}
    return {
        kind: ["--arm", "ngpt", "--data", data, "--preset", preset, "--set", *SHAPE, *fields]
        for kind, (data, preset, fields) in of_kind.items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, words: dict[str, list[object]]) -> dict[str, Path]:
    """A run of each kind."""
    out = tmp_path_factory.mktemp("runs")
    for kind, of_kind in words.items():
        with pytest.MonkeyPatch.context() as patch:
            given = ["spherelm", "train", "--out", out / kind, *LENGTH, "--dtype", "float32", *of_kind]
            patch.setattr("sys.argv", [*map(str, given)])
            commands.cli.main()
    return {kind: out / kind for kind in words}


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory, words: dict[str, list[object]]) -> dict[str, dict[str, Path]]:
    """Runs of each kind over one process and over two."""
    models = {kind: [*map(str, of_kind)] for kind, of_kind in words.items()}
    return train_alone_and_spread(models, tmp_path_factory.mktemp("spread"))


def table() -> dict[str, list[str]]:
    """The cells of each row."""
    _, found = PAGE.split(f"| | {' | '.join(KINDS)} |\n|---|---|---|---|---|\n")
    rows = re.match(r"(\|.*\|\n)+", found)
    assert rows is not None
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[0].splitlines()]
    return {first: rest for first, *rest in cells}


def test_the_table_says_what_is_run_below() -> None:
    assert table() == {row: ["no" if (row, kind) in REFUSED else "yes" for kind in KINDS] for row in ROWS}


@pytest.mark.filterwarnings("ignore:.*_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_each_cell_is_true(
    row: str,
    kind: str,
    words: dict[str, list[object]],
    runs: dict[str, Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    command: commands.Command,
) -> None:
    for answer in ROWS[row](Case(kind, words[kind], runs[kind], command, tmp_path, request)):
        if (row, kind) in REFUSED:
            assert (answer.code, len(answer.shown)) == (2, 1)
            assert REFUSED[row, kind] in answer.shown[0]
        else:
            assert answer.code == 0, answer.err
