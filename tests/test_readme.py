"""The README and the table of features kept true: every command runs in tiny form, every row has a check."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import tiny
import torch
from commands import replaced
from configs import make_config
from test_docs import PAGES, ROOT, exists, name_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import spherelm
from spherelm import GPT, NGPT, attach_retraction, build_optimizer, departure
from spherelm.cli import main
from spherelm.data.compression import COMPRESSIONS
from spherelm.data.corpus import shipped_directory
from spherelm.data.documents import SUFFIXES
from spherelm.data.loader import Loader
from spherelm.data.prepare import prepare
from spherelm.data.rows import Rows
from spherelm.data.shards import open_tokens
from spherelm.data.tokenizer import load_tokenizer
from spherelm.evaluate.translation import translation_scores
from spherelm.experiments.cost import measure_cost
from spherelm.experiments.jobs import Job, do_job
from spherelm.generation.beam import BeamSettings, beam_search
from spherelm.generation.generate import generate
from spherelm.generation.samples import PRECISIONS
from spherelm.models import ARCHITECTURES, ARMS, build, model_class
from spherelm.models.decoder import Decoder
from spherelm.optim import OptimConfig
from spherelm.optim.schedule import ScheduleConfig
from spherelm.recipes import ABLATIONS, PRESETS, WAYS, make_run
from spherelm.runs.config import TrainConfig, to_dict
from spherelm.train.estimate import Layout, estimate
from spherelm.train.sinks import NAMES as SINKS
from spherelm.train.trainer import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHORT = ["--steps", "2", "--seq-len", "128", "--batch-size", "2", "--dtype", "float32"]
TINY = {
    "compare": ["--data", "data/mine", *SHORT, "--no-compile", "--seeds", "1", "--quick", "--workers", "1"],
    "sweep": ["--data", "data/mine", "--steps", "2", "--seeds", "1", "--workers", "1"],
    "train": ["--data", "data/mine", "--preset", "demo", *SHORT, "--no-compile"],
    "data": ["--workers", "1"],
    "generate": ["--max-new-tokens", "5"],
    "inspect": ["--tokens", "256", "--no-images"],
}
"""What is added to a command, in place of the flags that it has, so that it takes no time."""


def commands_in(text: str) -> list[list[str]]:
    """The command lines of a shell block or of an indented one, as words, comments left out."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def commands_of(page: Path) -> list[list[str]]:
    """Every `spherelm` command in a page's shell blocks and indented blocks."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^    (spherelm .*)$", text, re.MULTILINE)
    return [words for block in blocks for words in commands_in(block) if words[0] == "spherelm"]


ALL_COMMANDS = [(page, words) for page in PAGES for words in commands_of(page)]


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """`run_command(words)`: does what the command line does in this process, and returns what it printed."""

    def run(words: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", words)
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                pytest.fail(f"{shlex.join(words)}\nended with code {stop.code}:\n{''.join(capsys.readouterr())}")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("page", "words"), ALL_COMMANDS, ids=[f"{name_of(p)}: {' '.join(w)}" for p, w in ALL_COMMANDS])
def test_every_command_is_understood(
    page: Path,
    words: list[str],
    run_command: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With the floors below the command line taken away, so that nothing is trained."""

    def understood_comparison(config: Any, *rest: Any) -> dict[str, Any]:
        assert all(config.run(arm, 4096, seed=0).arm == arm for arm in ARMS)
        return {"speedup": {}, "step_time_ratio": 1.0}

    def understood_sweep(choices: Any, *rest: Any, **more: Any) -> list[Any]:
        if page.name == "README.md":  # other pages speak of variants and recipes that are yet to be added, or gone
            assert all(make_run(**choice, vocab_size=4096) for choice in choices)
        return []

    monkeypatch.setattr("spherelm.experiments.comparison.compare", understood_comparison)
    monkeypatch.setattr("spherelm.experiments.sweep.sweep", understood_sweep)
    monkeypatch.setattr("spherelm.report.report.write_report", lambda out: None)
    monkeypatch.setattr("spherelm.report.sweep_page.write_page", lambda *rest: None)
    monkeypatch.setattr("spherelm.experiments.evidence.climb", lambda *_: {"measured": [], "speedups": []})
    monkeypatch.setattr("spherelm.experiments.bench.bench", lambda *rest: {})
    monkeypatch.setattr("spherelm.experiments.bench.table", str)
    monkeypatch.setattr("spherelm.experiments.bench.profile", str)
    monkeypatch.setattr("spherelm.train.trainer.train", lambda *rest: 0.0)
    monkeypatch.setattr("spherelm.data.sources.parse_data", lambda said: SimpleNamespace(vocab_size=4096))
    monkeypatch.setattr("spherelm.train.batches.epochs", lambda *rest: {})
    monkeypatch.setattr("spherelm.data.prepare.prepare", lambda *rest, **more: {"splits": {}})
    monkeypatch.setattr("spherelm.data.pairs.prepare_pairs", lambda *rest, **more: {"splits": {}})
    monkeypatch.setattr("spherelm.data.verification.verify", lambda directory: {})
    monkeypatch.setattr("spherelm.generation.samples.continues", lambda run: True)
    monkeypatch.setattr("spherelm.train.evaluation.translation_of_run", lambda *rest: {})
    monkeypatch.setattr("spherelm.generation.samples.continuations", lambda *rest, **more: [])
    monkeypatch.setattr("spherelm.interop.export.export", lambda *rest, **more: None)
    monkeypatch.setattr("spherelm.interop.export.push", lambda *rest, **more: "")
    monkeypatch.setattr("spherelm.interop.imported.import_hub", lambda *rest, **more: torch.nn.Linear(1, 1))
    monkeypatch.setattr("spherelm.train.evaluation.about", lambda *rest: {})
    monkeypatch.setattr("spherelm.train.evaluation.tasks_of_run", lambda *rest: {})
    monkeypatch.setattr("spherelm.train.evaluation.perplexity_of_run", lambda *rest: {})
    monkeypatch.setattr("spherelm.cli.evaluation.tables", lambda results: [])
    monkeypatch.setattr("spherelm.report.inspection.inspect", lambda *rest: [])
    monkeypatch.setattr("spherelm.report.ladder.write_ladder", lambda *rest: [])
    monkeypatch.setattr("spherelm.interop.imported.import_nvidia", lambda *rest, **more: torch.nn.Linear(1, 1))
    monkeypatch.chdir(tmp_path)
    if words[1] == "eval" and "--json" in words:
        Path(words[words.index("--json") + 1]).parent.mkdir(parents=True, exist_ok=True)
    if "--config" in words:
        file = Path(words[words.index("--config") + 1])
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(to_dict(make_run("ngpt", vocab_size=4096))), encoding="utf-8")
    run_command(words)


