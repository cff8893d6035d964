"""One run over several processes is the run over one, ends well, and says which process it lost."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import ranks
import tiny
import torch
from old_files import rename_checkpoint

from spherelm import departure, load_model
from spherelm.optim import OptimConfig, build_optimizer
from spherelm.runs.checkpoint import latest_checkpoint, load_checkpoint
from spherelm.runs.metrics import read_metrics
from spherelm.sharding import cut

pytestmark = pytest.mark.slow
SPREADS = {
    "replicate-2": (2, ("--strategy", "replicate")),
    "shard-2": (2, ("--strategy", "shard", "--recompute")),
    "shard-4": (4, ("--strategy", "shard", "--micro-batch-size", "1")),
    "hybrid-4": (4, ("--strategy", "hybrid", "--shard-size", "2")),
}
CURVES = [*(("ngpt", name) for name in SPREADS), ("gpt", "shard-2")]
"""The baseline has no part that nGPT does not have, nor weights that are cut in another way."""
STEPS = 20


def arguments(arm: str, out: Path, data: Path, *more: str, steps: int = STEPS) -> list[str]:
    """A tiny run, at a rate at which both arms learn without leaping."""
    text = ["train", "--arm", arm, "--out", str(out), "--data", str(data), "--steps", str(steps), "--seq-len", "16"]
    text += ["--batch-size", "8", "--no-compile", "--lr", "0.002", "--eval-every", "10", "--keep", "9"]
    shape = ["--set", "n_layers=2", "d_model=16", "n_heads=2", "d_ff=24", "eval_windows=7"]
    return [*map(str, commands.replaced([*text, "--dtype", "float32"], more)), *shape]


AT_STEP = """
import os, signal, time
from spherelm.train import parallel, trainer

parallel.ANSWER_SECONDS = 1.0
gradients = trainer.gradients_of_batch

def at_step(model, loader, step, *rest):
    loss = gradients(model, loader, step, *rest)
    if rank == 1 and step + 1 in {steps}:
        {action}
    return loss

trainer.gradients_of_batch = at_step
"""
DROP = """
import pathlib, shutil
for checkpoint in pathlib.Path({run!r}, "checkpoints").iterdir():
    if int(checkpoint.name.removeprefix("step-")) > {last}:
        shutil.rmtree(checkpoint)
"""
"""As if a run had been cut off before its later checkpoints."""

IN_VALIDATION = """
import itertools, signal
from spherelm.evaluate import perplexity

model_loss, calls = perplexity.separate_documents, itertools.count(1)

def noted(*batch):
    if rank == 1 and next(calls) == 3:  # of two a validation
        signal.raise_signal(signal.SIGTERM)
    return model_loss(*batch)

perplexity.separate_documents = noted
"""
SMALL_PARTS = ("--micro-batch-size", "2", "--resume")
SKIPPING = ("--on-bad-step", "skip", "--skip-budget", "2")
NAN = "loss = loss * float('nan')"
NO_TEXT_ON_ONE = """
from spherelm.errors import UserError
from spherelm.train import checks

def no_text(*_):
    raise UserError("no text here")

if rank == 1:
    checks.open_data = no_text
