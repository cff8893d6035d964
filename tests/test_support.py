"""The table of what goes with which kind of model (docs/reference/support.md): each cell names the tests that hold it."""

from __future__ import annotations

import re
from pathlib import Path

import commands
import pytest
import tiny
import tiny_pairs
from test_docs import ROOT, exists

from spherelm.train.trainer import train

PAGE = (ROOT / "docs" / "reference" / "support.md").read_text(encoding="utf-8")
KINDS = ("decoders", "encoder-decoders", "encoders", "hybrids")
TESTS = {
    "`train`, `--resume` to the bit": (
        "train/test_resume.py:test_resuming_after_a_crash_changes_nothing",
        "train/test_pairs_run.py:test_a_resumed_run_ends_where_an_uninterrupted_one_does",
        "train/test_masked_run.py:test_a_run_learns_and_goes_on_bitwise",
        "train/test_hybrid_run.py:test_a_resumed_run_ends_where_an_uninterrupted_one_does",
    ),
    "many processes: FSDP2, copies, recomputation": (
        "train/test_parallel.py:test_the_curve_is_that_of_one_process",
        "train/test_spread.py:test_two_processes_train_the_model_that_one_does",
        "train/test_spread.py:test_two_processes_train_the_model_that_one_does",
        "train/test_spread.py:test_two_processes_train_the_model_that_one_does",
    ),
    "`--dry-run`": (
        "train/test_estimate.py:test_operations_are_those_of_a_real_step",
        "train/test_estimate.py:test_operations_of_an_encoder_decoder_are_those_of_a_real_step",
        "train/test_masked_run.py:test_operations_are_those_of_a_real_step",
        "train/test_hybrid_run.py:test_operations_are_those_of_a_real_step",
    ),
    "documents kept apart (`--mask-documents`)": (
        "models/test_document_mask.py:test_a_window_is_worth_its_documents",
        "train/test_pairs_run.py:test_arms_and_data_must_belong_together",
        "train/test_masked_run.py:test_separate_documents_are_refused",
        "models/test_hybrid.py:test_documents_in_a_row_are_worth_what_they_are_alone",
    ),
    "`generate` with a cache, beams, `--window`": (
        "generation/test_continuation.py:test_a_sliding_window_goes_on_from_the_last_half",
        "models/test_encoder_decoder.py:test_cached_decoding_is_the_full_forward_pass",
        "train/test_masked_run.py:test_commands_about_models_that_write_say_so_in_one_line",
        "models/test_hybrid.py:test_rows_of_any_length_go_on_as_they_would_alone",
    ),
    "`eval --tasks`, `--perplexity`": (
        "evaluate/test_eval_command.py:test_tasks_are_scored",
        "test_support.py:test_an_encoder_decoder_is_not_scored_as_a_language_model",
        "train/test_masked_run.py:test_commands_about_models_that_write_say_so_in_one_line",
        "test_support.py:test_a_hybrid_run_is_written_with_measured_exported_and_inspected",
    ),
    "`inspect`": (
        "report/test_inspection.py:test_every_figure_is_there_as_svg_and_as_png",
        "report/test_inspection.py:test_encoder_decoders_are_looked_into_as_they_read_their_own_source",
        "train/test_masked_run.py:test_commands_about_models_that_write_say_so_in_one_line",
        "test_support.py:test_a_hybrid_run_is_written_with_measured_exported_and_inspected",
    ),
    "`export`, `from_pretrained`, transformers' `generate`": (
        "interop/test_huggingface.py:test_what_is_saved_is_loaded_bitwise",
        "interop/test_huggingface_seq2seq.py:test_an_exported_run_translates",
        "train/test_masked_run.py:test_commands_about_models_that_write_say_so_in_one_line",
        "interop/test_huggingface_hybrid.py:test_generate_is_ours",
    ),
}
NO = {
    ("documents kept apart (`--mask-documents`)", "encoder-decoders"),
    ("`eval --tasks`, `--perplexity`", "encoder-decoders"),
    ("documents kept apart (`--mask-documents`)", "encoders"),
    ("`generate` with a cache, beams, `--window`", "encoders"),
    ("`eval --tasks`, `--perplexity`", "encoders"),
    ("`inspect`", "encoders"),
    ("`export`, `from_pretrained`, transformers' `generate`", "encoders"),
}
"""What is refused; the tests named above for these cells say so."""


def table() -> dict[str, list[str]]:
    """The cells of each row."""
    _, found = PAGE.split(f"| | {' | '.join(KINDS)} |\n|---|---|---|---|---|\n")
    rows = re.match(r"(\|.*\|\n)+", found)
    assert rows is not None
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[0].splitlines()]
    return {first: rest for first, *rest in cells}


def test_every_cell_is_what_its_test_says() -> None:
    assert table() == {row: ["no" if (row, kind) in NO else "yes" for kind in KINDS] for row in TESTS}
    assert [test for tests in TESTS.values() for test in tests if not exists(test)] == []


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> commands.Command:
    return commands.make_command(monkeypatch, capsys)


def test_an_encoder_decoder_is_not_scored_as_a_language_model(command: commands.Command, tmp_path: Path) -> None:
    data = tiny_pairs.make_pairs(tmp_path)
    train(tiny_pairs.run_config("ngpt", data, steps=1), tmp_path / "run", show_progress=False)
    for flags in (["--tasks", "arc_easy", "--task-data", tmp_path], ["--perplexity", data / "pairs.json"]):
        answer = command("eval", tmp_path / "run", *flags)
        assert answer.code == 2
        assert "is an encoder-decoder, which is measured by --translate" in answer.err


def test_a_hybrid_run_is_written_with_measured_exported_and_inspected(
    command: commands.Command, tmp_path: Path, shared: Path
) -> None:
    """By the commands that there are for language models."""
    run, data = tmp_path / "run", tiny.make_data(tmp_path)
    sizes = [
        "d_model=16",
        "n_heads=2",
        "d_ff=24",
        "pattern=MA-O",
        "mamba_d_head=8",
        "mamba_d_state=4",
        "eval_windows=4",
    ]
    length = ["--steps", 2, "--seq-len", 128, "--batch-size", 2, "--dtype", "float32"]
    assert (
        command(
            "train", "--arm", "ngpt", "--preset", "hybrid", "--out", run, "--data", data, *length, "--set", *sizes
        ).code
        == 0
    )
    prompt = ["--prompt", "ba", "--max-new-tokens"]
    for flags in (
        [*prompt, 5],
        [*prompt, 5, "--beams", 2],
        [*prompt, 130, "--window"],
        [*prompt, 5, "--dtype", "bfloat16"],
    ):
        answer = command("generate", run, *flags)
        assert answer.code == 0, answer.err
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(5, 200))
    answer = command("eval", run, "--perplexity", text, "--lengths", "32,256", "--document-tokens", 512)
    assert answer.code == 0, answer.err
    pytest.importorskip("lm_eval")
    answer = command("eval", run, "--tasks", "winogrande", "--task-data", shared / "data/evals", "--limit", 2)
    assert answer.code == 0, answer.err
    assert command("export", run, tmp_path / "exported").code == 0
    assert "`MA-O`" in (tmp_path / "exported" / "README.md").read_text()
    pytest.importorskip("matplotlib")
    answer = command("inspect", run, "--out", tmp_path / "inside", "--sentence", "ba", "--tokens", 256, "--no-images")
    assert answer.code == 0, answer.err
