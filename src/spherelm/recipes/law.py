"""The law: from a shape, the tokens of an update and the number of updates to every choice of a run. One for all sizes.

A rate is `constant * (steps / 1000)^-length * (tokens of an update / 1024)^batch`. Muon turns a unit vector by its
rate, whatever the width. Adam moves each number by its rate, and so turns a unit vector of d_model numbers by `rate *
sqrt(d_model)`: on the sphere every constant is an angle in radians, and Adam's rates are the angles over sqrt(d_model).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from spherelm.optim import RateMultipliers, ScheduleConfig
from spherelm.optim.groups import ROLES
from spherelm.recipes.choices import Choices, depth, shared_embeddings
from spherelm.recipes.presets import Preset


class Constant(NamedTuple):
    """A number of the law. means: what it is. source: the runs or the paper that it comes from."""

    value: float
    means: str
    source: str


CONSTANTS: Mapping[str, Constant] = {
    "matrix.gpt": Constant(0.0153, "Muon's rate of block matrices at 1000 updates of 1024 tokens", "law.json"),
    "matrix.ngpt": Constant(0.030, "Muon's angle of block matrices there, in radians", "law.json"),
    "input.gpt": Constant(0.123, "Adam's rate of the input embedding there", "law.json"),
    "input.ngpt": Constant(0.038, "Adam's angle of the input embedding there", "law.json"),
    "output.gpt": Constant(0.016, "Adam's rate of the output embedding and of gains there", "law.json"),
    "output.ngpt": Constant(0.076, "Adam's angle of the output embedding there, and of learned scales", "law.json"),
    "length.muon": Constant(0.55, "how Muon's rates fall with the number of updates", "ladder.json"),
    "length.adam": Constant(
        1 / 3, "how Adam's rates fall with the number of updates", "nuGPT (arXiv 2604.27077), Table 1"
    ),
    "batch": Constant(0.25, "how all rates rise with the tokens of an update", "law.json"),
    "decay.gpt": Constant(0.25, "sum over a run of peak rate times weight decay", "law.json"),
    "memory": Constant(
        6.2, "Adam's first moment remembers sqrt(steps) / 6.2 updates, 2 to 10; Muon twice as many", "betas.json"
    ),
    "second": Constant(
        0.95, "Adam's second beta at 524288 tokens an update; as many tokens elsewhere", "nGPT, Table 3"
    ),
    "alpha": Constant(
        0.05, "eigen learning rates of 24 layers at the start; as 1/sqrt(layers) elsewhere", "nGPT, Table 3"
    ),
    "common": Constant(8.0, "weight of the direction that the rows of an embedding share at the start", "starts.json"),
    "logits": Constant(0.25, "spread of the logits at the start", "law.json"),
    "s_qk": Constant(0.5, "s_qk at the start", "starts.json"),
    "s_z": Constant(1.4, "what s_z is stored at: the lower, the faster it learns", "s-z-tuning.json"),
}
"""All numbers of the law, and where each comes from."""


class Number(NamedTuple):
    """A choice of the law, by the name that `--set` has for it, and the constants that it comes from."""

    value: float
    constants: tuple[str, ...]


def numbers(arm: str, preset: Preset) -> dict[str, Number]:
    """Every number that the law chooses for `arm` at this shape and length, by its field."""
    steps, tokens, width = preset.steps, preset.batch_size * preset.seq_len, math.sqrt(preset.d_model)
    horizon = min(10.0, max(2.0, math.sqrt(steps) / CONSTANTS["memory"].value))
    second = min(0.99, max(0.95, CONSTANTS["second"].value ** (tokens / 524288)))

    def rate(role: str, kind: str, unit: float = 1.0) -> Number:
        names = (f"{role}.{arm}", f"length.{kind}", "batch")
        value, length, batch = (CONSTANTS[name].value for name in names)
        return Number(value * (steps / 1000) ** -length * (tokens / 1024) ** batch / unit, names)

    unit = width if arm == "ngpt" else 1.0
    matrix, embedding, output = rate("matrix", "muon"), rate("input", "adam", unit), rate("output", "adam", unit)
    relative = {"input_embedding": embedding, "output_embedding": output, "scale" if arm == "ngpt" else "gain": output}
    relative |= {"router": output}
    found = {
        "lr": matrix,
        **{f"{role}_rate": Number(own.value / matrix.value, own.constants) for role, own in relative.items()},
        "first_beta": Number(1 - 1 / horizon, ("memory",)),
        "second_beta": Number(second, ("second",)),
        "momentum": Number(1 - 1 / (2 * horizon), ("memory",)),
    }
    if arm == "gpt":
        return {**found, "weight_decay": Number(CONSTANTS["decay.gpt"].value / (steps * matrix.value), ("decay.gpt",))}
    layers, common = depth(preset.architecture, preset.n_layers), CONSTANTS["common"].value
    return {
        **found,
        "alpha.init": Number(CONSTANTS["alpha"].value * math.sqrt(24 / layers), ("alpha",)),
        "common_start": Number(common, ("common",)),
        "s_qk.init": Number(CONSTANTS["s_qk"].value, ("s_qk",)),
        "s_z.init": Number(CONSTANTS["logits"].value * common * width, ("logits", "common")),
        "s_z.scale": Number(CONSTANTS["s_z"].value, ("s_z",)),
    }


def law(arm: str, preset: Preset) -> Choices:
    """The law: every choice follows from shape, tokens of an update and number of updates (docs/recipes.md). The default.

    Muon for block matrices and Adam beside it, linearly to 0, in both arms. The baseline has a norm of queries and keys, and a
    warm-up of a tenth of the run, 2000 updates at most.
    """
    found = {name: number.value for name, number in numbers(arm, preset).items()}
    optim = {
        "optimizer": "muon",
        "betas": (found.pop("first_beta"), found.pop("second_beta")),
        "momentum": found.pop("momentum"),
        "multipliers": RateMultipliers(**{role: found.pop(f"{role}_rate", 1.0) for role in ROLES}),
    }
    model = {**shared_embeddings(preset.architecture)}
    if arm == "gpt":
        optim["weight_decay"] = found.pop("weight_decay")
        model["qk_norm"] = True
    warmup = 0 if arm == "ngpt" else min(2000, preset.steps // 10)
    return Choices(found.pop("lr"), {**model, **found}, optim, ScheduleConfig("linear", warmup_steps=warmup))
