"""Fields of a run that are given one by one: which config each belongs to,
and whether its value is of the field's type.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from spherelm.errors import UserError, nearest, unknown
from spherelm.fields import called
from spherelm.layers.feedforward import MLPS
from spherelm.layers.low_precision import BLOCKS, Precision
from spherelm.models import ARCHITECTURES, ARMS, CONFIGS, Architecture, Config, DecoderArch, NGPTConfig, ScaleSpec
from spherelm.models.config import ExpertSizes, MixerSizes
from spherelm.optim import RULES, OptimConfig, RateMultipliers, ScheduleConfig
from spherelm.optim.groups import ROLES
from spherelm.optim.transfer import BaseShape
from spherelm.runs.config import RunConfig, TrainConfig, part_of_batch
from spherelm.train.estimate import parameters_by_role


def take(given: dict[str, Any], owner: Any, but: Collection[str] = ()) -> dict[str, Any]:
    """Remove from `given` the fields of the dataclass `owner`, all `but` these, and return them."""
    names = [f.name for f in dataclasses.fields(owner) if f.name in given and f.name not in but]
    return {name: given.pop(name) for name in names}


def owners_of(arm: str) -> list[Any]:
    """The dataclasses whose fields make up a run of `arm`."""
    owners: list[Any] = [CONFIGS[arm], *ARCHITECTURES.values(), MixerSizes, ExpertSizes]
    return [*owners, OptimConfig, *RULES.values(), ScheduleConfig, TrainConfig]


def fields_of(arm: str) -> set[str]:
    """Every field of a run of `arm` that can be given one by one, by name or by path."""
    hidden = {"kind", "multipliers", "vocab_size", "mixer", "experts", *GROUPS}
    found = {f.name for owner in owners_of(arm) for f in dataclasses.fields(owner)} - hidden
    groups = {**nested(CONFIGS[arm]), "precision": Precision()}
    found |= {f"{name}.{f.name}" for name, group in groups.items() for f in dataclasses.fields(group)} - {
        "precision.kind"
    }
    own = {f"base_{f.name}" for f in dataclasses.fields(BaseShape)} | {f"{role}_rate" for role in ROLES}
    return found | own | {"schedule", "d_k"}


def model_fields(given: Iterable[str], model: Config) -> dict[str, Any]:
    """The values in `model` of those fields of `given` that are the model's, by name or by path."""
    architecture = model.architecture
    parts: list[Any] = [model, architecture]
    parts += [architecture.mixer, architecture.experts] if isinstance(architecture, DecoderArch) else []
    values = {name: value for part in reversed(parts) for name, value in vars(part).items()}
    values |= {f"{group}.{name}": value for group in nested(type(model)) for name, value in vars(values[group]).items()}
    values |= {"architecture": architecture.kind, "d_k": model.d_k}
    return {name: values[name] for name in given if name in values}


def refuse_unknown(given: Collection[str], config: RunConfig) -> None:
    """Raise `ValueError` for any name in `given`: the run of `config` has none such.
    Say what was meant or who has it.
    """
    arm, kind, known = config.arm, config.model.architecture.kind, fields_of(config.arm)
    for name in sorted(given):
        others = [other for other in ARMS if name in fields_of(other)]
        if name in known:
            owners = ", ".join(other for other in ARCHITECTURES if name in fields_of_architecture(other))
            raise UserError(f"{name} is a field of the architecture {owners}, and this run has {kind}: leave it out")
        if others:
            raise UserError(f"{name} is no field of {arm}, only of {', '.join(others)}: leave it out for {arm}")
    if given:
        paths = {part: f" (did you mean {path!r}?)" for path in sorted(known) for part in path.split(".")}
        near = {name: nearest(name, known) or paths.get(nearest(name, paths, "{}"), "") for name in sorted(given)}
        raise UserError(f"no field is called {', '.join(name + said for name, said in near.items())}")


def fields_of_architecture(kind: str) -> set[str]:
    """Every field of the architecture `kind` that can be given by its name."""
    owners = [ARCHITECTURES[kind], *((MixerSizes, ExpertSizes) if kind == "decoder" else ())]
    return {field.name for owner in owners for field in dataclasses.fields(owner)} - {"kind", "mixer", "experts"}


