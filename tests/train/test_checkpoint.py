"""Checkpoints: what is saved comes back, appears whole or not at all, and is refused if it is not what it was."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cases import model_with_experts
from old_files import flatten_config, rename_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystem

from spherelm import load_model
from spherelm.data.output import write_json
from spherelm.models import Decoder, GPTConfig, NGPTConfig, build
from spherelm.optim import OptimConfig, build_optimizer
from spherelm.optim.groups import count_devices
from spherelm.runs import checkpoint as module
from spherelm.runs.checkpoint import (
    MOMENTS,
    STATE,
    WEIGHTS,
    CheckpointWriter,
    Progress,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from spherelm.runs.config import read_config, to_dict
from spherelm.runs.loading import run_directory
from spherelm.train.trainer import Trainer, train

SHAPE: dict[str, Any] = {"vocab_size": 11, "n_layers": 2, "d_model": 8, "n_heads": 2, "d_ff": 12, "max_seq_len": 8}
both_arms = pytest.mark.parametrize("arm", tiny.ARMS)


def trained(arm: str, updates: int = 2, **fields: Any) -> tuple[Decoder, torch.optim.Optimizer]:
    """A small model after some updates, and its optimizer."""
    model = build((GPTConfig if arm == "gpt" else NGPTConfig)(**SHAPE, **fields))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    tokens = torch.randint(11, (2, 8))
    for _ in range(updates):
        model.loss(tokens, tokens.roll(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name."""
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state |= {f"{name}/{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return state


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@both_arms
@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_comes_back_bitwise(arm: str, tied: bool, tmp_path: Path) -> None:
    model, optimizer = trained(arm, tie_embeddings=tied)
    before, random_state = state_of(model, optimizer), torch.get_rng_state()
    path = save_checkpoint(tmp_path, model, optimizer, Progress(2, 1.5), keep=1)
    torch.rand(3)
    other, fresh = trained(arm, updates=1, tie_embeddings=tied)
    assert load_checkpoint(path, other, fresh) == Progress(2, 1.5)
    assert_equal(state_of(other, fresh), before)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("flag", "place"), [("fused", "meta"), ("capturable", "meta"), ("foreach", "cpu")])
def test_counts_of_updates_go_where_the_optimizer_looks_for_them(flag: str, place: str) -> None:
    """Fused on an accelerator, torch's Adam takes them beside the parameter only;
    meta stands for the accelerator here.
    """
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.SGD([{"params": [parameter], flag: True}], 0.1)
    assert count_devices(optimizer) == {parameter: torch.device(place)}


@both_arms
def test_training_goes_on_from_a_checkpoint_bitwise(arm: str, tmp_path: Path) -> None:
    model, optimizer = trained(arm)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(2, 0.0), keep=1)
    other, fresh = trained(arm, updates=0)
    load_checkpoint(path, other, fresh)
    tokens = torch.randint(11, (2, 8))
    for each, its_optimizer in ((model, optimizer), (other, fresh)):
        each.loss(tokens, tokens.roll(1)).backward()
        its_optimizer.step()
    assert_equal(state_of(model, optimizer), state_of(other, fresh))


@both_arms
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_version_0_1_0_is_read(arm: str, tied: bool, tmp_path: Path) -> None:
    """Weights and moments, under the names of then."""
    model, optimizer = trained(arm, tie_embeddings=tied)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(2, 1.5), keep=1)
    rename_checkpoint(path)
    assert "head.weight" in load_file(path / WEIGHTS) or tied
    assert "blocks.1.mlp.o.weight/exp_avg" in load_file(path / MOMENTS)
    other, fresh = trained(arm, updates=1, tie_embeddings=tied)
    assert load_checkpoint(path, other, fresh) == Progress(2, 1.5)
    assert_equal(state_of(other, fresh), state_of(model, optimizer))


