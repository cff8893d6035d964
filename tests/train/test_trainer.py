"""The loop: what a batch, a step, a validation and a whole run do, and how a run that cannot go on ends."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from spherelm import departure
from spherelm.data.loader import Loader, validation_windows
from spherelm.data.shards import open_tokens
from spherelm.models import build
from spherelm.optim import build_optimizer, factor
from spherelm.recipes.law import CONSTANTS
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.runs.group import Group
from spherelm.runs.metrics import read_metrics
from spherelm.train import diagnostics
from spherelm.train import trainer as module
from spherelm.train.batches import epochs
from spherelm.train.guard import Diverged
from spherelm.train.parallel import distributed
from spherelm.train.precision import compile_blocks
from spherelm.train.signals import Interrupted
from spherelm.train.trainer import Trainer, clip_gradients, train
from spherelm.train.update import gradients_of_batch

MakeTrainer = Callable[..., Trainer]
both_arms = pytest.mark.parametrize("arm", tiny.ARMS)


def gradients(arm: str, data: Path, micro_batch_size: int | None, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Loss and all gradients of the first batch, in one row."""
    torch.manual_seed(0)
    model = build(tiny.run_config(arm, data).model).to(dtype)
    loader = Loader(open_tokens(data, "train"), 16, 4, seed=0)
    loss = gradients_of_batch(distributed(model, Group()), loader, 0, micro_batch_size)
    return loss.sum().item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@both_arms
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_accumulated_gradients_are_those_of_one_batch(
    arm: str, size: int, dtype: torch.dtype, tolerance: float, data: Path
) -> None:
    loss, one = gradients(arm, data, None, dtype)
    parts_loss, parts = gradients(arm, data, size, dtype)
    assert parts_loss == pytest.approx(loss, rel=tolerance)
    assert (parts - one).abs().max() <= tolerance * one.abs().max()


