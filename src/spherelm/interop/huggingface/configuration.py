"""The config that Hugging Face transformers stores beside the weights: the arm, and the fields of our own configs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from spherelm.errors import UserError, unknown
from spherelm.fields import from_plain
from spherelm.interop.huggingface.standalone import configuration_spherelm
from spherelm.models import ARCHITECTURES, ARMS, CONFIGS, Config, EncDecArch, older
from spherelm.models.config import ModelConfig, to_plain

HEADS = ("num_attention_heads", "num_key_value_heads")
"""The names of `n_heads` and `n_kv_heads` in transformers."""


class SphereLMConfig(configuration_spherelm.SphereLMConfig):
    """The config that rides along with a model, made of ours and turned into ours: `arm`, the fields of `ModelConfig`.

    architecture: the fields of a `DecoderArch`; start: those of the arm's own config. What transformers calls otherwise
    (hidden_size, num_hidden_layers, ...) is understood too, and so is what version 0.1.0 wrote. Raises `ValueError`, as
    our configs do, for sizes that make no model.
    """

    attribute_map: ClassVar[dict[str, str]] = {
        **configuration_spherelm.SphereLMConfig.attribute_map,
        "tie_embeddings": "tie_word_embeddings",
    }
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)

    def __post_init__(self, **kwargs: Any) -> None:
        old = {name: kwargs.pop(name) for name in list(kwargs) if older.is_field(name)}
        super().__post_init__(**kwargs)
        if old:
            self._read_older(old)
        self.architecture = self.architecture or {"kind": self.kinds[0]}
        plain = to_plain(self.arm_config())
        self.architecture = plain.pop("architecture")
        self.start = {name: value for name, value in plain.items() if name not in SHAPE}

    def _read_older(self, old: dict[str, Any]) -> None:
        """Take what version 0.1.0 wrote, which was the fields of every arm and architecture:
        those of others are ignored.
        """
        read = older.fields_today(self.arm, old)
        architecture, self.arm = read.pop("architecture", {"kind": self.kinds[0]}), older.arm_today(self.arm)
        self.architecture = _known(ARCHITECTURES.get(architecture["kind"]), architecture)
        self.start = _known(CONFIGS.get(self.arm), read)

    def arm_config(self) -> Config:
        """The config of ours that this describes."""
        if self.arm not in ARMS:
            raise unknown("arm", self.arm, ARMS)
        if self.architecture.get("kind") not in self.kinds:
            raise UserError(f"a {self.model_type} model has the architecture {' or '.join(self.kinds)}")
        shape = {name: getattr(self, name) for name in SHAPE}
        return from_plain(CONFIGS[self.arm], {**shape, "architecture": self.architecture, **self.start})

    @classmethod
    def of(cls, config: Config) -> SphereLMConfig:
        """The same model as `config` describes."""
        plain = to_plain(config)
        shape = {name: plain.pop(name) for name in SHAPE}
        return cls(arm=config.arm, architecture=plain.pop("architecture"), start=plain, **shape)

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it, with the heads by its names too:
        peft, which sizes its prompts by them, looks here only.
        """
        described: dict[str, Any] = super().to_dict()
        return described | {name: getattr(self, name) for name in HEADS}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers has it; where a number is given by two names, ours counts."""
        said_twice = [name for name in HEADS if cls.attribute_map[name] in config_dict]
        return super().from_dict({k: v for k, v in config_dict.items() if k not in said_twice}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that `save_pretrained` writes: all that the saved model needs,
        so that no later default changes it.

        Where this is not code that rode along with a model, the pointer to such code is left out: the code is
        not saved either.
        """
        described: dict[str, Any] = {k: v for k, v in super().to_diff_dict().items() if k not in HEADS}
        if self._auto_class is None:
            described.pop("auto_map", None)
        described |= {name: getattr(self, name) for name in ("arm", *SHAPE)}
        described["tie_word_embeddings"] = described.pop("tie_embeddings")
        architecture = {name: value for name, value in self.architecture.items() if value is not None}
        return described | {"architecture": architecture, "start": self.start}


def _known(owner: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Of `values` those that are fields of the dataclass `owner`; all of them where there is no such class."""
    names = values.keys() if owner is None else {field.name for field in fields(owner)}
    return {name: value for name, value in values.items() if name in names}


SHAPE = tuple(field.name for field in fields(ModelConfig) if field.name != "architecture")
"""The fields that both arms share."""


class SphereSeq2SeqConfig(configuration_spherelm.SphereSeq2SeqConfig, SphereLMConfig):
    """As `SphereLMConfig`; architecture: the fields of an `EncDecArch`."""

    model_type = "spherelm-seq2seq"
    kinds: ClassVar[tuple[str, ...]] = ("encdec",)

    @property
    def share_embeddings(self) -> bool:
        """Whether source and target have one input embedding."""
        architecture = self.arm_config().architecture
        assert isinstance(architecture, EncDecArch)
        return architecture.share_embeddings