def test_the_readme_has_commands_for_everybody() -> None:
    assert len(BLOCKS) == 6
    assert [len(commands_in(text)) for kind, text in BLOCKS if kind == "sh"] == [2, 3, 3, 3]
    assert len(README.splitlines()) <= 150


def write_inputs(directory: Path) -> None:
    """The files that the README's pretraining lines take for granted."""
    documents = [json.dumps({"text": tiny.text(i, 60)}) for i in range(300)]
    (directory / "web.jsonl.gz").write_bytes(gzip.compress("\n".join(documents).encode()))
    (directory / "books.txt").write_text(tiny.text(300, 2000), encoding="utf-8")


def run_make(words: list[str]) -> None:
    """Ask make whether it knows the target; nothing is made."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_block_runs(
    tmp_path: Path, run_command: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one directory, the data first and Python last, since some blocks use what others make."""
    monkeypatch.chdir(tmp_path)
    for module in ("comparison", "sweep"):
        monkeypatch.setattr(f"spherelm.experiments.{module}.run_jobs", run_jobs_here)
    monkeypatch.setattr("spherelm.experiments.comparison.measure_cost", partial(measure_cost, steps=1, warmup=1))
    write_inputs(tmp_path)
    commands = [words for kind, text in BLOCKS if kind == "sh" for words in commands_in(text)]
    commands.sort(key=lambda words: words[1] != "data")
    for words in commands:
        if words[0] == "make":
            run_make(words)
        else:
            assert words[0] == "spherelm"
            run_command([str(word) for word in replaced(words, TINY[words[1]])])
    for kind, text in BLOCKS:
        if kind == "python":
            check_python_block(text)
    for file in ("paper/report.html", "paper/summary.json", "alpha/sweep.json", "mine/metrics.jsonl"):
        assert (tmp_path / "runs" / file).stat().st_size > 0


def run_jobs_here(jobs: list[Job], *rest: Any) -> list[float]:
    """`run_jobs` without the processes."""
    return [do_job(job) for job in jobs]


