"""Names of parameters, arms and fields in files of version 0.1.0, and their names today.
Only this module reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

TOP = {"head": "head.linear", "norm": "head.norm", "s_z": "head.s_z"}
OF_TOP = re.compile(r"(?P<above>(?:.*\.)?)(?P<module>head|norm|s_z)\.(?P<rest>weight|value|lora_[\w.]+)")
OF_LETTER = {"a": "attention", "c": "cross_attention", "m": "mlp"}
SUBLAYERS = {"attention": "attention", "cross": "cross_attention", "mlp": "mlp", "mamba": "mixer", "experts": "experts"}
BLOCK = re.compile(r"(?P<block>(?:.*\.)?blocks\.\d+\.)(?P<rest>.+)")


def is_old(names: Iterable[str]) -> bool:
    """Whether these are the names of a state dict of version 0.1.0, with or without a prefix such as "model."."""
    return not any(".part." in name for name in names)


def renames(names: Iterable[str]) -> dict[str, str]:
    """For each name of version 0.1.0 the name of today."""
    names = list(names)
    only: dict[str, str] = {}
    for name in names:
        match = BLOCK.fullmatch(name)
        if match and match["rest"].split(".")[0] in SUBLAYERS:
            only[match["block"]] = SUBLAYERS[match["rest"].split(".")[0]]  # of a block with one part, that part
    return {name: _renamed(name, only) for name in names}


def _renamed(name: str, only: Mapping[str, str]) -> str:
    match = BLOCK.fullmatch(name)
    if match is None:
        top = OF_TOP.fullmatch(name)
        if top is None or top["above"].endswith(("encoder.", "head.")):  # of both there are such of today
            return name
        return f"{top['above']}{TOP[top['module']]}.{top['rest']}"
    block, (first, _, rest) = match["block"], match["rest"].partition(".")
    if first in SUBLAYERS:
        return f"{block}{SUBLAYERS[first]}.part.{rest}"
    kind, _, letter = first.partition("_")  # norm_a, alpha_m; of a block with one part norm, alpha
    sublayer = OF_LETTER.get(letter) if letter else only.get(block)
    return f"{block}{sublayer}.{kind}.{rest}" if sublayer else name


def adapter_today(name: str) -> str:
    """The name of today of a part of peft's adapters on a model, as any version named it."""
    return name if ".part." in name else _renamed(name, {})


def today(state: Mapping[str, Value]) -> dict[str, Value]:
    """`state`, of any version, by the names of today."""
    new = renames(state) if is_old(state) else {name: name for name in state}
    return {new[name]: value for name, value in state.items()}


FORMER_ARMS = {
    **{arm: ("gpt", arm) for arm in ("encdec", "encoder")},
    **{f"n{arm}": ("ngpt", arm) for arm in ("encdec", "encoder")},
    "hybrid": ("gpt", "decoder"),
    "nhybrid": ("ngpt", "decoder"),
}
"""The arm and the architecture of each arm of 0.1.0 that no longer exists."""

MIXER = ("mamba_expand", "mamba_d_head", "mamba_d_state", "mamba_groups", "mamba_conv", "mamba_chunk")
EXPERTS = ("n_experts", "experts_per_token", "n_shared_experts", "d_expert", "router_score", "balance")
ARCHITECTURE = ("pattern", "n_encoder_layers", "share_embeddings", "hidden_part")
VARIANT = ("step", "alpha_sign", "qk_norm")
SCALE_FIELD = re.compile(r"(alpha|s_[a-z]+)_(init|scale|form)")


def is_field(name: str) -> bool:
    """Whether version 0.1.0 had this field of an arm's own in a flat config."""
    own = (*VARIANT, *MIXER, *EXPERTS, *ARCHITECTURE, "init_std", "logit_preconditioning", "common_start")
    return name in own or SCALE_FIELD.fullmatch(name) is not None


def arm_today(arm: str) -> str:
    """The present name of an arm of any version."""
    return FORMER_ARMS.get(arm, (arm, ""))[0]


def fields_today(arm: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model's config, as any version wrote them for `arm`, as plain values of today's config."""
    found: dict[str, Any] = {}
    flat: dict[str, Any] = {}  # of the architecture
    for name, value in fields.items():
        scale = SCALE_FIELD.fullmatch(name)
        if scale:
            found.setdefault(scale[1], {})[scale[2]] = value
        elif name in VARIANT and arm_today(arm) == "ngpt":  # "qk_norm" is a GPT's own field, of today
            found.setdefault("variant", {})[name] = value
        elif name in MIXER or name in EXPERTS:
            flat.setdefault("mixer" if name in MIXER else "experts", {})[name] = value
        elif name in ARCHITECTURE:
            flat[name] = value
        else:
            found[name] = value
    if arm in FORMER_ARMS or flat:
        found["architecture"] = {"kind": FORMER_ARMS.get(arm, (arm, "decoder"))[1], **flat}
    return found


RULE = {
    "adamw": ("betas", "eps"),
    "gated_adamw": ("betas", "eps", "eps_gate", "gate_sharpness", "gated_step"),
    "muon": ("betas", "eps", "momentum"),
}
"""The fields of each optimizer, which stood beside those that all have."""


def with_matrix_multiplier(optim: Mapping[str, Any]) -> Mapping[str, Any]:
    """`optim` with the multiplier of the matrices in place of `matrix_lr`, a rate of their own that was once there."""
    rate, peak, multipliers = optim.get("matrix_lr"), optim.get("lr"), optim.get("multipliers", {})
    rest = {name: value for name, value in optim.items() if name != "matrix_lr"}
    if rate is None:
        return rest
    numbers = isinstance(rate, int | float) and isinstance(peak, int | float) and peak > 0
    if not (numbers and isinstance(multipliers, Mapping)):
        return optim  # refused as an unknown field
    return {**rest, "multipliers": {**multipliers, "matrix": rate / peak}}


def optim_today(optim: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an optimizer's config, as any version wrote them, as plain values of today's."""
    optim = with_matrix_multiplier(optim)
    rule = optim.get("optimizer")
    if isinstance(rule, Mapping):
        return {
            **optim,
            "optimizer": {n: v for n, v in rule.items() if (n, v) != ("tangent", False)},
        }  # gone: it was no gain
    if not isinstance(rule, str) or rule not in RULE:
        return dict(optim)
    own = {name for names in RULE.values() for name in names} | ({"tangent"} if not optim.get("tangent") else set())
    common = {name: value for name, value in optim.items() if name not in own}
    return {**common, "optimizer": {"kind": rule, **{name: optim[name] for name in RULE[rule] if name in optim}}}
