"""nGPT under other people's training loops, on real text: unit after every step, learning, resumable."""

from __future__ import annotations

import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import free_port
from torch import Tensor

from spherelm import NGPT, NGPTConfig, OptimConfig, attach_retraction, build_optimizer, departure, retract
from spherelm.data.corpus import shipped_documents
from spherelm.data.tokenizer import load_tokenizer
from spherelm.models import ScaleSpec
from spherelm.models.config import to_plain

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="needs the extra hf: transformers' Trainer stands on accelerate")

from spherelm.interop.huggingface import to_hf  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
SIZES = {"vocab_size": 257, "n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 64, "max_seq_len": 32}
CONFIG = NGPTConfig(**SIZES, alpha=ScaleSpec(0.3), s_z=ScaleSpec(6.0))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def windows() -> list[dict[str, Tensor]]:
    """A passage of a book that ships with spherelm, in bytes."""
    text = next(shipped_documents("val"))["text"][20_000:40_000]
    ids = torch.tensor(load_tokenizer("bytes").encode(text))
    return [{"input_ids": window, "labels": window} for window in ids.split(32)[:-1]]


def make_model() -> Any:
    torch.manual_seed(0)
    return to_hf(NGPT(CONFIG))


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """How far from the sphere the weights are after each step."""

    def __init__(self) -> None:
        self.departures: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.departures.append(departure(model))


def make_trainer(out: Path, windows: list[dict[str, Tensor]], optimizer_of: Any, **settings: Any) -> tuple[Any, Watch]:
    model, watch = make_model(), Watch()
    arguments = transformers.TrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **settings},
    )
    optimizers = (optimizer_of(model), None)
    trainer = transformers.Trainer(model, arguments, train_dataset=windows, optimizers=optimizers, callbacks=[watch])
    return trainer, watch


def ours(model: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimConfig(lr=2e-2))


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)


def any_optimizer_with_one_line(model: Any) -> torch.optim.Optimizer:
    optimizer = adam(model)
    attach_retraction(optimizer, model)
    return optimizer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.row("Hugging Face transformers")
