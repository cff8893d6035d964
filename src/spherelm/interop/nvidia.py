"""Checkpoints of NVIDIA/ngpt: the `ckpt.pt` that its train.py writes, both arms, read without running anything in it.

Their names and layouts against ours: `c_fc` stacks the rows of `W_u` over those of `W_v`, and `suv` their scales; `sqk`
is flat over heads and channels; block matrices and their moments are bfloat16. Scales are stored as here, with
`base_scale` for a start (1 for `suv`). Their code multiplies both `u` and `v` by sqrt(n_embd), the paper and this
package only `v`: a factor on the whole output of the MLP, which its Norm takes away again, so the function and its
gradients are the same.

Their rotary formula, and a step that normalizes the point that it starts from, are `rope="nvidia"`, see
`load_checkpoint`.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spherelm.errors import NotFoundError, UserError
from spherelm.layers.linear import retract
from spherelm.models import Config, Decoder, GPTConfig, NGPTConfig, ScaleSpec, Variant, build

STORAGES = ("BFloat16", "Half", "Float", "Double", "Byte", "Int", "Long")
TENSORS = (
    "torch._utils._rebuild_tensor_v2",
    "collections.OrderedDict",
    "_codecs.encode",  # makes bytes of text, how protocol 2 of pickle writes them
    *(f"torch.{name}Storage" for name in STORAGES),
)
"""The types that torch's own restricted reader allows in a pickle: tensors, ordered dictionaries, bytes."""

FOREIGN = (
    "model.GPTConfig",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("_core", "core") for name in ("_reconstruct", "scalar")),
)
"""Other types that train.py stores, in its config and numpy's random state: read as `Inert`."""

TOP_NAMES = {
    "transformer.wte.weight": "embed.weight",
    "lm_head.weight": "head.linear.weight",
    "rmsnorm_f.weight": "head.norm.weight",
    "sz": "head.s_z.value",
}
BLOCK_NAMES = {
    "query.weight": "attention.part.q.weight",
    "key.weight": "attention.part.k.weight",
    "value.weight": "attention.part.v.weight",
    "att_c_proj.weight": "attention.part.o.weight",
    "mlp_c_proj.weight": "mlp.part.o.weight",
    "rmsnorm_att.weight": "attention.norm.weight",
    "rmsnorm_mlp.weight": "mlp.norm.weight",
    "attn_alpha": "attention.alpha.value",
    "mlp_alpha": "mlp.alpha.value",
    "sqk": "attention.part.s_qk.value",
}
STACKED = {
    "c_fc.weight": ("mlp.part.u.weight", "mlp.part.v.weight"),
    "suv": ("mlp.part.s_u.value", "mlp.part.s_v.value"),
}
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


