"""`spherelm export --dtype fp8` and `nvfp4`: transformers loads what it writes, without spherelm, and computes with the
matrices that our own rounding gives.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from commands import make_command
from safetensors.torch import load_file
from torch import Tensor

from spherelm import load_model
from spherelm.interop.export import export
from spherelm.layers.low_precision import to_nvfp4
from spherelm.train.trainer import train

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("torchao", reason="needs the extra quantize")
from spherelm.interop.huggingface.folded import to_folded_hf

TOKENS = torch.tensor([list(b"badu kibo sela mi")])
ALONE = """
import sys
sys.modules["spherelm"] = None  # any import of it fails
import torch, transformers
for folder in sys.argv[1:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.load(folder + ".tokens")
    linear = {name: m.weight for name, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert not any(type(weight.data) is torch.Tensor for weight in linear.values())
    with torch.no_grad():
        logits = model(tokens).logits
    torch.save((logits, {name: weight.dequantize() for name, weight in linear.items()}), folder + ".found")
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == tokens.shape[1] + 3
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two updates of each arm, whose matrices have whole blocks, and an nGPT whose have not."""
    base = tmp_path_factory.mktemp("runs")
    data, sizes = tiny.make_data(base), {"gpt": 32, "ngpt": 32, "ngpt-24": 24}
    for name, d_ff in sizes.items():
        train(tiny.run_config(name.split("-")[0], data, steps=2, d_ff=d_ff), base / name, show_progress=False)
    return {name: base / name for name in sizes}


def to_e4m3(weight: Tensor, axis: int) -> Tensor:
    """One scale for each vector along `axis`, which makes the largest entry 448; read back."""
    scale = weight.abs().amax(axis, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.row("Number formats for inference")
def test_transformers_computes_with_our_rounding_of_the_folded_matrices(runs: dict[str, Path], tmp_path: Path) -> None:
    folders = {(arm, kind): tmp_path / f"{arm}-{kind}" for arm in tiny.ARMS for kind in ("fp8", "nvfp4")}
    for (arm, kind), folder in folders.items():
        export(runs[arm], folder, dtype=kind)
        torch.save(TOKENS, f"{folder}.tokens")
    command = [sys.executable, "-W", "ignore", "-c", ALONE, *map(str, folders.values())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (arm, kind), folder in folders.items():
        plain = to_folded_hf(load_model(runs[arm]))
        with torch.no_grad():
            exact = plain(TOKENS).logits
            found, matrices = torch.load(f"{folder}.found")
            for name, matrix in matrices.items():
                weight = plain.model.get_submodule(name).weight
                axis = getattr(plain.model.get_submodule(name), "unit_axis", 1)
                weight.copy_(to_nvfp4(weight) if kind == "nvfp4" else to_e4m3(weight, axis))
                assert torch.equal(matrix, weight), (arm, kind, name)
            wanted = plain(TOKENS).logits
        assert len(matrices) == 2 * 7
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert (found - exact).abs().max() > 1e-4, "rounding was felt"


def test_the_matrices_are_stored_small_and_the_card_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    stored = {}
    for kind in ("float32", "fp8", "nvfp4"):
        export(runs["ngpt"], tmp_path / kind, dtype=kind, folded=True)
        stored[kind] = {n: t.nbytes for n, t in load_file(tmp_path / kind / "model.safetensors").items()}
    matrix = "model.blocks.1.mlp.part.u."
    assert stored["float32"][matrix + "weight"] == 4 * stored["fp8"][matrix + "_weight_qdata"]
    assert stored["float32"][matrix + "weight"] == 8 * stored["nvfp4"][matrix + "_weight_qdata"]
    card = (tmp_path / "nvfp4" / "README.md").read_text()
    assert "stored as nvfp4 in the matrices of the blocks, else as float32" in card
    assert "# needs torchao" in card
    assert "vllm" not in card, "which was not tried"
    described = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert described["quantization_config"]["quant_type"]["default"]["_type"] == "Float8WeightOnlyConfig"


@pytest.mark.parametrize(
    ("run", "words", "said"),
    [
        (
            "ngpt-24",
            ["--dtype", "nvfp4"],
            r"--dtype nvfp4 takes 16 numbers at a time, and .*mlp.part.u is 24 x 16: export",
        ),
        ("ngpt", ["--dtype", "nvfp4", "--onnx"], "--onnx writes float32, not nvfp4: leave out --onnx, or --dtype"),
        (
            "ngpt",
            ["--dtype", "fp4"],
            "'fp4' is not one of float32, bfloat16, float16, fp8, nvfp4 .did you mean 'nvfp4'",
        ),
    ],
)
def test_what_cannot_be_rounded_is_one_line(
    run: str, words: list[str], said: str, runs: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    answer = make_command(monkeypatch, capsys)("export", runs[run], tmp_path / "out", *words)
    assert answer.code == 2
    assert len(answer.shown) == 1, answer.err
    assert re.search(said, answer.shown[0])
    assert not (tmp_path / "out").exists()


def test_without_torchao_the_extra_is_named(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8.float8_scaling_utils", None)
    answer = make_command(monkeypatch, capsys)("export", runs["gpt"], tmp_path / "out", "--dtype", "fp8")
    assert answer.code == 2
    assert "--dtype fp8 needs torchao: pip install '.[quantize]'" in answer.err
    assert len(answer.shown) == 1