@pytest.mark.row("Batches larger than memory")
@both_arms
def test_a_run_with_accumulation_is_the_run_without(arm: str, data: Path, tmp_path: Path) -> None:
    for name, size in (("one", None), ("parts", 2)):
        train(tiny.run_config(arm, data, micro_batch_size=size), tmp_path / name, show_progress=False)
    one, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "parts"))
    for a, b in zip(one, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@both_arms
def test_the_loop_is_the_plain_one(arm: str, trainer: MakeTrainer, data: Path) -> None:
    """Against ten lines written anew from the pieces:
    batches in order, clipping, the schedule's rate, one update each.
    """
    run = trainer(arm, steps=4)
    run.run(show_progress=False)
    config = run.config
    torch.manual_seed(config.train.seed)
    model = build(config.model)
    optimizer = build_optimizer(model, config.optim)
    loader = Loader(open_tokens(data, "train"), config.train.seq_len, config.train.batch_size, config.train.seed)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * group["lr_multiplier"] * factor(config.schedule, step, 4)
        optimizer.zero_grad()
        model.loss(*loader.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for (name, ours), theirs in zip(run.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.row("Number formats")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ngpt_is_on_the_sphere_after_every_step(dtype: str, trainer: MakeTrainer) -> None:
    run = trainer("ngpt", dtype=dtype, batch_size=2, lr=0.1)
    departures = [departure(run.model)]
    update = run._update

    def watched(step: int, lr: float) -> Any:
        result = update(step, lr)
        departures.append(departure(run.model))
        return result

    run._update = watched  # type: ignore[method-assign]
    run.run(show_progress=False)
    assert len(departures) == 7
    assert max(departures) < 1e-6
    moments = [moment for state in run.optimizer.state.values() for moment in state.values()]
    assert {tensor.dtype for tensor in (*run.model.parameters(), *moments)} == {torch.float32}


@both_arms
def test_bfloat16_computes_in_bfloat16_and_learns_alike(arm: str, data: Path, tmp_path: Path) -> None:
    losses = {
        dtype: train(tiny.run_config(arm, data, dtype=dtype, batch_size=2), tmp_path / dtype, show_progress=False)
        for dtype in ("float32", "bfloat16")
    }
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.01)


def test_clipping_scales_the_whole_gradient_down_and_never_up() -> None:
    model = torch.nn.Linear(3, 2)
    for limit, expected in ((2.0, 2.0), (100.0, 10.0), (None, 10.0)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 10 / math.sqrt(8))
        assert clip_gradients(model, limit).item() == pytest.approx(10)
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert grads.norm().item() == pytest.approx(expected, rel=1e-5)


def test_metrics_hold_what_is_documented(trainer: MakeTrainer, tmp_path: Path) -> None:
    loss = trainer(steps=5).run(show_progress=False)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    common = {"kind", "step", "tokens", "seconds", "loss"}
    assert [(r["kind"], r["step"]) for r in records] == [
        ("val", 0), ("train", 1), ("train", 2), ("val", 2), ("train", 3), ("train", 4), ("val", 4), ("train", 5), ("val", 5),
    ]  # fmt: skip
    for record in records:
        extra = (
            {"bits_per_byte"}
            if record["kind"] == "val"
            else {"lr", "grad_norm", "tokens_per_second", "mfu", "memory_mb", "threads"}
        )
        assert set(record) == common | extra
        assert record["tokens"] == record["step"] * 4 * 16
        assert all(isinstance(value, int | float) for key, value in record.items() if key != "kind")
    assert records[-1]["loss"] == loss
    # Bytes are the tokens here, but for the one end token that each text has.
    assert records[-1]["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=2e-3)
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    rates = [record["lr"] for record in records if record["kind"] == "train"]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1e-2


def test_mfu_is_never_above_one(trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the product at the start reached: an update that is faster is the peak from then on."""
    monkeypatch.setattr(diagnostics, "matmul_flops", lambda *_: 1.0)
    run = trainer("gpt", eval_every=0)
    run.run(show_progress=False)
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    fastest = 0.0
    for record in records:
        fastest = max(fastest, record["tokens_per_second"])
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] / fastest)
    assert "measured" in run.speed.peak()


def test_the_data_sheet_of_a_gpu_is_found_by_its_name() -> None:
    """The card with less power has less, which its name says last; what is not known is measured."""
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB")
    sxm, pcie, older = (diagnostics.data_sheet_flops(name, torch.bfloat16) for name in names)
    assert sxm is not None
    assert pcie is not None
    assert older is not None
    assert sxm > pcie > older > 1e14
    assert diagnostics.data_sheet_flops("NVIDIA GeForce GTX 1080", torch.bfloat16) is None
    assert diagnostics.data_sheet_flops(names[0], torch.float32) is None


@pytest.mark.row("Interruption")
@pytest.mark.parametrize(
    ("fields", "steps"), [({}, [3, 6]), ({"save_minutes": 0}, [6]), ({"save_every": 4}, [4, 6])], ids=str
)
def test_a_run_saves_by_the_clock(
    fields: dict[str, Any], steps: list[int], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every half hour, of updates of ten minutes each, unless told otherwise; which changes nothing that is learned."""
    train(tiny.run_config("ngpt", data), tmp_path / "whole", show_progress=False)
    clock = itertools.count(step=600.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter))
    train(tiny.run_config("ngpt", data, keep=9, **fields), tmp_path / "run", show_progress=False)
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [int(path.name.removeprefix("step-")) for path in saved] == steps
    tiny.assert_bitwise(saved[-1], tmp_path / "whole" / "checkpoints" / saved[-1].name)


def test_the_model_learns(data: Path, tmp_path: Path) -> None:
    for arm in tiny.ARMS:
        train(tiny.run_config(arm, data, steps=40, eval_every=0), tmp_path / arm, show_progress=False)
        start, end = (r["loss"] for r in read_metrics(tmp_path / arm / "metrics.jsonl") if r["kind"] == "val")
        assert end < 0.7 * start


def test_validation_reads_fixed_windows_of_held_out_text(trainer: MakeTrainer, data: Path) -> None:
    run = trainer(seed=0)
    run.metrics.close()
    tokens, targets = validation_windows(open_tokens(data, "val"), 16, 6)
    (held_out,) = run.data.held_out
    assert all(torch.equal(a, b) for a, b in zip(held_out.batch, (tokens, targets), strict=True))
    assert run._validation_losses() == run._validation_losses()
    with torch.no_grad():
        (loss,) = run._validation_losses().values()
        assert loss == pytest.approx(run.model.loss(tokens, targets).item(), rel=1e-6)


def test_the_seed_decides_weights_and_order_but_not_the_validation_text(data: Path, tmp_path: Path) -> None:
    runs = [Trainer(tiny.run_config("gpt", data, seed=seed), tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))]
    for run in runs:
        run.metrics.close()
    same, other = (
        [torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), run.model.parameters(), strict=True)]
        for run in runs[1:]
    )
    assert all(same)
    assert not all(other)
    batches = [run.data.loader.batch(0)[0] for run in runs]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    assert torch.equal(runs[0].data.held_out[0].batch[0], runs[2].data.held_out[0].batch[0])