class Inert:
    """Takes the place of a class or function named in a pickle: swallows its arguments and its state, does nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class ModelArgs:
    """The shape of their model, under their names. `bias` and `dropout` as given; their forward pass has no dropout.

    Raises `ValueError` for a value that makes no model here.
    """

    use_nGPT: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    base_scale: float
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"its model_args say {name}={value!r}, which must be a positive whole number")
        if self.use_nGPT not in (0, 1):
            raise UserError(f"its model_args say use_nGPT={self.use_nGPT!r}, which must be 0 or 1")
        if not isinstance(self.base_scale, int | float) or not 0 < self.base_scale < math.inf:
            raise UserError(f"its model_args say base_scale={self.base_scale!r}, which must be a positive number")
        if self.bias:
            raise UserError("its model_args say bias=True, and the models here have no biases")
        self.config("standard")

    def config(self, rope: str) -> Config:
        """The config of the same model here; rope as in `load_checkpoint`."""
        shape: dict[str, Any] = {"vocab_size": self.vocab_size, "n_layers": self.n_layer, "d_model": self.n_embd}
        shape |= {"n_heads": self.n_head, "max_seq_len": self.block_size, "rope": rope}
        if not self.use_nGPT:
            return GPTConfig(**shape, init_std=self.base_scale)
        one, variant = ScaleSpec(1.0, self.base_scale), Variant("nvidia" if rope == "nvidia" else "lerp")
        return NGPTConfig(**shape, alpha=ScaleSpec(0.05, self.base_scale), s_qk=one, s_z=one, variant=variant)


@dataclass(frozen=True)
class NvidiaCheckpoint:
    """The content of a `ckpt.pt`, by our parameter names and in our layouts, every number and dtype as stored.

    weights: {name: tensor}. moments: {name: {"step", "exp_avg", "exp_avg_sq"}}, Adam's state; empty if
    the file has none.
    optimizer: their lr (as it stood then), betas, eps and weight_decay (of the matrices); empty without moments.
    iteration: updates made.
    """

    model_args: ModelArgs
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    iteration: int


def load_checkpoint(path: str | Path, rope: str = "nvidia") -> Decoder:
    """The model in the file `path` that NVIDIA/ngpt's train.py wrote: a `GPT` or an `NGPT`, float32, in eval mode.

    rope: "nvidia" for what their code computes, to rounding: their rotary formula, and the matrices of a normalized
    model as stored, which is off the sphere by their bfloat16 (`departure` tells how far). "standard" for the
    paper's model on the same weights: a true rotation, and every matrix put back on the sphere. Raises as
    `read_checkpoint`.
    """
    return to_model(read_checkpoint(path), rope)


@torch.no_grad()
def to_model(checkpoint: NvidiaCheckpoint, rope: str = "nvidia") -> Decoder:
    """The model of a checkpoint that was read, see `load_checkpoint`. Shares no memory with it."""
    with torch.device("meta"):
        model = build(checkpoint.model_args.config(rope))
    weights = {
        name: w.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, w in checkpoint.weights.items()
    }
    model.load_state_dict(weights, assign=True)
    if rope == "standard":
        retract(model)
    return model.eval()


def load_optimizer(checkpoint: NvidiaCheckpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Put the checkpoint's moments and step counts into `optimizer`, an Adam over the parameters of `model`.

    `optimizer` keeps its own rates, and the retraction that `build_optimizer` attached (which put the weights on the
    sphere). Raises `ValueError` if the file held no moments or `model` is another.
    """
    if not checkpoint.moments:
        raise UserError("the checkpoint holds no optimizer state: its moments cannot be loaded")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {}
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        moments = checkpoint.moments.get(names.get(id(parameter), ""))
        if moments is None or moments["exp_avg"].shape != parameter.shape:
            raise UserError(f"the checkpoint's moments belong to another model: {names.get(id(parameter))} differs")
        state[i] = {key: value.clone() for key, value in moments.items()}
    if len(state) != len(checkpoint.moments):
        raise UserError(
            f"the checkpoint has moments of {len(checkpoint.moments)} parameters, the optimizer {len(state)}"
        )
    # The optimizer itself gives every tensor the dtype and the device that it wants.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_checkpoint(path: str | Path) -> NvidiaCheckpoint:
    """Read the file `path` that NVIDIA/ngpt's train.py wrote, tensors on the CPU.

    Nothing in the file is run and no class of it is made. Raises `FileNotFoundError`, and `ValueError` in one line for
    a file that is damaged, names anything that train.py does not store (by that name), or does not fit its
    own `model_args`.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no file {path}: give the ckpt.pt that train.py wrote")
    try:
        return _checkpoint(_content(path))
    except ValueError as error:
        raise UserError(f"{path} is not a readable NVIDIA/ngpt checkpoint: {' '.join(str(error).split())}") from error


def to_ours(tensors: Mapping[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """Tensors under NVIDIA/ngpt's parameter names, in its layouts, under ours and in ours;
    values untouched, memory shared.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, rest = _split(name)
        if rest in STACKED:
            ours |= {prefix + half: part for half, part in zip(STACKED[rest], tensor.chunk(2), strict=True)}
        elif rest == "sqk":
            ours[prefix + BLOCK_NAMES[rest]] = tensor.reshape(n_heads, -1)
        else:
            ours[prefix + BLOCK_NAMES[rest] if prefix else TOP_NAMES[rest]] = tensor
    return ours