def check_python_block(text: str) -> None:
    """Execute it, a training loop with one batch, and look whether the model that it leaves is on the sphere."""
    tokens = torch.randint(257, (1, 9))
    names: dict[str, Any] = {"batches": [(tokens[:, :-1], tokens[:, 1:])]}
    exec(compile(text, "README.md", "exec"), names)
    assert departure(names["model"]) < 1e-6


@pytest.mark.slow
def test_the_readmes_loop_learns_more_than_gpt_in_it() -> None:
    """A new user's first comparison: the same loop, the same batches of the shipped text, the other arm's name."""
    (loop,) = (text for text in re.findall(r"```python\n(.*?)```", README, re.S) if "in batches" in text)
    assert loop.count("1000") == 2
    loop = loop.replace("1000", "100").replace("seq_len=256", "seq_len=128")
    losses = {}
    for arm in ("ngpt", "gpt"):
        torch.manual_seed(0)
        train, val = (Loader(open_tokens(shipped_directory(), split), 128, 8, seed=0) for split in ("train", "val"))
        names: dict[str, Any] = {"batches": [train.batch(i) for i in range(100)]}
        exec(compile(loop.replace('"ngpt"', f'"{arm}"'), "README.md", "exec"), names)
        assert isinstance(names["model"], NGPT if arm == "ngpt" else GPT)
        with torch.no_grad():
            losses[arm] = sum(names["model"].loss(*val.batch(i)).item() for i in range(8)) / 8
    assert losses["ngpt"] < losses["gpt"]