"""
REFUSED = {
    "uneven": ("--batch-size", "7"),
    "three": ("--strategy", "hybrid", "--shard-size", "3"),
    "no-text": ("--data", "/nowhere"),
    "tasks": ("--eval-tasks", "arc_easy", "--task-data", "/nowhere"),
    "in-use": ("--resume",),
}
IN_USE = """
import fcntl, pathlib, sys
pathlib.Path({run!r}).mkdir(parents=True)
sys.held = open(pathlib.Path({run!r}, ".lock"), "a")
fcntl.flock(sys.held, fcntl.LOCK_EX)
"""
"""As if another run were in the directory."""


def spread_jobs(root: Path, data: Path) -> dict[str, ranks.Job]:
    """One run over each number of processes, in float32, and over two in bfloat16."""
    jobs = {f"{arm}-alone": ranks.Job(1, arguments(arm, root / f"{arm}-alone", data)) for arm in tiny.ARMS}
    for arm, name in CURVES:
        processes, flags = SPREADS[name]
        jobs[f"{arm}-{name}"] = ranks.Job(processes, arguments(arm, root / f"{arm}-{name}", data, *flags))
    sharded = ("--strategy", "shard")
    gathered = (*sharded, "--gather", "bfloat16")
    for name, processes, flags in (("one", 1, ()), ("two", 2, sharded), ("gathered", 2, gathered)):
        given = arguments("ngpt", root / f"ngpt-bf16-{name}", data, "--dtype", "bfloat16", *flags, steps=10)
        jobs[f"ngpt-bf16-{name}"] = ranks.Job(processes, given)
    return jobs


def moved_jobs(root: Path, data: Path) -> dict[str, ranks.Job]:
    """A run over one process, cut off, gone on with over two, cut off again, and over one."""
    run, flags = root / "ngpt-moved", ("--save-every", "4", "--strategy", "shard", "--resume")
    given = arguments("ngpt", run, data, *flags, steps=STEPS)
    jobs = {"ngpt-moved": ranks.Job(1, given)}
    for processes, last in ((2, 8), (1, 16)):
        jobs[f"ngpt-moved-{processes}"] = ranks.Job(processes, given, prepare=DROP.format(run=str(run), last=last))
    return jobs


def disturbed_jobs(root: Path, data: Path) -> dict[str, ranks.Job]:
    """Two processes, of which the second does something after computing gradients."""

    def job(name: str, action: str, *flags: str, steps: tuple[int, ...] = (3,)) -> ranks.Job:
        given = arguments("ngpt", root / name, data, "--save-every", "2", *flags, steps=6)
        return ranks.Job(2, given, AT_STEP.format(action=action, steps=steps))

    jobs = {
        "killed": job("killed", "os.kill(os.getpid(), signal.SIGKILL)", steps=(5,)),
        "hung": job("hung", "time.sleep(12); os._exit(9)", "--timeout", "4", steps=(5,)),
    }
    jobs |= {name: job(name, f"signal.raise_signal(signal.{name})") for name in ("SIGUSR1", "SIGTERM")}
    for strategy in ("replicate", "shard"):
        given = arguments("ngpt", root / f"{strategy}-measuring", data, *SMALL_PARTS, "--strategy", strategy)
        jobs[f"{strategy}-measuring"] = ranks.Job(2, given, IN_VALIDATION)
        jobs[f"ngpt-{strategy}-measured"] = ranks.Job(2, given)
    jobs |= {"nan": job("nan", NAN), "skipped": job("skipped", NAN, *SKIPPING, steps=(3, 5))}
    jobs["over"] = job("over", NAN, *SKIPPING, steps=(3, 4, 5))
    for name, flags in REFUSED.items():
        prepare = IN_USE.format(run=str(root / name)) if name == "in-use" else ""
        jobs[name] = ranks.Job(2, arguments("ngpt", root / name, data, *flags), prepare=prepare)
    jobs["unreadable"] = ranks.Job(2, arguments("ngpt", root / "unreadable", data, "--lr", "fast"))
    jobs["one"] = ranks.Job(2, arguments("ngpt", root / "one", data), NO_TEXT_ON_ONE)
    return jobs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are."""
    return tmp_path_factory.mktemp("spread")


AllEnded = dict[str, list[ranks.Ended]]


@pytest.fixture(scope="module")
def ended(data: Path, root: Path) -> AllEnded:
    """The result of every run of this file, by name."""
    jobs = disturbed_jobs(root, data) | spread_jobs(root, data) | moved_jobs(root, data)
    return dict(zip(jobs, ranks.run_ranks(list(jobs.values()), root / "err"), strict=True))


def losses(run: Path) -> list[tuple[str, int, float]]:
    return [(record["kind"], record["step"], record["loss"]) for record in read_metrics(run / "metrics.jsonl")]


def assert_close(ours: Path, theirs: Path, tolerance: float) -> None:
    """The same records, and losses within `tolerance` relative."""
    one, other = losses(ours), losses(theirs)
    assert [record[:2] for record in one] == [record[:2] for record in other]
    assert [record[2] for record in one] == pytest.approx([record[2] for record in other], rel=tolerance)


@pytest.fixture(scope="module")
def runs(ended: AllEnded, root: Path) -> Path:
    """Where the runs are, all of which must have ended with code zero that nobody disturbed.

    Processes that part in the wrong order abort when all their work is done, some of the time.
    """
    for name, of_job in ended.items():
        if name.startswith(tiny.ARMS):
            assert [rank.code for rank in of_job] == [0] * len(of_job), (name, [rank.err for rank in of_job])
    return root


