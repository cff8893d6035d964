"""The modeling code that rides along with an exported model,
for `trust_remote_code=True` where spherelm is not installed.

The files of this directory beside this one are written to be read by whoever is asked to trust them. They import each
other, torch and transformers; a model takes along those that it needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from spherelm.models.config import Config

CLASSES = {
    "decoder": {"AutoModel": "{}Model", "AutoModelForCausalLM": "{}ForCausalLM"},
    "folded": {"AutoModel": "Folded{}Model", "AutoModelForCausalLM": "Folded{}ForCausalLM"},
    "hybrid": {"AutoModel": "{}HybridModel", "AutoModelForCausalLM": "{}HybridForCausalLM"},
    "encdec": {"AutoModel": "{}Seq2SeqModel", "AutoModelForSeq2SeqLM": "{}Seq2SeqLM"},
}
"""By kind of model: what the Auto classes load, with the name of the arm put in."""

MODULES = {
    "decoder": "modeling_{}",
    "folded": "modeling_{}_folded",
    "hybrid": "modeling_{}_hybrid",
    "encdec": "modeling_{}_seq2seq",
}
"""By kind of model: the module with these classes."""

CONFIGS = {
    "spherelm": "SphereLMConfig",
    "spherelm-folded": "FoldedConfig",
    "spherelm-seq2seq": "SphereSeq2SeqConfig",
}
"""By `model_type`."""


def kind_of(config: Config, model_type: str) -> str:
    """The kind of model that `config` describes, as `MODULES` has them."""
    if model_type == "spherelm-folded":
        return "folded"
    return "hybrid" if config.pattern else config.architecture.kind


def auto_map(config: Config, model_type: str) -> dict[str, str]:
    """The entries of config.json by which the Auto classes find the code: "module.Class" of each."""
    kind = kind_of(config, model_type)
    module, arm = MODULES[kind].format(config.arm), config.arm.upper()
    classes = {auto: f"{module}.{name.format(arm)}" for auto, name in CLASSES[kind].items()}
    return {"AutoConfig": f"configuration_spherelm.{CONFIGS[model_type]}", **classes}


def files_of(module: str) -> Iterator[tuple[str, str]]:
    """Name and text of `module`'s file and of those that it imports, each once."""
    waiting, seen = [module], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            text = resources.files(__name__).joinpath(f"{name}.py").read_text(encoding="utf-8")
            yield f"{name}.py", text
            waiting += re.findall(r"^from \.(\w+) import", text, re.MULTILINE)


def ride_along(out: Path, config: Config) -> None:
    """Put the code of the model of `config` into the saved folder `out`, and say in its config.json where it is."""
    path = out / "config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["auto_map"] = auto_map(config, described["model_type"])
    module, _, head = list(described["auto_map"].values())[-1].partition(".")
    for name, text in files_of(module):
        (out / name).write_text(text, encoding="utf-8")
    described["architectures"] = [head]
    path.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
