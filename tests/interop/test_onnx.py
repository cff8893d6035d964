"""An exported ONNX file under onnxruntime has the model's logits,
with a cache that grows and for texts of many lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch

from spherelm import load_model
from spherelm.errors import UserError
from spherelm.interop.onnx import write_onnx
from spherelm.models import build
from spherelm.train.trainer import train

Feed = dict[str, Any]


def fed(session: Any, tokens: torch.Tensor, mask: torch.Tensor, past: Feed) -> tuple[torch.Tensor, Feed]:
    """Logits of `tokens` after what is in `past`, and the past that they are in; positions count what `mask` shows."""
    places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
    given = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy(), "position_ids": places.numpy()}
    logits, *pairs = session.run(None, {**given, **past})
    return torch.from_numpy(logits), dict(zip(past, pairs, strict=True))


def nothing(session: Any, batch: int) -> Feed:
    """The past of a text that begins."""
    caches = [given for given in session.get_inputs() if given.name.startswith("past_key_values.")]
    return {given.name: torch.zeros(batch, given.shape[1], 0, given.shape[3]).numpy() for given in caches}


@pytest.mark.slow
@pytest.mark.row("ONNX")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # of torch's exporter
@pytest.mark.parametrize(("arm", "fields"), [("gpt", {}), ("ngpt", {"n_kv_heads": 1})])
def test_onnxruntime_computes_the_same(
    arm: str, fields: dict[str, Any], data: Path, tmp_path: Path, command: commands.Command
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("transformers", reason="needs the extra hf")
    train(tiny.run_config(arm, data, steps=1, eval_every=0, **fields), tmp_path / "run", show_progress=False)
    answer = command("export", tmp_path / "run", tmp_path / "out", "--onnx", "--dtype", "bfloat16")
    assert answer.code == 0, answer.err
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx", options)
    model = load_model(tmp_path / "run")
    for batch in (1, 3):
        tokens = torch.randint(tiny.VOCAB - 1, (batch, 13))
        past, found = nothing(session, batch), []
        for start, end in ((0, 1), (1, 6), (6, 7), (7, 13)):
            seen = torch.ones(batch, end, dtype=torch.int64)
            logits, past = fed(session, tokens[:, start:end], seen, past)
            found.append(logits)
        torch.testing.assert_close(torch.cat(found, 1), model(tokens).detach(), rtol=0, atol=1e-5)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    logits, _ = fed(session, tokens[:2, :9], mask, nothing(session, 2))
    torch.testing.assert_close(logits[:1, 4:], model(tokens[:1, 4:9]).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1:], model(tokens[1:2, :9]).detach(), rtol=0, atol=1e-5)


def test_other_models_are_refused(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model = build(tiny.run_config("ngpt", data, pattern="MA-", n_layers=3, mamba_d_head=8, mamba_d_state=4).model)
    with pytest.raises(
        UserError, match=r"is not a language model of attention and MLP alone; export it without --onnx"
    ):
        write_onnx(model, tmp_path / "model.onnx")


def test_the_exporter_is_asked_for(data: Path, tmp_path: Path, without: Any) -> None:
    without("onnxscript")
    with pytest.raises(UserError, match=r"--onnx needs onnxscript: pip install '.\[onnx\]'"):
        write_onnx(build(tiny.run_config("gpt", data).model), tmp_path / "model.onnx")
