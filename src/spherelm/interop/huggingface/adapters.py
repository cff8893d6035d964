"""Low-rank adapters (LoRA, by `peft`) for weights that live on the sphere.

The sum of a unit matrix and a low-rank one is not unit. Here the adapted weight is `Norm(W + (lora_alpha / r) B A)`,
the nearest point of the sphere, in training as after merging: DoRA (arXiv 2402.09353) with every magnitude fixed at 1,
along the axis that the weight declares. What B A adds along a vector has no effect; what turns it has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spherelm import sphere
from spherelm.errors import UserError
from spherelm.layers.linear import UnitLinear
from spherelm.models import older

try:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear
except ImportError as error:
    raise ImportError("adapters need peft: pip install '.[hf]' in a clone of spherelm") from error

PLAIN_LORA = {"lora_dropout": 0.0, "bias": "none", "use_dora": False, "lora_bias": False, "fan_in_fan_out": False}
"""Options that have no meaning for a weight that is normalized as a whole, and the value that they must have."""


class UnitLora(LoraLinear):
    """A `UnitLinear` with adapters; it takes the place of the module that it wraps, folded scales included."""

    keeps_sphere = True

    @property
    def unit_layer(self) -> UnitLinear:
        """The module that this one wraps."""
        base = self.get_base_layer()
        assert isinstance(base, UnitLinear)
        return base

    def adapted_weight(self) -> Tensor:
        """`Norm(W + sum of the active adapters' scaled B A)` along the unit axis; W itself if there are none."""
        base = self.unit_layer
        if self.disable_adapters:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return base.weight
        weight: Tensor = base.weight
        for name in active:
            weight = weight + self.get_delta_weight(name)
        return sphere.norm(weight, dim=base.unit_axis)

    def scaled_weight(self, scale: Tensor | None = None) -> Tensor:
        """As that of `Linear`."""
        weight = self.adapted_weight()
        return weight if scale is None else weight * scale.unsqueeze(-1)

    def forward(self, x: Tensor, scale: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As that of `Linear`. Other arguments of peft's, such as one adapter for each row of a batch, are refused."""
        if any(value is not None for value in kwargs.values()):
            raise UserError(
                f"weights on the sphere have one adapter for the whole batch: leave out {', '.join(kwargs)}"
            )
        return F.linear(x, self.scaled_weight(scale).to(x.dtype))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapted weight in the place of W; all active adapters together,
        since their sum is what is normalized.
        """
        if adapter_names is not None and set(adapter_names) != set(self.active_adapters):
            raise UserError(f"set_adapter({adapter_names}) first: only the active adapters can be merged")
        if self.merged:
            return
        weight = self.adapted_weight()
        if safe_merge and not torch.isfinite(weight).all():
            raise UserError(f"the adapters {', '.join(self.active_adapters)} hold numbers that are not finite")
        self._unmerged = self.unit_layer.weight.data
        self.unit_layer.weight.data = weight.clone()
        self.merged_adapters = [name for name in self.active_adapters if name in self.lora_A]

    def unmerge(self) -> None:
        """Put W back, exactly as it was."""
        if self.merged:
            self.unit_layer.weight.data = self._unmerged
            del self._unmerged
            self.merged_adapters = []


def on_sphere(config: LoraConfig) -> LoraConfig:
    """`config`, changed to keep adapted weights on the sphere: `get_peft_model(model, on_sphere(LoraConfig(...)))`.

    Needed for loading too:
    `PeftModel.from_pretrained(model, folder, config=on_sphere(LoraConfig.from_pretrained(folder)))`. Weights without a
    unit axis (those of GPT) are adapted as always. What version 0.1.0 saved is read too. Raises `ValueError` for
    options that do not fit.
    """
    if not isinstance(config, LoraConfig):
        raise UserError(f"weights on the sphere take LoRA alone: pass a LoraConfig, not a {type(config).__name__}")
    for name, value in PLAIN_LORA.items():
        if getattr(config, name) != value:
            raise UserError(f"{name}={getattr(config, name)!r} does not fit weights on the sphere: use {value!r}")
    settings: Any = config
    targets = settings.target_modules
    if isinstance(targets, set | list):  # by name, as version 0.1.0 called them or as they are called today
        settings.target_modules = {older.TOP.get(name, name) for name in targets}
    config._register_custom_module({UnitLinear: UnitLora})
    return config
