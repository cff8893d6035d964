"""The law: from a shape, the tokens of an update and the number of updates to every choice of a run. One for all sizes.

A rate is `constant * (steps / 1000)^-length * (tokens of an update / 1024)^batch`, over a unit of width. Muon turns a
unit vector by its rate, Adam by its rate times sqrt(d_model): on the sphere these constants are angles in radians. A
logit is a sum over d_model numbers, so the output embedding's rate goes with 1/d_model in both arms (Yang et al., arXiv
2203.03466). GPT's blocks first add numbers that grow as sqrt(d_model); the input embedding's rate keeps pace.
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
    "matrix.gpt": Constant(0.0165, "rate of matrices, gains, routers at 1000 updates of 1024 tokens", "law.json"),
    "matrix.ngpt": Constant(0.032, "Muon's angle of block matrices there, in radians", "law.json"),
    "input.gpt": Constant(0.008125, "Adam's rate of the input embedding there, over sqrt(d_model)", "law.json"),
    "input.ngpt": Constant(0.043, "Adam's angle of the input embedding, scales, gains, routers there", "law.json"),
    "output.gpt": Constant(1.5, "Adam's rate of the output embedding there, times d_model", "law.json"),
    "output.ngpt": Constant(0.53, "Adam's rate of the output embedding there, times d_model", "law.json"),
    "length.muon": Constant(0.55, "Muon's rates fall with updates to this power", "law.json, ladder.json"),
    "length.adam": Constant(0.3, "Adam's rates fall with updates to this power", "law.json, ladder.json"),
    "batch": Constant(0.18, "rates rise with the tokens of an update to this, but of scales and gains", "law.json"),
    "vocabulary.gpt": Constant(0.15, "matrices fall, the output rises with (vocabulary / 4096)^this", "law.json"),
    "gains.gpt": Constant(0.4, "gains, routers: (vocabulary / 4096)^this below 4096 entries", "law.json"),
    "depth.gpt": Constant(0.4, "GPT's matrices: fall with (layers / 2) to this power", "law.json"),
    "mixers.gpt": Constant(0.4, "GPT's matrices, where a pattern has Mamba mixers: times this", "law.json"),
    "decay.gpt": Constant(0.25, "sum over a run of peak rate times weight decay", "law.json"),
    "memory": Constant(6.2, "Adam's beta 1 remembers sqrt(steps) / 6.2 updates, 2 to 10; Muon twice", "betas.json"),
    "second": Constant(0.95, "beta 2 at 524288 tokens an update, as many tokens elsewhere: to 0.99", "nGPT, Table 3"),
    "alpha": Constant(0.05, "eigen learning rates of 24 layers at the start, as 1/sqrt(layers)", "nGPT, Table 3"),
    "common": Constant(8.0, "weight of the direction that the rows of an embedding share at the start", "starts.json"),
    "spread": Constant(0.25, "spread of the logits, and of attention's scores, at the start", "law.json, starts.json"),
    "s_z": Constant(1.4, "what s_z is stored at: the lower, the faster it learns", "s-z-tuning.json"),
}
"""All numbers of the law, and where each comes from."""

SHORTEST = 100
"""Updates of the shortest run that the powers are carried to; one of two updates would turn vectors by a radian."""


class Number(NamedTuple):
    """A choice of the law, and the constants that it comes from."""

    value: float
    constants: tuple[str, ...]


def numbers(arm: str, preset: Preset) -> dict[str, Number]:
    """Every number that the law chooses for `arm` at this shape and length, by its field."""
    of = {name: constant.value for name, constant in CONSTANTS.items()}
    steps, tokens, width = max(SHORTEST, preset.steps), preset.batch_size * preset.seq_len, math.sqrt(preset.d_model)
    layers, pattern = depth(preset.architecture, preset.n_layers), getattr(preset.architecture, "pattern", None) or ""
    horizon = min(10.0, max(2.0, math.sqrt(steps) / of["memory"]))
    batch, entries = ("batch", tokens / 1024, 1), (preset.vocab_size or 4096) / 4096
    powers = {"matrix": [batch], "input": [batch], "output": [batch], "vector": []}
    if arm == "gpt":
        powers["matrix"] += [("vocabulary.gpt", entries, -1), ("depth.gpt", layers / 2, -1)]
        powers |= {"output": [batch, ("vocabulary.gpt", entries, 1)], "vector": [("gains.gpt", min(1.0, entries), 1)]}

    def rate(role: str, kind: str, unit: float, at: str = "") -> Number:
        constant, own = at or f"{role}.{arm}", [(f"length.{kind}", steps / 1000, -1), *powers[role]]
        value = of[constant] * math.prod(ratio ** (sign * of[name]) for name, ratio, sign in own)
        return Number(value / unit, (constant, *(name for name, _, _ in own)))

    matrix, unit = rate("matrix", "muon", 1.0), width if arm == "ngpt" else 1.0
    if arm == "gpt" and "M" in pattern:
        matrix = Number(matrix.value * of["mixers.gpt"], (*matrix.constants, "mixers.gpt"))
    vector = rate("vector", "adam", unit, "input.ngpt" if arm == "ngpt" else "matrix.gpt")
    relative = dict.fromkeys(("router", "scale", "gain") if arm == "ngpt" else ("router", "gain"), vector)
    relative |= {"input_embedding": rate("input", "adam", unit if arm == "ngpt" else 1 / width)}
    relative |= {"output_embedding": rate("output", "adam", preset.d_model)}
    found = {
        "lr": matrix,
        **{f"{role}_rate": Number(own.value / matrix.value, own.constants) for role, own in relative.items()},
        "first_beta": Number(1 - 1 / horizon, ("memory",)),
        "second_beta": Number(min(0.99, max(0.95, of["second"] ** (tokens / 524288))), ("second",)),
        "momentum": Number(1 - 1 / (2 * horizon), ("memory",)),
    }
    if arm == "gpt":
        return found | {"weight_decay": Number(of["decay.gpt"] / (steps * matrix.value), ("decay.gpt",))}
    return found | {
        "alpha.init": Number(of["alpha"] * math.sqrt(24 / layers), ("alpha",)),
        "common_start": Number(of["common"], ("common",)),
        "s_qk.init": Number(math.sqrt(of["spread"]), ("spread",)),
        "s_z.init": Number(of["spread"] * of["common"] * width, ("spread", "common")),
        "s_z.scale": Number(of["s_z"], ("s_z",)),
    }


def law(arm: str, preset: Preset) -> Choices:
    """The default: every choice follows from shape, tokens of an update and number of updates (docs/recipes.md).

    Muon for block matrices and Adam beside it, linearly to 0. The baseline has a norm of queries and keys and warms up
    over a tenth of the run, 2000 updates at most.
    """
    found = {name: number.value for name, number in numbers(arm, preset).items()}
    multipliers = RateMultipliers(**{role: found.pop(f"{role}_rate", 1.0) for role in ROLES})
    betas = (found.pop("first_beta"), found.pop("second_beta"))
    optim = {"optimizer": "muon", "betas": betas, "momentum": found.pop("momentum"), "multipliers": multipliers}
    model = shared_embeddings(preset.architecture)
    if arm == "gpt":
        optim["weight_decay"], model["qk_norm"] = found.pop("weight_decay"), True
    warmup = 0 if arm == "ngpt" else min(2000, preset.steps // 10)
    return Choices(found.pop("lr"), {**model, **found}, optim, ScheduleConfig("linear", warmup_steps=warmup))