def _split(name: str) -> tuple[str, str]:
    """`transformer.h.3.sqk` as ("blocks.3.", "sqk"); a name outside of the blocks keeps an empty prefix."""
    if not name.startswith("transformer.h."):
        return "", name
    _, _, index, rest = name.split(".", 3)
    return f"blocks.{index}.", rest


def _shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Every parameter of their model, by their name."""
    d, d_ff = args.n_embd, 4 * args.n_embd
    top: dict[str, tuple[int, ...]] = dict.fromkeys(("transformer.wte.weight", "lm_head.weight"), (args.vocab_size, d))
    block: dict[str, tuple[int, ...]] = {"c_fc.weight": (2 * d_ff, d), "mlp_c_proj.weight": (d, d_ff)}
    block |= dict.fromkeys(("query.weight", "key.weight", "value.weight", "att_c_proj.weight"), (d, d))
    if args.use_nGPT:
        top["sz"] = (args.vocab_size,)
        block |= {"attn_alpha": (d,), "mlp_alpha": (d,), "sqk": (d,), "suv": (2 * d_ff,)}
    else:
        top["rmsnorm_f.weight"] = (d,)
        block |= {"rmsnorm_att.weight": (d,), "rmsnorm_mlp.weight": (d,)}
    return top | {f"transformer.h.{i}.{name}": shape for i in range(args.n_layer) for name, shape in block.items()}


def _content(path: Path) -> Any:
    """The objects pickled in the file: containers, numbers, text, tensors, and `Inert` for the types in `FOREIGN`."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl"]
            if len(pickles) != 1:
                raise UserError(f"it holds {len(pickles)} files called data.pkl, where torch.save writes one")
            _refuse_unknown_entries(archive.read(pickles[0]))
            damaged = archive.testzip()  # torch.load does not compare the checksums that torch.save stored
            if damaged is not None:
                raise UserError(f"its {damaged} is damaged (the checksum differs): copy the file again")
        with torch.serialization.safe_globals([(Inert, name) for name in FOREIGN]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError, ValueError):
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        # Where torch's restricted reader refuses a file, its message recommends to read it without the restriction.
        refused = type(error).__name__ == "UnpicklingError"
        reason = "it is damaged, or train.py did not write it" if refused else error
        raise UserError(f"{type(error).__name__}: {reason}") from error


def _refuse_unknown_entries(pickled: bytes) -> None:
    """Raise `ValueError` naming the first class or function in a pickle that train.py has no reason to store there.

    The pickle is only taken apart here, as text would be. Reading it afterwards is torch's restricted reader, which
    refuses too, but goes by a list that any code in this process can lengthen.
    """
    for name in _named(pickled):
        if name not in TENSORS and name not in FOREIGN:
            raise UserError(f"it names {name}, which train.py does not store: nothing of it was loaded")
    newest = max(opcode.proto for opcode, _, _ in pickletools.genops(pickled))
    if newest > 2:
        raise UserError(f"it is written in pickle protocol {newest}, where torch.save writes 2")


def _named(pickled: bytes) -> Iterator[str]:
    """The full name of every class and function that a pickle asks for.

    Beyond protocol 2 a name is two texts on the stack, guessed here to be the last two; such files are refused anyway.
    """
    texts: deque[str | None] = deque((None, None), maxlen=2)
    memo: list[str | None] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            yield _name_now(*str(argument).split(" ", 1))
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(map(str, texts))
        elif opcode.name.startswith("EXT"):
            yield f"the registered extension {argument}"
        elif opcode.name == "MEMOIZE":
            memo.append(texts[-1])
        elif opcode.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
            texts.append(memo[argument] if argument < len(memo) else None)
        elif isinstance(argument, str):
            texts.append(argument)