@pytest.mark.row("Many processes")
@pytest.mark.parametrize(("arm", "spread"), CURVES)
def test_the_curve_is_that_of_one_process(arm: str, spread: str, runs: Path) -> None:
    """In training and validation, whose 7 windows no number of processes here divides."""
    assert_close(runs / f"{arm}-{spread}", runs / f"{arm}-alone", 1e-5)


@pytest.mark.parametrize(("arm", "spread"), CURVES)
def test_the_weights_are_those_of_one_process(arm: str, spread: str, runs: Path) -> None:
    """Read by one process, whatever number wrote them."""
    ours, theirs = load_model(runs / f"{arm}-{spread}"), load_model(runs / f"{arm}-alone")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-3 * max(1.0, float(b.detach().abs().max())), name
    assert departure(ours) < 1e-6


def test_every_process_writes_its_part(runs: Path) -> None:
    checkpoint = latest_checkpoint(runs / "ngpt-shard-4")
    assert checkpoint is not None
    names = {path.name for path in checkpoint.iterdir()}
    expected = {f"{part}-0000{rank}-of-00004.safetensors" for part in ("model", "optimizer") for rank in (1, 2, 3, 4)}
    assert names == {*expected, "state.json"}
    sizes = [(checkpoint / name).stat().st_size for name in expected if name.startswith("optimizer")]
    assert max(sizes) < 1.5 * min(sizes)


def test_the_parts_of_version_0_1_0_are_read(runs: Path, tmp_path: Path) -> None:
    """Written by four processes: weights and moments, under the names of then."""
    checkpoint = latest_checkpoint(runs / "ngpt-shard-4")
    assert checkpoint is not None
    old = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    rename_checkpoint(old)
    found = []
    for path in (checkpoint, old):
        model = load_model(runs / "ngpt-alone")
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
        load_checkpoint(path, model, optimizer)
        found.append([*model.parameters(), *(v for p in model.parameters() for v in optimizer.state[p].values())])
    assert len(found[0]) > 2 * len(list(model.parameters())), "moments too"
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_bfloat16_is_close(runs: Path) -> None:
    """Weights and sums over processes are float32 there too; what differs is how rounded products add up."""
    assert_close(runs / "ngpt-bf16-two", runs / "ngpt-bf16-one", 2e-3)


def test_weights_may_travel_in_bfloat16(runs: Path) -> None:
    """Matrices are rounded to it for their products anyway, scales and gains are not; master weights stay float32."""
    assert_close(runs / "ngpt-bf16-gathered", runs / "ngpt-bf16-two", 2e-3)
    one, other = (load_model(runs / f"ngpt-bf16-{name}").state_dict() for name in ("gathered", "two"))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    assert departure(load_model(runs / "ngpt-bf16-gathered")) < 1e-6


@pytest.mark.row("Many processes")
def test_a_run_goes_on_over_other_numbers_of_processes(runs: Path) -> None:
    """One, two, one: model, moments, place in the text and metrics go with it."""
    assert_close(runs / "ngpt-moved", runs / "ngpt-alone", 1e-5)


@pytest.mark.row("Many processes")
@pytest.mark.parametrize(("name", "code"), [("killed", -9), ("hung", 9)])
def test_a_process_that_is_lost_is_named(name: str, code: int, ended: AllEnded, root: Path) -> None:
    """The others do not wait forever."""
    first, second = ended[name]
    assert second.code == code
    assert first.code == 3, first.err
    assert "rank 0 could not reach the others" in first.err
    assert "ranks that no longer answer (killed, hung, or their machine lost): 1;" in first.err
    assert "Traceback" not in first.err
    saved = latest_checkpoint(root / name)
    assert saved is not None, "the one that was being written when another was begun"


def test_a_process_whose_loss_is_no_number_is_named(ended: AllEnded) -> None:
    first, second = ended["nan"]
    assert (first.code, second.code) == (1, 1)
    assert "the loss is nan at step 3 on rank 1 (peak learning rate 0.002)" in first.err
    assert "the loss is" not in second.err, "one says why"