def test_both_arms_see_the_same_batches(data: Path, tmp_path: Path) -> None:
    gpt, ngpt = (Trainer(tiny.run_config(arm, data), tmp_path / arm) for arm in tiny.ARMS)
    for run in (gpt, ngpt):
        run.metrics.close()
    for step in range(6):
        assert torch.equal(gpt.data.loader.batch(step)[0], ngpt.data.loader.batch(step)[0])


@pytest.mark.parametrize(("seq_len", "steps"), [(16, 1), (5, 3)])
def test_eval_every_zero_validates_at_start_and_end(
    seq_len: int, steps: int, trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer("gpt", eval_every=0, steps=steps, seq_len=seq_len).run(show_progress=False)
    assert [r["step"] for r in tiny.metrics(tmp_path / "run") if r["kind"] == "val"] == [0, steps]


def test_a_run_that_diverges_says_where_and_why(trainer: MakeTrainer, tmp_path: Path) -> None:
    run = trainer(save_every=1)
    weights = next(p for p in run.model.parameters())
    update = run._update

    def poisoned(step: int, lr: float) -> Any:
        if step == 2:
            with torch.no_grad():
                weights.fill_(math.nan)
        return update(step, lr)

    run._update = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"run: the loss is nan at step 3 \(peak learning rate 0\.01\): lower --lr"):
        run.run(show_progress=False)
    last = latest_checkpoint(tmp_path / "run")
    assert last is not None
    assert last.name == "step-00000002", "what was good is kept, what is not a number is not saved"
    assert [r["step"] for r in tiny.metrics(tmp_path / "run") if r["kind"] == "train"] == [1, 2]


def test_an_infinite_gradient_is_named(trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "clip_gradients", lambda model, limit: torch.tensor(math.inf))
    with pytest.raises(Diverged, match="the gradient norm is inf at step 1"):
        trainer("gpt").run(show_progress=False)


def test_a_rate_that_is_far_too_high_diverges_for_real(trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"is nan at step \d \(peak learning rate 1e\+30\)"):
        trainer("gpt", lr=1e30, eval_every=0).run(show_progress=False)
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text(), "metrics.jsonl stays JSON"


def test_a_last_update_that_breaks_the_model_is_noticed(trainer: MakeTrainer, tmp_path: Path) -> None:
    """Only validation comes after it: no number, no success, no checkpoint."""
    with pytest.raises(Diverged, match="the validation loss is nan at step 1"):
        trainer("gpt", recipe="paper", lr=1e38, steps=1).run(show_progress=False)
    assert latest_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize(("start", "end", "worse"), [(6.0, 6.05, False), (6.0, 6.2, True), (3.0, 6.0, True)])
