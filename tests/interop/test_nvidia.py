"""NVIDIA/ngpt checkpoints: two real ones against what their own code computed,
made-up ones that are broken or mean harm.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import numpy as np
import paper
import pytest
import torch
from commands import Command
from oracle_names import oracle_parameters
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW

from spherelm.interop import nvidia
from spherelm.interop.imported import run_config
from spherelm.interop.nvidia import load_checkpoint, load_optimizer, read_checkpoint, to_model, to_ours
from spherelm.layers.linear import departure
from spherelm.layers.rope import nvidia_rotate, nvidia_table
from spherelm.models import GPTConfig, NGPTConfig, Variant
from spherelm.models.decoder import Decoder
from spherelm.optim import OptimConfig, build_optimizer, rules
from spherelm.optim.groups import parameter_groups
from spherelm.runs import checkpoint as saved
from spherelm.runs.config import read_config
from spherelm.runs.loading import load_model

both_arms = pytest.mark.parametrize("arm", golden.ARMS)
EXPECTED = {"nvidia": "expected", "standard": "oracle"}


class Swallow:
    """The tests' own stand-in for what the real files name."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def raw(path: Path) -> dict[str, Any]:
    """The content of a file, read without `spherelm`."""
    names = ("model.GPTConfig", "numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct")
    with torch.serialization.safe_globals([(Swallow, name) for name in names]):
        return dict(torch.load(path, weights_only=True))


# ------------------------------------------------------------------------------------------ the two real checkpoints


@pytest.fixture(params=golden.ARMS)
def real(request: pytest.FixtureRequest, shared: Path) -> Path:
    """The folder of one arm's checkpoint."""
    return shared / "golden" / f"nvidia-{request.param}"


@pytest.mark.row("NVIDIA/ngpt checkpoints")
@pytest.mark.parametrize("rope", sorted(EXPECTED))
def test_logits_loss_and_every_gradient(real: Path, rope: str) -> None:
    """rope="nvidia" against NVIDIA's own code, "standard" against the paper's equations on the same weights."""
    wanted, batch = load_file(real / f"{EXPECTED[rope]}.safetensors"), load_file(real / "expected.safetensors")
    model = load_checkpoint(real / "ckpt.pt", rope=rope)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    logits = model(batch["tokens"])
    assert (logits - wanted["logits"]).abs().max() < 1e-5
    loss = model.loss(batch["tokens"], batch["targets"])
    assert abs(loss.item() - wanted["loss"].item()) < 2e-6
    loss.backward()
    theirs = {name.removeprefix("grad."): g for name, g in wanted.items() if name.startswith("grad.")}
    gradients = to_ours(theirs, model.config.n_heads)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).norm() < 1e-5 * gradients[name].norm(), name


def test_weights_are_kept_as_stored_or_put_on_the_sphere(real: Path) -> None:
    theirs = raw(real / "ckpt.pt")["model"]
    as_stored, on_sphere = (load_checkpoint(real / "ckpt.pt", rope) for rope in ("nvidia", "standard"))
    query = "transformer.h.1.query.weight"
    assert theirs[query].dtype == torch.bfloat16
    assert torch.equal(as_stored.blocks[1].attention.part.q.weight, theirs[query].float())
    u, v = theirs["transformer.h.0.c_fc.weight"].float().split(256)
    assert torch.equal(as_stored.blocks[0].mlp.part.u.weight, u)
    assert torch.equal(as_stored.blocks[0].mlp.part.v.weight, v)
    # 8 bits of mantissa
    worst = 2**-8 if isinstance(as_stored.config, NGPTConfig) else 0.0
    assert worst / 8 <= departure(as_stored) <= worst
    assert departure(on_sphere) < 1e-6