@pytest.mark.row("Interruption")
def test_bad_updates_are_skipped_within_the_budget(ended: AllEnded, root: Path) -> None:
    assert [rank.code for rank in ended["skipped"]] == [0, 0], ended["skipped"][0].err
    records = read_metrics(root / "skipped" / "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in records if r["kind"] in ("train", "skip")] == [
        *(("train", 1), ("train", 2), ("skip", 3), ("train", 4), ("skip", 5), ("train", 6)),
    ]
    assert next(r["reason"] for r in records if r["kind"] == "skip") == "the loss is nan at step 3 on rank 1"
    assert [rank.code for rank in ended["over"]] == [1, 1]
    assert "at step 5 on rank 1, and all 2 updates that may be skipped were skipped" in ended["over"][0].err
    assert read_metrics(root / "over" / "metrics.jsonl")[-1]["kind"] == "stop"


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 138), ("SIGTERM", 143)])
def test_a_signal_to_one_saves_and_ends_all(name: str, code: int, ended: AllEnded, root: Path) -> None:
    first, second = ended[name]
    assert [first.code, second.code] == [code, code]
    saved = latest_checkpoint(root / name)
    assert saved is not None
    assert saved.name == "step-00000003"
    assert (
        f"spherelm: {name}: saved {root / name} at step 3; resume with: spherelm train --resume {root / name}"
        in first.err
    )
    assert "spherelm:" not in second.err


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_a_signal_in_the_validation_of_one_saves_and_ends_all(strategy: str, runs: Path, ended: AllEnded) -> None:
    """And the run that goes on from there is the undisturbed one."""
    first, second = ended[f"{strategy}-measuring"]
    assert [first.code, second.code] == [143, 143], first.err
    assert (
        f"SIGTERM: saved {runs / f'{strategy}-measuring'} at step 10; resume with: spherelm train --resume "
        in first.err
    )
    assert_close(runs / f"{strategy}-measuring", runs / "ngpt-alone", 1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uneven", "batch_size=7 cannot be shared by 2 processes: choose a multiple of 2"),
        ("three", "--shard-size 3 does not divide the 2 processes"),
        ("no-text", "/nowhere"),
        ("tasks", "--eval-tasks is for runs of one process"),
        ("in-use", "in-use is in use by another process: wait until that ends"),
        ("one", "spherelm: rank 1: no text here"),
    ],
)
def test_what_cannot_be_is_said_once(name: str, message: str, ended: AllEnded, root: Path) -> None:
    assert [rank.code for rank in ended[name]] == [2, 2], [rank.err for rank in ended[name]]
    said = [[line for line in rank.err.splitlines() if line.startswith("spherelm: ")] for rank in ended[name]]
    assert [len(lines) for lines in said] == [1, 0], said
    assert message in said[0][0]
    assert "Traceback" not in ended[name][0].err + ended[name][1].err
    assert not (root / name / "metrics.jsonl").exists()


def test_a_command_that_cannot_be_read_is_said_once(ended: AllEnded) -> None:
    first, second = ended["unreadable"]
    assert [first.code, second.code] == [2, 2]
    assert "--lr" in first.err
    assert second.err == ""


def test_torchrun_shows_one_reason(data: Path, tmp_path: Path) -> None:
    """It ends all processes as soon as one has ended, whether that has said why or not."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.01"]
    start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "spherelm"]
    words = [*start, *arguments("ngpt", tmp_path / "run", data), "--batch-size", "7"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert len([line for line in done.stderr.splitlines() if line.startswith("spherelm: ")]) == 1, done.stderr
    assert {int(code) for code in re.findall(r"exitcode *: *(-?\d+)", done.stderr)} == {2}, done.stderr


@pytest.mark.parametrize(
    ("shape", "unit_axis", "parts", "axis"),
    [
        ((8, 6), 1, 2, 0),
        ((7, 6), 1, 2, 0),
        ((8, 6), 0, 2, 1),
        ((8, 7), 0, 2, 0),
        ((8, 6), None, 2, 0),
        ((4, 10, 6), 2, 2, 0),
        ((4, 6, 10), 1, 2, 0),
        ((5, 10, 6), 2, 2, 1),
        ((5, 6, 10), 1, 2, 2),
        ((5, 9, 6), 2, 2, 0),
        ((5, 6), None, 2, 0),
    ],
)
def test_weights_are_cut_between_unit_vectors(
    shape: tuple[int, ...], unit_axis: int | None, parts: int, axis: int
) -> None:
    """Rows, columns, banks of rows and of columns; where nothing divides evenly, along the first axis,
    as torch wants it.
    """
    assert cut(torch.Size(shape), unit_axis, parts).dim == axis