def test_a_run_that_ends_worse_than_an_untrained_model_fails(
    start: float,
    end: float,
    worse: bool,
    trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its start, or where that is lower an even guess, ln(257) = 5.55 nats, also when resumed;
    in between it may be worse.
    """
    validations = {0: start, 2: 9.0, 4: 9.0, 6: end}
    for resume in (False, True):
        run = trainer(save_every=4, resume=resume)
        (name,) = (part.name for part in run.data.held_out)
        monkeypatch.setattr(
            run, "_validation_losses", lambda run=run, name=name: {name: validations[run.progress.step]}
        )
        if not worse:
            assert run.run(show_progress=False) == end
            continue
        with pytest.raises(
            Diverged, match=f"the run ends worse than an untrained model: its validation loss is {end}00 at"
        ):
            run.run(show_progress=False)
        assert tiny.metrics(tmp_path / "run")[-1]["kind"] == "stop"
        last = latest_checkpoint(tmp_path / "run")
        assert last is not None
        assert last.name == "step-00000004", "the run directory stays as it is"


def test_a_normalized_model_thrown_about_by_its_rate_fails(trainer: MakeTrainer) -> None:
    """All of its weights stay unit vectors, and nothing overflows."""
    with pytest.raises(Diverged, match=r"the run ends worse than an untrained model: .* \(peak learning rate 1e\+03\)"):
        trainer("ngpt", lr=1e3, eval_every=0).run(show_progress=False)


@pytest.mark.row("Compilation")
def test_compiling_that_fails_is_said_and_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stances: list[str] = []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)

    def fail(self: torch.nn.Module) -> None:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    config = tiny.run_config("ngpt", data, compile=True)
    loss = train(config, tmp_path / "fell back", show_progress=False)
    expected = "spherelm: torch.compile does not work here (no C++ compiler); continuing without it\n"
    assert capsys.readouterr().err == expected
    assert stances == ["force_eager"]
    monkeypatch.undo()
    assert loss == train(tiny.run_config("ngpt", data), tmp_path / "eager", show_progress=False)


def test_compiling_that_fails_on_use_is_noticed_before_training(
    trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
    run = trainer("gpt")
    run.metrics.close()

    def trial() -> None:
        raise RuntimeError

    compile_blocks(run.model, trial)
    assert "torch.compile does not work here (RuntimeError); continuing without it" in capsys.readouterr().err


def test_the_trial_of_compilation_leaves_no_trace(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    losses = [
        train(tiny.run_config("ngpt", data, compile=compile), tmp_path / str(compile), show_progress=False)
        for compile in (False, True)
    ]
    assert losses[0] == losses[1]
    assert tiny.metrics(tmp_path / "False") == tiny.metrics(tmp_path / "True")
    assert capsys.readouterr().err == ""


def test_the_run_directory_explains_itself(trainer: MakeTrainer, data: Path, tmp_path: Path) -> None:
    trainer("ngpt").run(show_progress=False)
    record = tiny.read_json(tmp_path / "run" / "config.json")
    assert record["arm"] == "ngpt"
    assert record["model"]["alpha"]["init"] == pytest.approx(0.05 * math.sqrt(24 / record["model"]["n_layers"]))
    assert record["model"]["s_z"]["scale"] == CONSTANTS["s_z"].value
    assert record["optim"]["multipliers"]["matrix"] == 1.0
    assert record["data"] == str(data)
    assert record["data_identity"]["train"] == open_tokens(data, "train").fingerprint
    assert {"python", "torch", "spherelm", "numpy"} <= set(record["versions"])
    assert record["command"]
    assert "git_commit" in record
    assert (tmp_path / "run" / "tokenizer.meta.json").is_file(), "text can be generated without the data directory"


def test_a_run_needs_no_data_directory_once_it_is_done(tmp_path: Path) -> None:
    from spherelm.generation.samples import continuations

    data = tiny.make_data(tmp_path)
    train(tiny.run_config("ngpt", data), tmp_path / "run", show_progress=False)
    shutil.rmtree(data)
    assert len(continuations(tmp_path / "run", "ba", 2, 3, seed=0)) == 2


def test_text_with_more_ids_than_the_model_is_refused(data: Path, tmp_path: Path) -> None:
    from spherelm.recipes import make_run

    config = make_run("gpt", data=str(data), vocab_size=256, n_layers=1, d_model=8, n_heads=1, seq_len=8)
    with pytest.raises(ValueError, match=r"has 257 token ids, the model only 256"):
        train(config, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists(), "a run that cannot start leaves no directory behind"


def test_interrupted_can_be_sent_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(Interrupted("saved at step 3", 15)))
    assert (str(error), error.signal_number) == ("saved at step 3", 15)


def test_the_epochs_of_a_mixture_are_those_of_its_parts(data: Path, tmp_path: Path) -> None:
    """Each part gives its share of all tokens."""
    other = tiny.make_data(tmp_path)
    config = replace(tiny.run_config("gpt", data), data=f"{data}=3,{other}=1")
    sizes = {str(path): len(open_tokens(path, "train")) for path in (data, other)}
    read = {name: count * sizes[name] for name, count in epochs(config, 100).items()}
    assert read == pytest.approx({str(data): 0.75 * 100 * 64, str(other): 0.25 * 100 * 64})
    assert epochs(replace(config, data="stream:some/text"), 100) == {}