def test_what_else_the_file_says(real: Path) -> None:
    read = read_checkpoint(real / "ckpt.pt")
    arguments = json.loads((real / "model_args.json").read_text())
    assert vars(read.model_args) == arguments
    assert read.iteration == 12
    group = raw(real / "ckpt.pt")["optimizer"]["param_groups"][0]
    assert read.optimizer == {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert all(moments["step"] == 12 for moments in read.moments.values())


def test_the_next_update_is_the_one_that_their_optimizer_would_make(real: Path) -> None:
    """Both optimizers go on from the file, each over its own layout, and are given NVIDIA's gradients."""
    content, read = raw(real / "ckpt.pt"), read_checkpoint(real / "ckpt.pt")
    theirs = {name: nn.Parameter(w.float()) for name, w in content["model"].items()}
    groups = [[p for p in theirs.values() if p.ndim >= 2], [p for p in theirs.values() if p.ndim < 2]]
    their_optimizer = AdamW([{"params": group} for group in groups])
    their_optimizer.load_state_dict(content["optimizer"])
    model = to_model(read, "nvidia")
    said = run_config(read, "nvidia").optim
    assert isinstance(said.optimizer, rules.AdamW)
    optimizer = AdamW(parameter_groups(model, said), said.lr, said.optimizer.betas, said.optimizer.eps)
    load_optimizer(read, model, optimizer)
    stored = load_file(real / "expected.safetensors")
    gradients = to_ours({name: stored[f"grad.{name}"] for name in theirs}, model.config.n_heads)
    for name, parameter in theirs.items():
        parameter.grad = stored[f"grad.{name}"]
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].contiguous()
    their_optimizer.step()
    optimizer.step()
    wanted = to_ours({name: p.detach() for name, p in theirs.items()}, model.config.n_heads)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, read.weights[name].float()), name
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-6, atol=1e-7)
        assert optimizer.state[parameter]["step"] == 13
    assert all(moments["step"] == 12 for moments in read.moments.values())


def test_training_goes_on_with_the_moments_on_the_sphere(shared: Path) -> None:
    real = shared / "golden" / "nvidia-ngpt"
    read, batch = read_checkpoint(real / "ckpt.pt"), load_file(real / "expected.safetensors")
    model = to_model(read, "nvidia")
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    load_optimizer(read, model, optimizer)
    state = optimizer.state[model.blocks[0].mlp.part.v.weight]
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], read.moments["blocks.0.mlp.part.v.weight"]["exp_avg"].float())
    before = model.loss(batch["tokens"], batch["targets"])
    before.backward()
    optimizer.step()
    assert departure(model) < 1e-6
    assert model.loss(batch["tokens"], batch["targets"]) < before
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * len(optimizer.param_groups)


def test_the_random_state_is_left_alone(real: Path) -> None:
    before = torch.get_rng_state()
    load_checkpoint(real / "ckpt.pt")
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------ their formulas