@pytest.mark.parametrize("optimizer_of", [ours, any_optimizer_with_one_line])
def test_the_trainer_of_transformers(optimizer_of: Any, windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    trainer, watch = make_trainer(tmp_path, windows, optimizer_of)
    trainer.train()
    assert len(watch.departures) == STEPS
    assert max(watch.departures) < 1e-6
    measured = losses(trainer)
    assert measured[0] == pytest.approx(5.55, abs=0.8), "not far from the logarithm of 257"
    assert sum(measured[-4:]) / 4 < measured[0] - 1.5


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_optimizer_that_the_trainer_makes(
    weight_decay: float, windows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    """Its weights stay on the sphere too, in what is saved as well, and learn what they do with the one line."""
    plain, watch = make_trainer(tmp_path, windows, lambda model: None, learning_rate=2e-2, weight_decay=weight_decay)
    plain.train()
    assert len(watch.departures) == STEPS
    assert max(watch.departures) < 1e-6
    plain.save_model(str(tmp_path / "saved"))
    assert departure(type(plain.model).from_pretrained(tmp_path / "saved")) < 1e-6
    if not weight_decay:
        lined, _ = make_trainer(tmp_path, windows, any_optimizer_with_one_line)
        lined.train()
        assert losses(plain) == pytest.approx(losses(lined), abs=1e-2)


def steps(model: Any, optimizer: torch.optim.Optimizer, windows: list[dict[str, Tensor]], count: int = 3) -> None:
    """Updates of a loop that knows nothing of the sphere."""
    for window in windows[:count]:
        batch = window["input_ids"].unsqueeze(0)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer_of", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_any_loop_around_any_copy(optimizer_of: Any, windows: list[dict[str, Tensor]]) -> None:
    model = copy.deepcopy(make_model())
    steps(model, optimizer_of(model.parameters(), lr=0.1), windows)
    assert departure(model) < 1e-6


def test_only_what_is_trained_is_moved(windows: list[dict[str, Tensor]]) -> None:
    """Frozen weights keep their bits, as do those of a model that another optimizer trains."""
    model, other = make_model().bfloat16(), make_model().bfloat16()
    start = {name: p.clone() for name, p in model.named_parameters()}
    model.requires_grad_(False)
    model.model.embed.requires_grad_(True)
    steps(model, torch.optim.AdamW(model.model.embed.parameters(), lr=0.1), windows)
    assert [name for name, p in model.named_parameters() if not torch.equal(p, start[name])] == ["model.embed.weight"]
    assert all(torch.equal(p, start[name]) for name, p in other.named_parameters())
    assert departure(model) < 2**-7


@tiny.compiles
def test_a_compiled_model_stays_too(windows: list[dict[str, Tensor]]) -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    steps(compiled, torch.optim.AdamW(compiled.parameters(), lr=0.1), windows)
    assert departure(model) < 1e-6


def test_updates_that_are_no_step_of_an_optimizer_are_refused(windows: list[dict[str, Tensor]]) -> None:
    """As of optimizers that update in the backward pass; retracting by hand is right."""
    model = make_model()

    def update(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(0.5 * parameter.grad.sign())
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    batch = windows[0]["input_ids"].unsqueeze(0)
    for _ in range(4):
        model(batch, labels=batch).loss.backward()
        retract(model)
    with pytest.raises(ValueError, match=r"embed is trained and .* off the unit sphere: call spherelm.retract"):
        [model(batch, labels=batch).loss.backward() for _ in range(8)]
    with torch.no_grad():
        assert model(batch).logits.isfinite().all(), "reading is free"


def test_pieces_of_vectors_are_refused(windows: list[dict[str, Tensor]]) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.model.embed.weight.data = model.model.embed.weight.data.flatten()[:40]
    with pytest.raises(ValueError, match=r"embed is cut within its vectors, .* use FSDP 2"):
        optimizer.step()


def test_the_trainer_resumes_from_its_checkpoint(windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    whole, _ = make_trainer(tmp_path, windows, ours, save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    resumed, watch = make_trainer(tmp_path / "again", windows, ours)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert len(watch.departures) == STEPS // 2
    assert max(watch.departures) < 1e-6
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_trainer_checkpoints_gradients_in_bfloat16(windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    known = transformers.TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    trainer, watch = make_trainer(tmp_path, windows[:32], ours, bf16=True, **{name: True})
    trainer.args.max_steps = 2
    trainer.train()
    assert trainer.model.gradient_checkpointing
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert max(watch.departures) < 1e-6


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["huggingface_trainer.py", "--steps", "2", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "huggingface_trainer.py"), run_name="__main__")
    assert "off the sphere by" in capsys.readouterr().out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert departure(loaded) < 1e-6


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from spherelm import NGPT, NGPTConfig, attach_retraction, departure
from spherelm.fields import from_plain
from spherelm.interop.huggingface import to_hf

folder = sys.argv[1]
given = torch.load(folder + "/given.pt")


def started():
    model = NGPT(from_plain(NGPTConfig, given["config"]))
    model.load_state_dict(given["start"])
    return model


def updated(model, optimizer, batches):
    for batch in batches:
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded():
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = to_hf(started())
    for block in model.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    updated(model, torch.optim.SGD(model.parameters(), lr=0.5), given["windows"][:3, None])
    return [p.full_tensor() for p in model.parameters()]


def flattened(original):
    model = to_hf(started())
    model = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({type(model.model.blocks[0])}), use_orig_params=original,
        device_id=torch.device("cpu"),
    )
    try:
        updated(model, torch.optim.AdamW(model.parameters(), lr=0.1), given["windows"][:8, None])
    except ValueError as error:
        return str(error)


def accelerated():
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = started()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    attach_retraction(optimizer, model)
    loader = torch.utils.data.DataLoader(given["windows"], batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert type(model).__name__ == "DistributedDataParallel"

    def run(batches):
        losses = []
        for batch in batches:
            logits = model(batch[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert departure(model) < 1e-6
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        return losses

    def weights():
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    batches = list(loader)
    half = len(batches) // 2
    losses = run(batches[:half])
    accelerator.save_state(folder + "/state")
    losses += run(batches[half:])
    end = weights()
    gathered = accelerator.gather(end)
    assert torch.equal(gathered[:len(end)], gathered[len(end):]), "both processes have the same weights"
    accelerator.load_state(folder + "/state")
    assert not torch.equal(weights(), end)
    assert run(batches[half:]) == losses[half:]
    assert torch.equal(weights(), end), "going on from the saved state gives the same weights"
    return {"losses": losses, "weights": end}


dist.init_process_group("gloo")
found = {"sharded": sharded(), "flattened": [flattened(True), flattened(False)], "accelerated": accelerated()}
if dist.get_rank() == 0:
    torch.save(found, folder + "/found.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(windows: list[dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The model over two processes: sharded by FSDP 2, flattened by FSDP 1, and in copies by accelerate."""
    folder = tmp_path_factory.mktemp("two")
    ids = torch.stack([window["input_ids"] for window in windows[:128]])
    torch.save(
        {"config": to_plain(CONFIG), "start": make_model().model.state_dict(), "windows": ids}, folder / "given.pt"
    )
    (folder / "program.py").write_text(TWO_PROCESSES)
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = os.environ | meeting | {"ACCELERATE_USE_CPU": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(folder / "program.py"), str(folder)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


@pytest.mark.slow
def test_a_sharded_model_stays_too(windows: list[dict[str, Tensor]], two_processes: dict[str, Any]) -> None:
    model = make_model()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.5), windows)
    assert departure(model) < 1e-6
    for one, other in zip(two_processes["sharded"], model.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_flattened_weights_are_refused(two_processes: dict[str, Any]) -> None:
    """FSDP 1 keeps vectors in pieces, or out of the optimizer's sight, and their memory away between uses."""
    assert all("FSDP 2" in said for said in two_processes["flattened"])


@pytest.mark.slow
def test_accelerate_on_two_processes(windows: list[dict[str, Tensor]], two_processes: dict[str, Any]) -> None:
    end, model = two_processes["accelerated"], make_model()
    assert end["losses"][-1] < end["losses"][0] - 0.8
    optimizer = any_optimizer_with_one_line(model)
    for batch in torch.stack([window["input_ids"] for window in windows[:128]]).split(8):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    alone = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(end["weights"], alone, rtol=0, atol=2e-3)