HYBRID = {"pattern": "MA-O", "n_layers": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk": 8, "n_experts": 4}


@both_arms
@pytest.mark.parametrize("shape", [{"optimizer": "gated_adamw"}, {"architecture": "encoder"}, HYBRID], ids=str)
def test_a_run_of_version_0_1_0_goes_on(arm: str, shape: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """With a checkpoint in the middle; and it is read. A hybrid's names say the most."""
    config = tiny.run_config(arm, data, **shape, save_every=3, lr=1e-2)
    whole = train(config, tmp_path / "run", show_progress=False)
    tokens = torch.randint(tiny.VOCAB, (2, 16))
    logits = load_model(tmp_path / "run")(tokens)
    flatten_config(tmp_path / "run")
    assert not any(
        isinstance(value, dict) for value in tiny.read_json(tmp_path / "run" / "config.json")["model"].values()
    )
    assert read_config(tmp_path / "run" / "config.json") == config
    last = latest_checkpoint(tmp_path / "run")
    assert last is not None
    rename_checkpoint(last)
    assert torch.equal(load_model(tmp_path / "run")(tokens), logits)
    shutil.rmtree(last)
    middle = latest_checkpoint(tmp_path / "run")
    assert middle is not None
    rename_checkpoint(middle)
    assert train(config, tmp_path / "run", resume=True, show_progress=False) == whole


@both_arms
def test_the_biases_of_routers_are_saved_and_training_goes_on_bitwise(arm: str, tmp_path: Path) -> None:
    """Counts since the last update are not saved: there is an update before every checkpoint."""
    tokens = torch.randint(11, (2, 8))

    def updated(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        model.loss(tokens, tokens.roll(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {**state_of(model, optimizer), **{name: buffer.clone() for name, buffer in model.named_buffers()}}

    model, other = (model_with_experts(arm) for _ in range(2))
    optimizer, fresh = (build_optimizer(each, OptimConfig(lr=1e-2)) for each in (model, other))
    before = updated(model, optimizer)
    assert before["blocks.0.experts.part.router.score_bias"].abs().max() > 0
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 0.0), keep=1)
    names = set(load_file(path / WEIGHTS))
    assert {name for name in names if "router" in name} == {
        f"blocks.{i}.experts.part.router.{part}" for i in (0, 1) for part in ("weight", "score_bias")
    }
    load_checkpoint(path, other, fresh)
    assert_equal(updated(other, fresh), updated(model, optimizer))


def test_a_checkpoint_without_the_biases_is_refused(tmp_path: Path) -> None:
    model = model_with_experts()
    path = save_checkpoint(tmp_path, model, build_optimizer(model, OptimConfig(lr=1e-2)), Progress(1, 0.0), keep=1)
    for block in model.blocks:
        del block.experts.part.router.score_bias
    with pytest.raises(ValueError, match=r"only the checkpoint has blocks\.0\.experts\.part\.router\.score_bias"):
        load_weights(model, path)


def test_the_newest_keep_checkpoints_stay_and_strangers_are_left_alone(tmp_path: Path) -> None:
    model, optimizer = trained("gpt")
    (tmp_path / "checkpoints" / "step-mine").mkdir(parents=True)
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, model, optimizer, Progress(step, 0.0), keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000010", "step-mine"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000010"


def test_without_a_whole_checkpoint_there_is_no_latest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "checkpoints" / ".step-00000002.part").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000003").mkdir()  # no state.json: cut off while it was deleted
    assert latest_checkpoint(tmp_path) is None


def test_a_leftover_of_a_crash_is_ignored_and_replaced(tmp_path: Path) -> None:
    model, optimizer = trained("gpt")
    good = save_checkpoint(tmp_path, model, optimizer, Progress(1, 0.0), keep=2)
    part = tmp_path / "checkpoints" / ".step-00000002.part"
    part.mkdir()
    (part / STATE).write_text("{}")
    (part / "rest").write_text("of a crash")
    assert latest_checkpoint(tmp_path) == good
    new = save_checkpoint(tmp_path, model, optimizer, Progress(2, 0.0), keep=2)
    assert latest_checkpoint(tmp_path) == new
    assert not part.exists()
    assert sorted(path.name for path in new.iterdir()) == [WEIGHTS, MOMENTS, STATE]


@pytest.mark.parametrize("after", [0, 1], ids=["in the weights", "in the moments"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained("ngpt")
    before = state_of(model, optimizer)
    good = save_checkpoint(tmp_path, model, optimizer, Progress(2, 0.0), keep=1)
    with torch.no_grad():
        model.embed.weight.add_(1)
    monkeypatch.setattr(FileSystem, "create_stream", tiny.full_disk(after))
    with pytest.raises(OSError, match="No space left") as error:
        save_checkpoint(tmp_path, model, optimizer, Progress(3, 0.0), keep=1)
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path / "checkpoints") in message
    assert f"last good checkpoint is {good}" in message
    assert message.endswith("free some space and --resume")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name], "no rubble stays"
    load_checkpoint(good, model, optimizer)
    assert_equal(state_of(model, optimizer), before)


def test_what_fails_beyond_the_files_is_told_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.os, "rename", refuse)
    model, optimizer = trained("gpt")
    with pytest.raises(OSError, match=r"Permission denied.*there is no earlier checkpoint: free some space"):
        save_checkpoint(tmp_path, model, optimizer, Progress(1, 0.0), keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_every_mth_checkpoint_stays(tmp_path: Path) -> None:
    model, optimizer = trained("gpt")
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=4)
    for step in range(1, 12):
        writer.save(model, optimizer, Progress(step, 0.0))
    writer.close()
    steps = [int(path.name.removeprefix("step-")) for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert steps == [4, 8, 10, 11]


def test_what_training_does_meanwhile_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written beside the training: it holds what was there when it was asked for."""
    model, optimizer = trained("ngpt")
    before, may_write, write = state_of(model, optimizer), threading.Event(), state_dict_saver.save

    def late(*arguments: Any, **more: Any) -> None:
        assert may_write.wait(60)
        write(*arguments, **more)

    monkeypatch.setattr(state_dict_saver, "save", late)
    writer = CheckpointWriter(tmp_path, keep=1)
    path = writer.save(model, optimizer, Progress(2, 0.0))
    tokens = torch.randint(11, (2, 8))
    model.loss(tokens, tokens).backward()
    optimizer.step()
    assert latest_checkpoint(tmp_path) is None
    may_write.set()
    writer.close()
    load_checkpoint(path, model, optimizer)
    assert_equal(state_of(model, optimizer), before)


@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS])
def test_one_flipped_bit_is_refused(name: str, tmp_path: Path) -> None:
    model, optimizer = trained("ngpt")
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 0.0), keep=1)
    damaged = bytearray((path / name).read_bytes())
    damaged[-5] ^= 1
    (path / name).write_bytes(damaged)
    before = state_of(model, optimizer)
    with pytest.raises(
        ValueError, match=rf"{name} is damaged .*sha256.*delete this checkpoint to resume from the one before"
    ):
        load_checkpoint(path, model, optimizer)
    assert_equal(state_of(model, optimizer), before)


@pytest.mark.parametrize("damage", ["missing weights", "cut state", "empty state", "state without hashes"])
def test_an_incomplete_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    model, optimizer = trained("gpt")
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 0.0), keep=1)
    if damage == "missing weights":
        (path / WEIGHTS).unlink()
    else:
        content = {"cut state": '{"step": 1, "sec', "empty state": "", "state without hashes": '{"step": 1}'}[damage]
        (path / STATE).write_text(content)
    with pytest.raises(ValueError, match="step-00000001 is not a complete checkpoint"):
        load_checkpoint(path, model, optimizer)


def test_weights_of_another_model_are_refused_by_name_or_shape(tmp_path: Path) -> None:
    model, optimizer = trained("ngpt")
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 0.0), keep=1)
    with pytest.raises(ValueError, match=r"another model: only the checkpoint has blocks\.0\.attention\.alpha\.value"):
        load_weights(build(GPTConfig(**SHAPE)), path)
    with pytest.raises(
        ValueError, match=r"another config: blocks\.0\.mlp\.part\.u\.weight is \(12, 8\) there, \(20, 8\)"
    ):
        load_weights(build(NGPTConfig(**{**SHAPE, "d_ff": 20})), path)
    (path / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="holds a file that is not safetensors"):
        load_weights(build(NGPTConfig(**SHAPE)), path)


@both_arms
def test_load_model_from_a_run_and_from_a_checkpoint(arm: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny.run_config(arm, data, save_every=3)
    loss = train(config, run, show_progress=False)
    early, late = sorted((run / "checkpoints").iterdir())
    newest, named, first = load_model(run), load_model(str(late)), load_model(early)
    assert not newest.training
    assert {parameter.dtype for parameter in newest.parameters()} == {torch.float32}
    assert newest.config == config.model
    assert_equal(dict(newest.named_parameters()), dict(named.named_parameters()))
    assert not torch.equal(newest.embed.weight, first.embed.weight)
    shutil.copytree(run, tmp_path / "moved")
    assert_equal(dict(load_model(tmp_path / "moved").named_parameters()), dict(newest.named_parameters()))
    finished = Trainer(config, run, resume=True)
    assert_equal(dict(finished.model.named_parameters()), dict(newest.named_parameters()))
    assert finished.run(show_progress=False) == loss


def test_a_checkpoint_has_many_names(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A symbolic link, its own name where it lies, and the directory one stands in."""
    run, place = tmp_path / "run", tmp_path / "run" / "checkpoints"
    train(tiny.run_config("gpt", data, save_every=3), run, show_progress=False)
    early = place / "step-00000003"
    (tmp_path / "best").symlink_to(early)
    (tmp_path / "linked").symlink_to(run)
    expected = dict(load_model(early).named_parameters())
    for where, name in (
        (tmp_path, "best"),
        (place, early.name),
        (early, "."),
        (tmp_path, "linked/checkpoints/" + early.name),
    ):
        monkeypatch.chdir(where)
        assert_equal(dict(load_model(name).named_parameters()), expected)
        assert run_directory(name) == run
    monkeypatch.chdir(run)
    assert not torch.equal(load_model(".").embed.weight, expected["embed.weight"]), "a run stands for its newest"


def test_weights_alone_can_be_used_and_not_trained_on(
    data: Path, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    trainer("ngpt").run(show_progress=False)
    run = tmp_path / "run"
    newest = latest_checkpoint(run)
    assert newest is not None
    expected = dict(load_model(run).named_parameters())
    (newest / MOMENTS).unlink()
    assert_equal(dict(load_model(run).named_parameters()), expected)
    with pytest.raises(
        ValueError, match=rf"holds weights alone, without the optimizer's state \({MOMENTS}\).*delete this"
    ):
        trainer("ngpt", resume=True)
    weights = bytearray((newest / WEIGHTS).read_bytes())
    weights[-5] ^= 1
    (newest / WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged"):
        load_model(run)


def test_load_model_says_what_is_missing(tmp_path: Path, data: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*nowhere: give the path"):
        load_model(tmp_path / "nowhere")
    model, optimizer = trained("gpt")
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 0.0), keep=1)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        load_model(tmp_path)
    write_json(tmp_path / "config.json", to_dict(tiny.run_config("gpt", data)))
    with pytest.raises(ValueError, match="belongs to another model"):
        load_model(tmp_path)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """A checkpoint from a stranger can hold numbers and JSON only."""
    model, optimizer = trained("gpt")
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 0.0), keep=1)
    for name in (WEIGHTS, MOMENTS):
        header = (path / name).read_bytes()
        assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert json.loads((path / STATE).read_text())["step"] == 1