def _name_now(module: str, name: str) -> str:
    """The full name today of what protocol 2 of pickle calls by its name in Python 2."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _checkpoint(content: Any) -> NvidiaCheckpoint:
    """The record of what was pickled; `ValueError` for what train.py does not write."""
    if not isinstance(content, dict):
        raise UserError(f"it holds a {type(content).__name__} instead of a dictionary")
    for key in ("model", "model_args", "iter_num"):
        if key not in content:
            raise UserError(f"it has no {key!r}")
    iteration = content["iter_num"]
    if not isinstance(iteration, int) or iteration < 0:
        raise UserError(f"its iter_num is {iteration!r}, which must be a whole number from 0")
    args = _model_args(content["model_args"])
    theirs = _weights(content["model"], args)
    moments, optimizer = _moments(content["optimizer"], theirs, args.n_head) if "optimizer" in content else ({}, {})
    return NvidiaCheckpoint(args, to_ours(theirs, args.n_head), moments, optimizer, iteration)


def _model_args(stored: Any) -> ModelArgs:
    fields = dataclasses.fields(ModelArgs)
    if not isinstance(stored, dict):
        raise UserError(f"its model_args are a {type(stored).__name__} instead of a dictionary")
    for name in sorted(stored.keys() - {field.name for field in fields}, key=str):
        raise UserError(f"its model_args say {name}={stored[name]!r}, which is not known here")
    for field in fields:
        if field.name not in stored and field.default is dataclasses.MISSING:
            raise UserError(f"its model_args do not say {field.name}")
    return ModelArgs(**stored)


def _weights(stored: Any, args: ModelArgs) -> dict[str, Tensor]:
    """The weights by their names in the file's order; `ValueError` if they are not those of `args`."""
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise UserError("its 'model' is not a dictionary of tensors")
    # torch.compile puts its name in front
    theirs = {name.removeprefix("_orig_mod."): tensor for name, tensor in stored.items()}
    layers = len({_split(name)[0] for name in theirs if name.startswith("transformer.h.") and name.count(".") > 2})
    if layers != args.n_layer:
        raise UserError(f"its model_args say n_layer={args.n_layer}, and it holds {layers} layers")
    shapes = _shapes(args)
    for name in sorted(shapes.keys() ^ theirs.keys()):
        raise UserError(f"it has no {name}" if name in shapes else f"it holds {name}, which is not known here")
    for name, shape in shapes.items():
        _check_tensor(name, theirs[name], shape)
    return theirs


def _check_tensor(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise UserError(f"its {name} is not a tensor of floating point numbers")
    if tensor.shape != shape:
        raise UserError(f"its {name} has the shape {tuple(tensor.shape)}, and its model_args ask for {shape}")


def _moments(
    stored: Any, theirs: dict[str, Tensor], n_heads: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Adam's state by our names and the settings of their optimizer.

    Their optimizer knows parameters by number: first all matrices, then all vectors, each in the order of the model.
    """
    try:
        order = [name for name, w in theirs.items() if w.ndim >= 2] + [name for name, w in theirs.items() if w.ndim < 2]
        numbers = [number for group in stored["param_groups"] for number in group["params"]]
        if len(numbers) != len(order):
            raise UserError(f"its optimizer has {len(numbers)} parameters, and its model {len(order)}")
        state = {name: stored["state"][number] for name, number in zip(order, numbers, strict=True)}
        group = stored["param_groups"][0]
        settings: dict[str, Any] = {key: float(group[key]) for key in ("lr", "eps", "weight_decay")}
        settings["betas"] = (float(group["betas"][0]), float(group["betas"][1]))
        found: dict[str, dict[str, Tensor]] = {}
        for key in MOMENT_NAMES:
            for name, w in theirs.items():
                _check_tensor(f"{key} of {name}", state[name][key], tuple(w.shape))
            for name, moment in to_ours({name: state[name][key] for name in theirs}, n_heads).items():
                found.setdefault(name, {})[key] = moment
        steps = {
            name: torch.as_tensor(state[name]["step"]).float().reshape(()).expand(w.shape) for name, w in theirs.items()
        }
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise UserError(f"its optimizer state is not that of train.py's AdamW ({error!r})") from error
    for name, step in to_ours(steps, n_heads).items():
        found[name]["step"] = step[(0,) * step.ndim].clone()
    return found, settings