def their_rope(x: Tensor, base: float) -> Tensor:
    """NVIDIA's rotary formula number by number: `x [..., T, d_k]`."""
    length, d_k = x.shape[-2:]
    out = torch.zeros_like(x)
    for m in range(length):
        row = []
        for j in range(d_k // 2):
            angle = torch.tensor(m * base ** (-2 * j / d_k), dtype=x.dtype)
            row += [torch.sin(angle), torch.cos(angle)]
        sin, cos = row[: d_k // 2], row[d_k // 2 :]
        for i in range(d_k // 2):
            out[..., m, 2 * i] = -x[..., m, 2 * i + 1] * cos[i]
            out[..., m, 2 * i + 1] = x[..., m, 2 * i] * sin[i]
    return out


def their_step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    return paper.norm(paper.norm(h) + alpha * (target - paper.norm(h)))


@pytest.mark.parametrize("d_k", [2, 6, 8])
@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_their_rotary_formula(d_k: int, base: float) -> None:
    x = torch.randn(2, 3, 7, d_k, dtype=torch.float64)
    ours = nvidia_rotate(x, nvidia_table(torch.arange(7.0, dtype=torch.float64), d_k, base))
    torch.testing.assert_close(ours, their_rope(x, base), rtol=1e-13, atol=1e-13)
    assert ((ours.norm(dim=-1) - x.norm(dim=-1)).abs() > 1e-3).any(), "it is not a rotation"


def test_their_rotary_formula_keeps_the_dtype() -> None:
    x, table = torch.randn(1, 2, 5, 8).bfloat16(), nvidia_table(torch.arange(5.0), 8, 10000.0)
    assert torch.equal(nvidia_rotate(x, table), nvidia_rotate(x.float(), table).bfloat16())


@both_arms
def test_models_of_their_formulas_against_the_equations(
    arm: str, case: Any, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and gradients in float64, learned scales all different; the hidden state not unit at first."""
    c = case(arm, rope="nvidia", **({"variant.step": "nvidia"} if arm == "ngpt" else {}))
    with torch.no_grad():
        c.model.embed.weight.mul_(1.5)
    monkeypatch.setattr(paper, "rope", their_rope)
    monkeypatch.setattr(paper, "step", their_step)
    weights = dict(oracle_parameters(c.model))
    agree(c.model(c.tokens), c.forward(weights, c.shape, c.tokens), list(weights.values()))


@both_arms
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 3, 1]])
def test_cached_decoding_with_their_formula_beyond_the_trained_length(arm: str, pieces: list[int], case: Any) -> None:
    c = case(arm, rope="nvidia", max_seq_len=4)
    cache = c.model.new_cache()
    parts = [c.model(tokens, cache) for tokens in c.tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), c.model(c.tokens), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("config_class", [GPTConfig, NGPTConfig])
def test_unknown_formulas_are_refused(config_class: Any) -> None:
    shape = {"vocab_size": 11, "n_layers": 1, "d_model": 12, "n_heads": 3}
    with pytest.raises(ValueError, match="rope must be 'standard', 'nvidia' or 'none', got 'nvidea'"):
        config_class(**shape, rope="nvidea")
    if config_class is NGPTConfig:
        with pytest.raises(ValueError, match="step must be 'lerp', 'nvidia' or 'riemannian', got 'slerp'"):
            Variant(step="slerp")


# ------------------------------------------------------------------------------------------ made-up checkpoints

ARGS = {
    "use_nGPT": 1,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "block_size": 16,
    "base_scale": 0.125,
    "bias": False,
    "vocab_size": 300,
    "dropout": 0.0,
}


class TheirBlock(nn.Module):
    """The parameters of one of their layers, in the order in which their code makes them."""

    def __init__(self, d: int, normalized: bool) -> None:
        super().__init__()
        if normalized:
            self.attn_alpha, self.mlp_alpha, self.sqk = (nn.Parameter(torch.rand(d)) for _ in range(3))
            self.suv = nn.Parameter(torch.rand(8 * d))
        for name, (rows, columns) in {
            **dict.fromkeys(("key", "query", "value", "att_c_proj"), (d, d)),
            "c_fc": (8 * d, d),
            "mlp_c_proj": (d, 4 * d),
        }.items():
            self.add_module(name, nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
        if not normalized:
            self.rmsnorm_att, self.rmsnorm_mlp = nn.RMSNorm(d), nn.RMSNorm(d)


class TheirModel(nn.Module):
    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        d, normalized = args["n_embd"], bool(args["use_nGPT"])
        if normalized:
            self.sz = nn.Parameter(torch.rand(args["vocab_size"]))
        layers = nn.ModuleList(TheirBlock(d, normalized) for _ in range(args["n_layer"]))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(args["vocab_size"], d), "h": layers})
        self.lm_head = nn.Linear(d, args["vocab_size"], bias=False)
        if not normalized:
            self.rmsnorm_f = nn.RMSNorm(d)


def their_content(**changed: Any) -> dict[str, Any]:
    """The checkpoint that their train.py saves after an update of a model of `ARGS`, some of them changed."""
    args = {**ARGS, **changed}
    model = TheirModel(args)
    parameters = list(model.parameters())
    groups = [[p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]]
    optimizer = AdamW([{"params": group} for group in groups], lr=1e-2)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 1,
        "config": sys.modules["model"].GPTConfig(args),
        "rng_state_pytorch_bytes": torch.get_rng_state().numpy().tobytes(),
        "rng_state_numpy": np.random.get_state(),
        "best": np.float64(2.5),
    }


@pytest.fixture(autouse=True)
def _their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `model` with a class `GPTConfig`, so that pickles name it as theirs do."""
    module = types.ModuleType("model")

    class GPTConfig:
        def __init__(self, values: dict[str, Any]) -> None:
            self.__dict__.update(values)

    GPTConfig.__module__, GPTConfig.__qualname__ = "model", "GPTConfig"
    module.GPTConfig = GPTConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "model", module)


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """`save(content)` is the path of a file that torch.save wrote."""

    def write(content: Any, **settings: Any) -> Path:
        torch.save(content, tmp_path / "ckpt.pt", **settings)
        return tmp_path / "ckpt.pt"

    return write


def refused(path: Path) -> str:
    """The message by which `path` is refused: one line that names the file."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path} is not a readable NVIDIA/ngpt checkpoint: ")
    return message


@pytest.mark.parametrize("use_ngpt", [0, 1])
def test_a_made_up_checkpoint_is_read(use_ngpt: int, save: Save) -> None:
    content = their_content(use_nGPT=use_ngpt)
    read = read_checkpoint(save(content))
    model = to_model(read)
    assert isinstance(model.config, NGPTConfig if use_ngpt else GPTConfig)
    assert (model.config.vocab_size, model.config.n_layers, model.config.max_seq_len) == (300, 2, 16)
    assert torch.equal(model.embed.weight, content["model"]["transformer.wte.weight"])
    assert read.weights.keys() == read.moments.keys() == dict(model.named_parameters()).keys()
    if use_ngpt:
        # base_scale is not 1/sqrt(n_embd) here: what is used is stored * init / base_scale
        assert torch.equal(model.head.s_z(), content["model"]["sz"] * 8)
        sqk = content["model"]["transformer.h.1.sqk"].view(2, 4) * 8
        assert torch.equal(model.blocks[1].attention.part.s_qk(), sqk)
        alpha = content["model"]["transformer.h.0.mlp_alpha"] * (0.05 * 8)
        torch.testing.assert_close(model.blocks[0].mlp.alpha(), alpha)
        assert torch.equal(model.blocks[0].mlp.part.s_v(), content["model"]["transformer.h.0.suv"][32:])


def test_the_model_shares_no_memory_with_what_was_read(save: Save) -> None:
    read = read_checkpoint(save(their_content()))
    model = to_model(read)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(w.any() for w in read.weights.values())


def test_names_that_torch_compile_changed(save: Save) -> None:
    content = their_content()
    content["model"] = {f"_orig_mod.{name}": w for name, w in content["model"].items()}
    assert isinstance(load_checkpoint(save(content)), Decoder)


def test_both_names_of_the_folder_in_the_archive(tmp_path: Path) -> None:
    """torch.save calls it after the file, or "archive" where there is none."""
    content, buffer = their_content(), io.BytesIO()
    torch.save(content, tmp_path / "some.name.pt")
    torch.save(content, buffer)
    (tmp_path / "buffer.pt").write_bytes(buffer.getvalue())
    folders = []
    for name in ("some.name.pt", "buffer.pt"):
        folders.append(zipfile.ZipFile(tmp_path / name).namelist()[0])
        load_checkpoint(tmp_path / name)
    assert folders == ["some.name/data.pkl", "archive/data.pkl"]


@pytest.mark.parametrize("name", ["numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar"])
def test_names_of_older_numpy(name: str, save: Save, tmp_path: Path) -> None:
    path = save(their_content())
    module, _, function = name.rpartition(".")
    changed, stored = tmp_path / "older.pt", b""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(changed, "w") as out:
        for entry in archive.infolist():
            content = archive.read(entry).replace(b"numpy._core.multiarray", module.encode())
            stored += content
            out.writestr(entry, content)
    assert f"{module}\n{function}\n".encode() in stored, "the file holds the older name"
    ours, older = load_checkpoint(path).state_dict(), load_checkpoint(changed).state_dict()
    assert ours.keys() == older.keys()
    assert all(torch.equal(ours[key], older[key]) for key in ours)


def test_a_file_without_an_optimizer_gives_a_model_and_no_moments(save: Save) -> None:
    content = their_content()
    del content["optimizer"]
    read = read_checkpoint(save(content))
    model = to_model(read)
    with pytest.raises(ValueError, match="holds no optimizer state"):
        load_optimizer(read, model, build_optimizer(model, OptimConfig(lr=1e-3)))


@pytest.mark.parametrize("changed", [{"n_layer": 1}, {"n_layer": 3}, {"n_embd": 16}, {"use_nGPT": 0}])
def test_moments_of_another_model_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    reads = []
    for i, args in enumerate(({}, changed)):
        torch.save(their_content(**args), tmp_path / f"{i}.pt")
        reads.append(read_checkpoint(tmp_path / f"{i}.pt"))
    model = to_model(reads[1])
    with pytest.raises(ValueError, match="moments"):
        load_optimizer(reads[0], model, build_optimizer(model, OptimConfig(lr=1e-3)))


# ------------------------------------------------------------------------------------------ files that mean harm


class Harm:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


class Ours:
    """Does harm when its state is restored."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["path"]).touch()


HARM = {
    "system": lambda mark: Harm(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Harm(eval, f"open({mark!r}, 'w')"),
    "builtins.exec": lambda mark: Harm(exec, f"open({mark!r}, 'w')"),
    "builtins.getattr": lambda mark: Harm(getattr, Path(mark), "touch"),
    "test_nvidia.Ours": Ours,
    "subprocess.check_call": lambda mark: Harm(__import__("subprocess").check_call, ["touch", mark]),
    "torch.serialization.load": lambda mark: Harm(torch.load, mark),
}


def archive_of(pickled: bytes, path: Path) -> Path:
    """A file as torch.save would write it, around the given pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.mark.row("NVIDIA/ngpt checkpoints")
@pytest.mark.parametrize(
    ("name", "where"),
    [*((name, "config") for name in sorted(HARM)), *(("system", where) for where in ("whole", "model", "moment"))],
)
def test_a_file_that_wants_to_run_code_is_refused_by_name(name: str, where: str, save: Save, tmp_path: Path) -> None:
    mark = tmp_path / "harmed"
    make = HARM[name]
    content: Any = their_content()
    if where == "whole":
        content = make(str(mark))
    elif where == "model":
        content["model"]["transformer.h.0.sqk"] = make(str(mark))
    elif where == "moment":
        content["optimizer"]["state"][0]["exp_avg"] = make(str(mark))
    else:
        content["config"] = make(str(mark))
    message = refused(save(content))
    assert re.search(rf"it names \S*{re.escape(name)}, which train.py does not store", message) or (
        # pathlib comes before what is asked of it
        name == "builtins.getattr" and "it names" in message
    )
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_every_way_to_name_a_function_is_seen(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "harmed"
    pickled = pickle.dumps({"model": Harm(os.system, f"touch {mark}")}, protocol=protocol)
    assert re.search(r"it names \w+\.system, which", refused(archive_of(pickled, tmp_path / "ckpt.pt")))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("pickled", "named"),
    [
        (b"(Vtouch harmed\niposix\nsystem\n.", "posix.system"),  # INST
        (b"(cposix\nsystem\nVtouch harmed\no.", "posix.system"),  # OBJ
        (b"\x80\x02\x82\x07.", "the registered extension 7"),
        (b"\x80\x02cbuiltins\neval.", "builtins.eval"),  # as some write it
        (b"\x80\x02c__builtin__\neval.", "builtins.eval"),
        (b"\x80\x02cmodel\nGPTConfig\n0cmodel\nGPTConfig.__init__.__globals__\n.", "GPTConfig.__init__"),
    ],
)
def test_rare_ways_to_name_a_function(
    pickled: bytes, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(archive_of(pickled.replace(b"eval.", b"eval\n."), tmp_path / "ckpt.pt"))
    assert named in message
    assert not (tmp_path / "harmed").exists()


def test_what_this_process_has_allowed_torch_to_load_is_refused_all_the_same(save: Save, tmp_path: Path) -> None:
    path = save({**their_content(), "config": Ours(str(tmp_path / "harmed"))})
    with torch.serialization.safe_globals([Ours]):
        assert "it names test_nvidia.Ours" in refused(path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", sorted(HARM))
def test_torchs_own_restricted_reader_stands_behind(
    name: str, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "_refuse_unknown_entries", lambda pickled: None)
    make = HARM[name]
    assert "UnpicklingError" in refused(save({**their_content(), "config": make(str(tmp_path / "harmed"))}))
    assert not (tmp_path / "harmed").exists()


def test_allowed_names_in_another_protocol_are_refused(save: Save) -> None:
    assert "pickle protocol 4, where torch.save writes 2" in refused(save(their_content(), pickle_protocol=4))


# ------------------------------------------------------------------------------------------ files that are broken


def test_files_that_are_no_archive(tmp_path: Path, save: Save) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(b"not a checkpoint")
    assert "not a zip file" in refused(path)
    path.write_bytes(b"")
    assert "not a zip file" in refused(path)
    assert "not a zip file" in refused(save(their_content(), _use_new_zipfile_serialization=False))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "it holds 0 files called data.pkl" in refused(path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt: give the ckpt\.pt that train\.py wrote"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"give the ckpt\.pt that train.py wrote"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(part: float, save: Save) -> None:
    path = save(their_content())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    refused(path)


def test_a_damaged_pickle_is_refused_in_one_line(save: Save, tmp_path: Path) -> None:
    path = save(their_content(n_layer=1))
    with zipfile.ZipFile(path) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    for seed in range(60):
        broken = bytearray(pickled)
        for position in np.random.default_rng(seed).integers(len(pickled), size=3):
            broken[position] ^= 1 << (seed % 8)
        with pytest.raises(ValueError, match="is not a readable NVIDIA/ngpt checkpoint: ") as error:
            read_checkpoint(archive_of(bytes(broken), tmp_path / "broken.pt"))
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value), "no advice to read it with less care"


def test_damaged_numbers_are_noticed(save: Save) -> None:
    content = their_content()
    path = save(content)
    data = bytearray(path.read_bytes())
    weights = content["model"]["lm_head.weight"].numpy().tobytes()
    data[data.index(weights) + 100] ^= 0xFF
    path.write_bytes(data)
    assert re.search(r"its ckpt/data/\d+ is damaged", refused(path))


def without(content: dict[str, Any], *keys: str) -> None:
    """Delete content[key][key]..."""
    for key in keys[:-1]:
        content = content[key]
    del content[keys[-1]]


LAYER = "transformer.h.1"
BREAK: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no model": (lambda c: without(c, "model"), "it has no 'model'"),
    "no model_args": (lambda c: without(c, "model_args"), "it has no 'model_args'"),
    "no iter_num": (lambda c: without(c, "iter_num"), "it has no 'iter_num'"),
    "odd iter_num": (lambda c: c.update(iter_num="soon"), "its iter_num is 'soon'"),
    "model is a number": (lambda c: c.update(model=3), "its 'model' is not a dictionary of tensors"),
    "model_args is a config": (lambda c: c.update(model_args=c["config"]), "its model_args are a Inert"),
    "no n_head": (lambda c: without(c, "model_args", "n_head"), "its model_args do not say n_head"),
    "unknown": (lambda c: c["model_args"].update(n_kv_head=1), "its model_args say n_kv_head=1, which is not known"),
    "bias": (lambda c: c["model_args"].update(bias=True), "its model_args say bias=True"),
    "third arm": (lambda c: c["model_args"].update(use_nGPT=2), "its model_args say use_nGPT=2"),
    "other arm": (lambda c: c["model_args"].update(use_nGPT=0), "it has no rmsnorm_f.weight"),
    "no width": (lambda c: c["model_args"].update(n_embd=0), "its model_args say n_embd=0"),
    "half a head": (lambda c: c["model_args"].update(n_head=3), "n_heads=3 does not divide d_model=8"),
    "no scale": (lambda c: c["model_args"].update(base_scale=0.0), "its model_args say base_scale=0.0"),
    "a layer more": (lambda c: c["model_args"].update(n_layer=3), "say n_layer=3, and it holds 2 layers"),
    "endless layers": (lambda c: c["model_args"].update(n_layer=10**12), "and it holds 2 layers"),
    "other width": (lambda c: c["model_args"].update(n_embd=16), "has the shape (300, 8), and its model_args ask for"),
    "endless width": (lambda c: c["model_args"].update(n_embd=2**60), "has the shape (300, 8)"),
    "a weight less": (lambda c: without(c, "model", f"{LAYER}.suv"), f"it has no {LAYER}.suv"),
    "a weight more": (lambda c: c["model"].update({f"{LAYER}.gate": torch.ones(2)}), f"it holds {LAYER}.gate"),
    "a name that is none": (lambda c: c["model"].update({5: torch.ones(2)}), "'model' is not a dictionary of tensors"),
    "a cut name": (lambda c: c["model"].update({"transformer.h.7": torch.ones(2)}), "it holds transformer.h.7"),
    "a short weight": (
        lambda c: c["model"].update({f"{LAYER}.sqk": torch.ones(7)}),
        f"its {LAYER}.sqk has the shape (7,), and its model_args ask for (8,)",
    ),
    "whole numbers": (
        lambda c: c["model"].update({f"{LAYER}.sqk": torch.ones(8, dtype=torch.long)}),
        f"its {LAYER}.sqk is not a tensor of floating point numbers",
    ),
    "no tensor": (lambda c: c["model"].update({f"{LAYER}.sqk": c["config"]}), f"its {LAYER}.sqk is not a tensor"),
    "no moments": (lambda c: without(c, "optimizer", "state"), "its optimizer state is not that of train.py's AdamW"),
    "a moment less": (lambda c: without(c, "optimizer", "state", 3), "its optimizer state is not that of"),  # type: ignore[arg-type]
    "sgd": (lambda c: without(c, "optimizer", "state", 3, "exp_avg"), "its optimizer state is not that of"),  # type: ignore[arg-type]
    "a short moment": (
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(3)),
        "its exp_avg of transformer.wte.weight has the shape (3,)",
    ),
    "a parameter less": (
        lambda c: c["optimizer"]["param_groups"].pop(),
        "its optimizer has 14 parameters, and its model",
    ),
    "no rate": (lambda c: c["optimizer"]["param_groups"][0].update(lr=None), "its optimizer state is not that of"),
    "two steps": (
        lambda c: c["optimizer"]["state"][0].update(step=torch.ones(2)),
        "its optimizer state is not that of train.py's AdamW",
    ),
}


@pytest.mark.parametrize("how", sorted(BREAK))
def test_a_file_that_does_not_fit_itself_is_refused(how: str, save: Save) -> None:
    content = their_content()
    damage, message = BREAK[how]
    damage(content)
    assert message in refused(save(content))


def test_a_file_that_holds_something_else(save: Save) -> None:
    assert "it holds a list instead of a dictionary" in refused(save([1, 2]))
    assert "it has no 'model'" in refused(save({"transformer.wte.weight": torch.ones(2)}))


def test_an_unknown_rope_is_refused(save: Save) -> None:
    with pytest.raises(ValueError, match="rope must be 'standard', 'nvidia' or 'none', got 'own'"):
        load_checkpoint(save(their_content()), rope="own")


# ------------------------------------------------------------------------------------------ the command


@pytest.mark.row("NVIDIA/ngpt checkpoints")
@pytest.mark.parametrize("rope", ["nvidia", "standard"])
@pytest.mark.parametrize("use_ngpt", [0, 1])
def test_import_writes_a_run_directory(use_ngpt: int, rope: str, save: Save, command: Command, tmp_path: Path) -> None:
    path, out = save(their_content(use_nGPT=use_ngpt)), tmp_path / "runs" / "imported"
    answer = command("import", "nvidia", path, out, "--rope", rope)
    assert answer.code == 0
    assert f"departure from the sphere {departure(load_checkpoint(path, rope)):.1e}" in answer.out + answer.err
    wanted, tokens = load_checkpoint(path, rope), torch.randint(300, (2, 9))
    for run in (out, out / "checkpoints" / "step-00000001"):
        model = load_model(run)
        assert model.config == wanted.config
        assert torch.equal(model(tokens), wanted(tokens))
    config = read_config(out / "config.json")
    assert (config.arm, config.recipe, config.train.steps, config.train.seq_len) == (
        ("gpt", "ngpt")[use_ngpt],
        "imported",
        1,
        16,
    )
    stored = json.loads((out / "config.json").read_text())["imported"]
    assert stored["format"] == "NVIDIA/ngpt"
    assert stored["path"] == str(path)
    assert stored["model_args"]["base_scale"] == 0.125
    assert load_file(out / "checkpoints" / "step-00000001" / "optimizer.safetensors").keys() == {"random_state"}


def test_import_keeps_the_moments_where_asked(save: Save, command: Command, tmp_path: Path) -> None:
    path, out = save(their_content()), tmp_path / "run"
    assert command("import", "nvidia", path, out, "--moments").code == 0
    read = read_checkpoint(path)
    model = load_model(out)
    optimizer = build_optimizer(model, read_config(out / "config.json").optim)
    progress = saved.load_checkpoint(out / "checkpoints" / "step-00000001", model, optimizer)
    assert progress.step == 1
    for name, parameter in model.named_parameters():
        for key, moment in read.moments[name].items():
            assert torch.equal(optimizer.state[parameter][key], moment.float()), (name, key)


def test_import_with_a_tokenizer_can_write_text(save: Save, command: Command, tmp_path: Path) -> None:
    path, out = save(their_content(vocab_size=257)), tmp_path / "run"
    assert command("import", "nvidia", path, out, "--tokenizer", "bytes").code == 0
    answer = command("generate", out, "--prompt", "ab", "--max-new-tokens", "5", "--top-k", "1")
    assert (answer.code, answer.out[:2]) == (0, "ab"), answer.err


def test_import_refuses_a_directory_that_holds_something(save: Save, command: Command, tmp_path: Path) -> None:
    path, out = save(their_content()), tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    answer = command("import", "nvidia", path, out)
    assert answer.code == 2
    assert answer.err == f"spherelm: {out} already holds something: choose another directory for the imported run\n"
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    assert command("import", "nvidia", path, out / "notes.txt").code == 2


def test_import_of_what_cannot_be_read_leaves_nothing(save: Save, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    harmful = save({"model": Harm(os.system, f"touch {tmp_path / 'harmed'}")})
    answer = command("import", "nvidia", harmful, out)
    assert (answer.code, answer.out, len(answer.shown)) == (2, "", 1)
    assert "system, which train.py does not store" in answer.err
    assert command("import", "nvidia", tmp_path / "none.pt", out).code == 2
    answer = command("import", "nvidia", save(their_content(vocab_size=256)), out, "--tokenizer", "bytes")
    assert (answer.code, "bytes has 257 token ids, the model" in answer.err) == (2, True)
    assert not out.exists()
    assert not (tmp_path / "harmed").exists()


def test_import_that_fails_half_way_leaves_nothing(
    save: Save, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved.CheckpointWriter, "_write", full)
    answer = command("import", "nvidia", save(their_content()), tmp_path / "run")
    assert (answer.code, "No space left on device" in answer.err) == (2, True)
    assert not (tmp_path / "run").exists()