@pytest.mark.slow
def test_the_notebook_runs_and_ngpt_learns_as_well_as_gpt(tmp_path: Path) -> None:
    """As somebody opens it, from its first cell to its last; the kernel is the interpreter of this test."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert [cell for cell in notebook.cells if cell.get("outputs")] == []  # kept without what a run prints
    kernels = tmp_path / "kernels" / "python3"
    kernels.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    environment = {**os.environ, "JUPYTER_PATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    script = "import sys, nbclient, nbformat; notebook = nbformat.read(sys.argv[1], 4); "
    script += "nbclient.execute(notebook, timeout=600, kernel_name='python3'); nbformat.write(notebook, sys.argv[2])"
    words = [sys.executable, "-c", script, ROOT / "examples" / "quickstart.ipynb", tmp_path / "done.ipynb"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = "".join(
        output.get("text", "")
        for cell in nbformat.read(tmp_path / "done.ipynb", 4).cells
        for output in cell.get("outputs", ())
    )
    losses = re.search(r"GPT (\S+), nGPT (\S+) nats", printed)
    assert losses is not None
    assert float(losses[2]) <= float(losses[1])
    assert "departure from the sphere" in printed


def test_the_example_of_a_loop_of_your_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["own_loop.py", "--steps", "5"])
    runpy.run_path(str(ROOT / "examples" / "own_loop.py"), run_name="__main__")
    lines = re.findall(
        r"^step (\d+): loss (\S+) nats per token, off the sphere by (\S+)$", capsys.readouterr().out, re.M
    )
    assert [int(step) for step, _, _ in lines] == [1, 5]
    assert float(lines[1][1]) < float(lines[0][1])
    assert all(float(off) < 1e-6 for _, _, off in lines)


# ------------------------------------------------------------------------------------- the table of what is supported

SUPPORT = (ROOT / "docs" / "reference" / "support.md").read_text(encoding="utf-8")
SECTION = SUPPORT.partition("## Features")[2].partition("\n## ")[0]
ROWS = dict(re.findall(r"^\| ([A-Z][^|]*?) \| (.*) \|$", SECTION, re.MULTILINE))


@dataclass
class Row:
    """What a check may use: what stands in backticks in the row, and a place to work in."""

    names: list[str]
    tmp_path: Path


CHECKS: dict[str, Callable[[Row], None]] = {}


def check(title: str) -> Callable[[Callable[[Row], None]], Callable[[Row], None]]:
    """Registers a function as what keeps the row `title` true."""

    def register(function: Callable[[Row], None]) -> Callable[[Row], None]:
        CHECKS[title] = function
        return function

    return register


TESTED_ELSEWHERE = {
    "Derivatives": (
        "test_second_derivatives.py:test_hessian_vector_products_of_a_model",
        "test_second_derivatives.py:test_a_model_under_torch_func",
        "test_second_derivatives.py:test_preconditioned_logits_have_first_derivatives_alone",
        "layers/test_mamba2.py:test_the_kernel_refuses_second_derivatives",
    ),
    "Compilation": (
        "train/test_compiled.py:test_compiled_gradients_are_eager_gradients",
        "train/test_trainer.py:test_compiling_that_fails_is_said_and_changes_nothing",
    ),
    "Batches larger than memory": ("train/test_trainer.py:test_a_run_with_accumulation_is_the_run_without",),
    "Loss": ("layers/test_loss.py:test_the_logits_of_all_tokens_never_exist_at_once",),
    "Many processes": (
        "train/test_parallel.py:test_the_curve_is_that_of_one_process",
        "train/test_parallel.py:test_a_run_goes_on_over_other_numbers_of_processes",
        "train/test_parallel.py:test_a_process_that_is_lost_is_named",
        "train/test_kills.py:test_torchrun_restarts_a_run_that_lost_a_process",
    ),
    "Logs": (
        "train/test_sinks.py:test_a_resumed_run_is_told_whole_and_once",
        "train/test_sinks.py:test_a_process_with_sinks_ends_well_and_calls_nobody",
    ),
    "Data at scale": (
        "data/test_hub.py:test_workers_do_not_change_a_byte",
        "data/test_hub.py:test_resumed_equals_uninterrupted",
        "data/test_large_shards.py:test_reading_takes_no_memory",
        "data/test_mixture.py:test_ranks_together_are_one_process",
        "data/test_deduplication.py:test_only_the_first_of_equal_documents_stays",
        "models/test_document_mask.py:test_a_window_is_worth_its_documents",
    ),
    "Dry runs": (
        "train/test_estimate.py:test_memory_is_what_a_real_step_holds",
        "train/test_estimate.py:test_every_run_of_the_paper_can_be_told_beforehand",
    ),
    "Interruption": (
        "train/test_kills.py:test_killed_at_any_moment",
        "train/test_parallel.py:test_bad_updates_are_skipped_within_the_budget",
        "train/test_resume.py:test_a_signal_saves_at_the_next_step_and_resuming_changes_nothing",
        "train/test_signals.py:test_a_stopped_command_saves_and_goes_on_bitwise",
    ),
    "Tokenizers": (
        "data/test_tokenizer.py:test_sentencepiece_against_the_library",
        "data/test_tokenizer.py:test_hugging_face_name",
    ),
    "Downstream tasks": (
        "evaluate/test_harness.py:test_requests_are_the_harnesss_own",
        "evaluate/test_harness.py:test_an_untrained_model_guesses",
        "evaluate/test_eval_command.py:test_tasks_are_scored_in_training",
    ),
    "Perplexity over length": (
        "evaluate/test_lengths.py:test_all_lengths_score_the_same_tokens_once",
        "evaluate/test_positions.py:test_gpt_computes_what_llama_does",
    ),
    "Inside the models": (
        "report/test_inspection.py:test_every_figure_is_there_as_svg_and_as_png",
        "report/test_walk.py:test_the_slider_walks_from_stop_to_stop",
        "report/test_ladder.py:test_tasks_are_read_from_what_eval_wrote",
    ),
    "Generation": (
        "generation/test_generate.py:test_greedy_generation_is_argmax_of_the_full_forward_pass",
        "generation/test_folding.py:test_in_float32_folded_is_unfolded_within_1e_5",
        "generation/test_sampling.py:test_filters_keep_what_their_definitions_say",
        "generation/test_continuation.py:test_rows_of_any_lengths_are_computed_as_if_alone",
        "generation/test_continuation.py:test_a_sliding_window_goes_on_from_the_last_half",
        "train/test_samples.py:test_text_ends_before_a_stop_string",
        "train/test_samples.py:test_a_prompt_streams_to_the_terminal",
        "train/test_samples.py:test_a_file_of_prompts_as_json_lines",
        "train/test_samples.py:test_a_conversation_on_the_terminal",
    ),
    "Number formats for inference": (
        "train/test_samples.py:test_every_precision_writes_and_reports_its_departure",
        "interop/test_quantization.py:test_each_vector_is_rounded_to_steps_of_its_own",
    ),
    "Report": ("report/test_report.py:test_the_page_stands_alone",),
    "NVIDIA/ngpt checkpoints": (
        "interop/test_nvidia.py:test_logits_loss_and_every_gradient",
        "interop/test_nvidia.py:test_a_file_that_wants_to_run_code_is_refused_by_name",
    ),
    "Hugging Face transformers": (
        "interop/test_huggingface.py:test_logits_are_those_of_the_bare_model",
        "interop/test_huggingface.py:test_what_is_saved_is_loaded_bitwise",
    ),
}
"""What holds a row, or a part of it, at length: these tests must be there."""


def tokens_and_targets(vocab_size: int = tiny.VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(vocab_size, (2, 9))
    return tokens[:, :-1], tokens[:, 1:]


BUILT = [*((kind, {}) for kind in ARCHITECTURES), ("decoder", {"pattern": "AM", "mamba_d_head": 8})]
"""Every architecture that a model may have, and the fields that make it."""


def small(arm: str, kind: str = "decoder", **fields: Any) -> Decoder:
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "max_seq_len": 32}
    return build(make_config(arm, kind, vocab_size=tiny.VOCAB, **sizes, **fields))


def loss_of(model: Decoder) -> torch.Tensor:
    """Of one batch; where the model reads a source, it is longer than the target."""
    tokens, targets = tokens_and_targets()
    return model.loss(tokens, targets[:, -5:] if model.config.architecture.kind == "encdec" else targets)


@check("Models")
def models(row: Row) -> None:
    assert row.names == list(ARMS)
    for arm in ARMS:
        for kind, fields in BUILT:
            assert loss_of(small(arm, kind, **fields)).isfinite()
    assert [model_class(make_config(arm, vocab_size=9, n_layers=1, d_model=8, n_heads=1)) for arm in ARMS] == [
        GPT,
        NGPT,
    ]


def subcommands(arguments: list[str]) -> list[str]:
    """The commands that `spherelm ARGUMENTS --help` lists."""
    program = "import sys; from spherelm.cli import main; sys.argv[0] = 'spherelm'; main()"
    words = [sys.executable, "-c", program, *arguments, "--help"]
    usage = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(r"usage: [^{]*\{([\w,\s-]+)\}", usage)
    return [name.strip() for name in found[1].split(",")] if found else []


@check("Commands")
def commands(row: Row) -> None:
    groups = {name.split()[0] for name in row.names if " " in name}
    there = {name for name in subcommands([]) if name not in groups}
    there |= {f"{group} {name}" for group in groups for name in subcommands([group])}
    assert set(row.names) == there


@check("Recipes")
def recipes(row: Row) -> None:
    assert row.names == list(WAYS)
    assert f" {len(ABLATIONS)} ablations" in ROWS["Recipes"]


@check("Sizes")
def sizes(row: Row) -> None:
    assert row.names == list(PRESETS)


@check("Schedules")
def schedules(row: Row) -> None:
    assert row.names == list(get_args(get_type_hints(ScheduleConfig)["kind"]))


@check("Optimizers")
def optimizers(row: Row) -> None:
    model = small("ngpt")
    groups = build_optimizer(model, OptimConfig(lr=1e-3)).param_groups
    assert {group["role"] for group in groups} == {"input_embedding", "output_embedding", "matrix", "scale"}
    for optimizer_class in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad):
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        handle = attach_retraction(optimizer, model)
        model.loss(*tokens_and_targets()).backward()
        optimizer.step()
        assert departure(model) < 1e-6
        handle.remove()
    assert all(hasattr(spherelm, name) for name in row.names)


@check("Attention")
def attention(row: Row) -> None:
    assert row.names == ["n_kv_heads"]
    for arm in ARMS:
        for kind, fields in BUILT:
            model = small(arm, kind, n_kv_heads=2, **fields)
            assert model.blocks[0].attention.part.k.weight.shape == (8, 16)
            assert loss_of(model).isfinite()


@check("Embeddings")
def embeddings(row: Row) -> None:
    assert row.names == ["tie_embeddings"]
    for arm in ARMS:
        for kind, fields in BUILT:
            apart = small(arm, kind, **fields)
            assert apart.head.linear.weight is not apart.embed.weight
            if kind != "encoder":  # whose input has a row more than its output
                tied = small(arm, kind, tie_embeddings=True, **fields)
                assert tied.head.linear.weight is tied.embed.weight


@check("Number formats")
def number_formats(row: Row) -> None:
    assert set(row.names) == {*get_args(get_type_hints(TrainConfig)["dtype"])} - {"auto"}
    model = small("ngpt")
    model.runtime.compute_dtype = torch.bfloat16
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    assert model(tokens_and_targets()[0]).dtype == torch.bfloat16
    model.loss(*tokens_and_targets()).backward()
    optimizer.step()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in moments} == {torch.float32}


@check("Input files")
def input_files(row: Row) -> None:
    zstandard, pyarrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert set(row.names) == {*SUFFIXES, *COMPRESSIONS, "--field"}
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    compress[".zst"] = zstandard.ZstdCompressor().compress
    content = {".jsonl": '{"body": "%s"}', ".json": '[{"body": "%s"}]', ".csv": "body\n%s"}
    (row.tmp_path / "in").mkdir()
    for kind in set(SUFFIXES) - {".parquet"}:
        for ending, squeeze in compress.items():
            text = content.get(kind, "%s") % (f"{kind} {ending} " * 20)
            (row.tmp_path / "in" / f"input{kind}{ending}").write_bytes(squeeze(text.encode()))
    parquet.write_table(pyarrow.table({"body": ["rows and columns"]}), row.tmp_path / "in" / "input.parquet")
    pattern = row.tmp_path / "in" / "*.parquet"
    manifest = prepare([row.tmp_path / "in", pattern], row.tmp_path / "out", "bytes", rows=Rows("body"))
    assert manifest["splits"]["train"]["documents"] == 5 * 5 + 2


@check("Tokenizers")
def tokenizers(row: Row) -> None:
    assert row.names == ["default", "bytes", "tokenizer.json", ".model"]
    default = load_tokenizer("default")
    assert (default.vocab_size, load_tokenizer("bytes").vocab_size) == (4096, 257)
    default.save(row.tmp_path)
    assert load_tokenizer(row.tmp_path / "tokenizer.json").encode("hello") == default.encode("hello")


@check("Generation")
def generation(row: Row) -> None:
    prompt, model = tokens_and_targets()[0], small("ngpt")
    assert generate(model, prompt, 4, temperature=0.7, top_k=9, top_p=0.9, seed=0).shape == (2, 12)


@check("Translation")
def translation(row: Row) -> None:
    model = small("ngpt", "encdec")
    found = beam_search(model, [[1, 2], [3]], 6, 256, BeamSettings(2))
    scores = translation_scores(["a b c d"], [["a b c d"]])
    assert [len(hypotheses) for hypotheses in found] == [2, 2]
    assert {"bleu", "chrf", "word_error_rate"} < scores.keys()


@check("Number formats for inference")
def inference_formats(row: Row) -> None:
    assert set(PRECISIONS) <= set(row.names)


@check("Derivatives")
def derivatives(row: Row) -> None:
    for arm in ARMS:
        model = small(arm)
        weight = model.blocks[0].mlp.part.u.weight
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(loss_of(model), weight, create_graph=True)
            (product,) = torch.autograd.grad((gradient * torch.randn_like(gradient)).sum(), weight)
        assert product.isfinite().all()
        assert product.abs().max() > 0


@check("Batches larger than memory")
def accumulation(row: Row) -> None:
    assert row.names == ["--micro-batch-size"]
    data = tiny.make_data(row.tmp_path)
    losses = [
        train(
            tiny.run_config("ngpt", data, steps=2, micro_batch_size=size), row.tmp_path / str(size), show_progress=False
        )
        for size in (1, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@check("Logs")
def logs(row: Row) -> None:
    assert {*SINKS, "metrics.jsonl", "--log-to"} == set(row.names)


@check("Dry runs")
def dry_runs(row: Row) -> None:
    for arm in ARMS:
        told = estimate(make_run(arm, "0.5b-1k", "paper"), Layout(world_size=64), epochs={"a text": 2.0})
        assert {"parameters", "memory_per_device", "fits", "epochs", "flops", "hours", "model", "optim"} <= told.keys()


@check("Hugging Face transformers")
def transformers_models(row: Row) -> None:
    pytest.importorskip("transformers")
    from spherelm.interop.huggingface import to_hf

    for arm in ARMS:
        model, tokens = small(arm), tokens_and_targets()[0]
        torch.testing.assert_close(to_hf(model)(tokens).logits, model(tokens), rtol=0, atol=1e-5)


@check("Platforms")
def platforms(row: Row) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in project
    assert all(f"Operating System :: {name}" in project for name in ("MacOS", "POSIX :: Linux"))


@pytest.mark.parametrize("title", sorted({*ROWS, *CHECKS, *TESTED_ELSEWHERE}))
def test_what_is_supported(title: str, tmp_path: Path) -> None:
    assert title in ROWS, f"the check of {title!r} has no row"
    assert title in CHECKS or title in TESTED_ELSEWHERE, f"the row {title!r} has no check: write one, or take it out"
    assert [test for test in TESTED_ELSEWHERE.get(title, ()) if not exists(test)] == []
    if title in CHECKS:
        CHECKS[title](Row(re.findall(r"`([^`]+)`", ROWS[title]), tmp_path))