def heads_of(given: dict[str, Any], d_model: int) -> dict[str, int]:
    """Remove `d_k` from `given`; the number of heads that it makes of the `d_model` there, or of this one."""
    if "d_k" not in given:
        return {}
    d_k = given.pop("d_k")
    width = given.get("d_model", d_model)
    counts = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in (d_k, width))
    if "n_heads" in given or not counts or width % d_k:
        raise UserError(f"d_k={d_k!r} must divide d_model={width!r}, with no n_heads beside it")
    return {"n_heads": width // d_k}


def architecture_of(preset: Architecture, given: dict[str, Any]) -> Architecture:
    """Remove the fields of an architecture from `given` and set them in the preset's,
    or in the one that `given` names.
    """
    kind = given.pop("architecture", preset.kind)
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise unknown("architecture", kind, ARCHITECTURES)
    start = preset if kind == preset.kind else ARCHITECTURES[kind]()
    changed: dict[str, Any] = {}
    if isinstance(start, DecoderArch):
        changed["mixer"] = dataclasses.replace(start.mixer, **take(given, MixerSizes))
        changed["experts"] = dataclasses.replace(start.experts, **take(given, ExpertSizes))
    return dataclasses.replace(start, **changed, **take(given, type(start), but=("kind", "mixer", "experts")))


def layers_of(given: Mapping[str, Any], architecture: Architecture) -> dict[str, int]:
    """The n_layers that a pattern of the architecture makes, where it has one and `given` does not say otherwise."""
    pattern = architecture.pattern if isinstance(architecture, DecoderArch) else None
    if pattern is None:
        return {}
    if given.get("n_layers", len(pattern)) != len(pattern):
        raise UserError(f"pattern {pattern!r} has {len(pattern)} letters: leave out n_layers={given['n_layers']}")
    return {"n_layers": len(pattern)}


def model_config(
    kind: type[Config], architecture: Architecture, chosen: Mapping[str, Any], given: dict[str, Any]
) -> Config:
    """The config of the fields `chosen`, by name or path ("alpha.init"),
    and over them those that are removed from `given`.
    """
    arch_names = {field.name for field in dataclasses.fields(architecture)}
    architecture = dataclasses.replace(
        architecture, **{name: value for name, value in chosen.items() if name in arch_names}
    )
    values: dict[str, Any] = {
        name: value for name, value in chosen.items() if name not in arch_names and "." not in name
    }
    values |= take(given, kind, but=("architecture", *GROUPS))
    for name, group in nested(kind).items():
        fields = {path[len(name) + 1 :]: value for path, value in chosen.items() if path.startswith(f"{name}.")}
        own = {path[len(name) + 1 :]: given.pop(path) for path in list(given) if path.startswith(f"{name}.")}
        fields |= take(own, type(group))
        given |= {f"{name}.{rest}": value for rest, value in own.items()}
        with called(f"{name}.{{}}".format):
            values[name] = dataclasses.replace(group, **fields)
    return kind(architecture=architecture, **values)


def nested(kind: type[Config]) -> dict[str, Any]:
    """The fields of a config that are dataclasses themselves, all but the architecture, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(kind) if field.name in GROUPS}


GROUPS = tuple(
    f.name for f in dataclasses.fields(NGPTConfig) if f.name != "architecture" and dataclasses.is_dataclass(f.default)
)
"""Fields of an `NGPTConfig` whose own fields are set by paths, such as "alpha.init"."""


def optimizer_of(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """The name of the optimizer in `given`, else in `chosen`. Raises `UserError` where there is none of that name."""
    kind = given.get("optimizer", chosen.get("optimizer", "adamw"))
    if not isinstance(kind, str) or kind not in RULES:
        raise unknown("optimizer", kind, RULES)
    return kind


def optim_config(lr: float, chosen: Mapping[str, Any], given: dict[str, Any]) -> OptimConfig:
    """The optimizer's config of the fields `chosen`, and over them those that are removed from `given`.

    Raises `ValueError` for a field of another optimizer than the one that is chosen.
    """
    kind = optimizer_of(given, chosen)
    given.pop("optimizer", None)
    names = {name: {field.name for field in dataclasses.fields(rule)} - {"kind"} for name, rule in RULES.items()}
    own = {name: value for name, value in chosen.items() if name in names[kind]} | take(
        given, RULES[kind], but=("kind",)
    )
    for name in list(given):
        others = [other for other in RULES if name in names[other]]
        if others and (given[name] is None or given[name] is False):
            del given[name]  # switched off
        elif others:
            raise UserError(f"{name} is a field of the optimizer {others[0]}, and this run has {kind}: leave it out")
    common = {name: value for name, value in chosen.items() if name not in {"optimizer", *set().union(*names.values())}}
    common = {"lr": lr, **common, **take(given, OptimConfig, but=("optimizer", "multipliers"))}
    common["multipliers"] = multipliers_of(common.get("multipliers", RateMultipliers()), given)
    return OptimConfig(**common, optimizer=RULES[kind](**own))


def multipliers_of(chosen: RateMultipliers, given: dict[str, Any]) -> RateMultipliers:
    """Remove the multipliers from `given` and set them."""
    names = {role: f"{role}_rate" for role in ROLES}
    found = {role: given.pop(name) for role, name in names.items() if name in given}
    with called("{}_rate".format):
        return dataclasses.replace(chosen, **found)


def schedule_of(chosen: ScheduleConfig, given: dict[str, Any]) -> ScheduleConfig:
    """Remove the schedule's fields from `given` and set them."""
    kind = {"kind": given.pop("schedule")} if "schedule" in given else {}
    with called(lambda name: "schedule" if name == "kind" else name):
        return dataclasses.replace(chosen, **kind, **take(given, ScheduleConfig, but=("kind",)))


def training_of(given: dict[str, Any], before: Precision) -> dict[str, Any]:
    """Remove from `given` the fields of a `TrainConfig`, and those by which `precision` differs from `before`.

    `precision` is its kind; float32 or bfloat16, of which everything is computed then, is another word for `dtype`.
    """
    found, own = take(given, TrainConfig, but=("precision",)), {}
    names = {f"precision.{name}": name for name in names_of(Precision) if name != "kind"}
    own = {names[path]: given.pop(path) for path in list(given) if path in names}
    if "precision" in given:
        kind = given.pop("precision")
        if kind in PLAIN:
            if found.get("dtype", "auto") not in ("auto", kind):
                raise UserError(
                    f"precision={kind} computes in {kind}, and dtype={found['dtype']} is given too: leave one out"
                )
            found["dtype"], kind = kind, None
        elif kind is not None and (not isinstance(kind, str) or kind not in BLOCKS):
            raise unknown("precision", kind, [*PLAIN, *BLOCKS])
        own["kind"] = kind
    with called("precision.{}".format):
        return {**found, "precision": dataclasses.replace(before, **own)}


PLAIN = ("float32", "bfloat16")
"""The formats that everything can be computed in."""


def base_of(base: BaseShape, given: dict[str, Any]) -> BaseShape:
    """Remove `base_d_model`, `base_n_layers` and `base_steps` from `given` and set them in `base`."""
    if not isinstance(base, BaseShape):
        raise UserError(f"base must be a BaseShape, got {base!r}: set base_d_model, base_n_layers and base_steps")
    names = {f.name: f"base_{f.name}" for f in dataclasses.fields(BaseShape)}
    found = {field: given.pop(name) for field, name in names.items() if name in given}
    with called("base_{}".format):
        return dataclasses.replace(base, **found)


def names_of(kind: type[Any]) -> tuple[str, ...]:
    """The names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(kind))


def check_effects(given: Mapping[str, Any], config: RunConfig, on_sphere: bool) -> None:
    """Raise `ValueError` for a field of `given` that changes nothing in a run of `config`,
    and say what would make it act.

    on_sphere: whether the arm has unit vectors. A field that is switched off, by false or none, is let pass.
    """
    optim, schedule, pattern = config.optim, config.schedule, config.model.pattern or ""
    rates = {f"{role}_rate": role for role in ROLES}
    roles = parameters_by_role(config.model) if rates.keys() & given.keys() else rates.values()
    balanced = isinstance(arch := config.model.architecture, DecoderArch) and arch.experts.balance == "bias"
    acts: dict[str, tuple[bool, tuple[str, ...]]] = {
        **{f"parameters of the role {role}": (role in roles, (name,)) for name, role in rates.items()},
        "a pattern with O and balance=bias": ("O" in pattern and balanced, ("balance_rate",)),
        "schedule=log": (schedule.kind == "log", ("rho",)),
        "schedule=wsd": (schedule.kind == "wsd", ("decay_fraction", "decay_shape")),
        "an activation with a gate": (
            "v" in MLPS[config.model.activation].reading,
            tuple(f"s_v.{n}" for n in names_of(ScaleSpec)),
        ),
        "precision=fp8, mxfp8 or nvfp4": (
            config.train.precision.kind is not None,
            ("precision.inputs", "precision.weights", "precision.gradients"),
        ),
        "precision=nvfp4": (
            config.train.precision.kind == "nvfp4",
            ("precision.amax", "precision.hadamard", "precision.stochastic"),
        ),
        "a max_angle": (optim.max_angle is not None, ("angle_follows_lr",)),
        "an arm on the sphere": (on_sphere, ("max_angle", "angle_follows_lr")),
        "an arm that is not on the sphere": (not on_sphere, ("hyperball",)),
        "a pattern with M": ("M" in pattern, (*names_of(MixerSizes), *(f"s_mamba.{n}" for n in names_of(ScaleSpec)))),
        "a pattern with O": ("O" in pattern, (*names_of(ExpertSizes), *(f"s_moe.{n}" for n in names_of(ScaleSpec)))),
        "recipe 'nugpt' and an arm on the sphere": (
            config.base is not None,
            ("base", "base_d_model", "base_n_layers", "base_steps"),
        ),
    }
    for wanted, (holds, names) in acts.items():
        idle = [
            name
            for name in names
            if not holds and name in given and given[name] is not None and given[name] is not False
        ]
        if idle:
            raise UserError(
                f"{idle[0]} has no effect in {config.arm} by {config.recipe!r}: it needs {wanted}; otherwise leave it out "
                "(a sweep of the others can go into the same --out)"
            )


def changed(config: RunConfig, fields: Mapping[str, Any]) -> RunConfig:
    """`config` with `fields`, named as for `make_run`, in place of its own.
    Nothing else changes, as no recipe is asked again.

    Raises `ValueError` naming an unknown field, or one that would change nothing.
    """
    model, optim, given = config.model, config.optim, dict(fields)
    given |= heads_of(given, model.d_model)
    architecture = architecture_of(model.architecture, given)
    given |= layers_of(given, architecture)
    groups = nested(type(model))
    own = {name: value for name, value in vars(model).items() if name not in ("architecture", *groups)}
    own |= {f"{group}.{name}": value for group in groups for name, value in vars(getattr(model, group)).items()}
    rule = {name: value for name, value in vars(optim.optimizer).items() if name != "kind"}
    train = training_of(given, config.train.precision)
    if "batch_size" in train and "micro_batch_size" not in train:
        limit = config.train.micro_batch_size
        train["micro_batch_size"] = limit and part_of_batch(limit, train["batch_size"])
    result = dataclasses.replace(
        config,
        model=model_config(type(model), architecture, own, given),
        optim=optim_config(optim.lr, {**vars(optim), **rule, "optimizer": optim.optimizer.kind}, given),
        schedule=schedule_of(config.schedule, given),
        train=dataclasses.replace(config.train, **train),
        base=None if config.base is None else base_of(config.base, given),
    )
    refuse_unknown(given, result)
    check_effects(fields, result, config.arm == "ngpt")
    return result


WHOLE = frozenset({"arm", "recipe", "preset", "model", "optim", "schedule", "train"})
"""The keys of a run's config.json; a settings file with fewer of them changes a preset and a recipe."""


def fields_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in a file of settings, nested as in a run's config.json or not,
    by their names in `make_run` or `changed`.

    Raises `UserError` for a field that is there twice, or below a name of no part. Whether there is such a field is
    for others to say.
    """
    found: list[tuple[str, Any]] = []

    def note(place: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping) and value:
                if name not in PARTS:
                    raise UserError(
                        f"{name!r} is no part of a run's settings{nearest(name, PARTS)}: give what stands below it without it"
                    )
                note(name, value)
            elif name == "kind":
                found.append((place, value))
            else:
                found.append((NAMES_IN.get(place, "{}").format(name), value))

    note("", record)
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is set twice: leave one of them out")
    return dict(found)


NAMES_IN = {
    "multipliers": "{}_rate",
    "base": "base_{}",
    "precision": "precision.{}",
    **{group: f"{group}.{{}}" for group in GROUPS},
}
"""How the fields of a part of a config are called where they are given one by one."""

PARTS = ("model", "optim", "schedule", "train", "architecture", "mixer", "experts", "optimizer", *NAMES_IN)
"""The parts of a config, below which its fields stand in a file."""
