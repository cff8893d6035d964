"""nGPT under other people's training loops, on real text: unit after every step, learning, resumable."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spherelm import NGPT, NGPTConfig, OptimConfig, attach_retraction, build_optimizer, departure
from spherelm.data.corpus import shipped_documents
from spherelm.data.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="needs the extra hf: transformers' Trainer stands on accelerate")

from spherelm.interop.huggingface import to_hf  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
CONFIG = {"vocab_size": 257, "n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 64, "max_seq_len": 32}
CONFIG |= {"s_z_init": 6.0, "alpha_init": 0.3}


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
    return to_hf(NGPT(NGPTConfig(**CONFIG)))


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


@pytest.mark.parametrize("optimizer_of", [ours, any_optimizer_with_one_line])
def test_the_trainer_of_transformers(optimizer_of: Any, windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    trainer, watch = make_trainer(tmp_path, windows, optimizer_of)
    trainer.train()
    assert len(watch.departures) == STEPS
    assert max(watch.departures) < 1e-6
    measured = losses(trainer)
    assert measured[0] == pytest.approx(5.55, abs=0.8), "not far from the logarithm of 257"
    assert sum(measured[-4:]) / 4 < measured[0] - 1.5


def test_without_the_line_the_weights_leave_the_sphere(windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    trainer, watch = make_trainer(tmp_path, windows, adam)
    trainer.train()
    assert watch.departures[-1] > 1e-2


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


ACCELERATED = """
import sys
import torch
from accelerate import Accelerator
from spherelm import NGPT, NGPTConfig, attach_retraction, departure

folder = sys.argv[1]
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = NGPT(NGPTConfig(**torch.load(folder + "/config.pt")))
model.load_state_dict(torch.load(folder + "/start.pt"))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
attach_retraction(optimizer, model)
loader = torch.utils.data.DataLoader(torch.load(folder + "/windows.pt"), batch_size=4)
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
if accelerator.is_main_process:
    torch.save({"losses": losses, "weights": end}, folder + "/end.pt")
accelerator.end_training()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


def test_accelerate_on_two_processes(windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    ids = torch.stack([window["input_ids"] for window in windows[:128]])
    model = make_model()
    for name, value in {"windows": ids, "config": CONFIG, "start": model.model.state_dict()}.items():
        torch.save(value, tmp_path / f"{name}.pt")
    (tmp_path / "accelerated.py").write_text(ACCELERATED)
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "accelerated.py"), str(tmp_path)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    end = torch.load(tmp_path / "end.pt")
    assert end["losses"][-1] < end["losses"][0] - 0.8

    optimizer = any_optimizer_with_one_line(model)
    for batch in ids.split(8):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    alone = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(end["weights"], alone, rtol=0, atol=2e-3)
