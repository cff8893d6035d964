"""One file of Python that holds our models and what translates them for transformers, made from the sources of this package.

It rides along with an exported model, so that `trust_remote_code=True` loads it where spherelm is not installed.
"""

from __future__ import annotations

import ast
from importlib import metadata, resources

FILE = "modeling_spherelm.py"
AUTO_MAPS = {
    "spherelm": {
        "AutoConfig": "modeling_spherelm.SphereLMConfig",
        "AutoModelForCausalLM": "modeling_spherelm.SphereLMForCausalLM",
    },
    "spherelm-seq2seq": {
        "AutoConfig": "modeling_spherelm.SphereSeq2SeqConfig",
        "AutoModelForSeq2SeqLM": "modeling_spherelm.SphereSeq2SeqLM",
    },
}
"""What config.json says so that the Auto classes find the file, by `model_type`."""

MODULES = (
    "errors",
    "fields",
    "sharding",
    "sphere",
    "layers.grouped",
    "layers.linear",
    "layers.rmsnorm",
    "layers.rope",
    "layers.cache",
    "layers.causal_backward",
    "layers.attention",
    "layers.cross_attention",
    "layers.feedforward",
    "layers.state_space",
    "layers.mamba_kernel",
    "layers.mamba2",
    "layers.moe",
    "layers.readout",
    "layers.loss",
    "models.variants",
    "models.config",
    "models.kit",
    "models.start",
    "models.{arm}",
    "models.decoder",
    "models.encoder_decoder",
    "models.encoder",
    "models",
    "models.older",
    "interop.huggingface.configuration",
    "interop.huggingface.states",
    "interop.huggingface.retracting",
    "interop.huggingface.modeling",
    "interop.huggingface.seq2seq",
)
"""What the file is made of, each after what it imports: of the two kits of parts, the one of the model's arm."""

NAMESPACES = {
    "sphere": "sphere = SimpleNamespace({members})",
    "models.gpt": "gpt, ngpt = SimpleNamespace(KIT=KIT), SimpleNamespace(KIT=None)",
    "models.ngpt": "gpt, ngpt = SimpleNamespace(KIT=None), SimpleNamespace(KIT=KIT)",
    "models.older": "older = SimpleNamespace({members})",
}
"""What stands behind the source of a module that others use by its name."""

HEADER = '''"""GPT and nGPT for transformers: the sources of spherelm {version} in one file, by `spherelm export --standalone`.

Copyright the spherelm authors. Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""

# Imports of spherelm's own modules are left out: everything is in this file.
from __future__ import annotations

{imports}
'''


def read_source(module: str) -> str:
    """The source of `spherelm.<module>`."""
    directory = resources.files("spherelm").joinpath(*module.split("."))
    file = directory / "__init__.py" if directory.is_dir() else directory.parent / f"{directory.name}.py"  # type: ignore[attr-defined]
    text: str = file.read_text(encoding="utf-8")
    return text


def is_ours(node: ast.stmt) -> bool:
    """Whether `node` imports from this package."""
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spherelm"


def is_docstring(node: ast.stmt) -> bool:
    """Whether `node` is a text that stands alone, as a docstring does."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def names_of(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def imports_of(node: ast.stmt) -> list[str]:
    """An import statement as one statement a name; none if it imports from this package, which may not rename anything."""
    if isinstance(node, ast.Import):
        return [ast.unparse(ast.Import([alias])) for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    if is_ours(node):
        assert all(alias.asname is None for alias in node.names), f"renamed in a joined file: {ast.unparse(node)}"
        return []
    return [ast.unparse(ast.ImportFrom(node.module, [alias], node.level)) for alias in node.names]


def take_apart(module: str) -> tuple[list[str], list[str], str]:
    """The source of `module`: its imports from elsewhere, the names that it defines, and the rest as text."""
    source = read_source(module)
    lines, imports, names = source.splitlines(), [], []
    for index, node in enumerate(ast.parse(source).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports += imports_of(node)
        elif names_of(node) != ["__all__"] and not (index == 0 and is_docstring(node)):
            names += names_of(node)
            continue
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return [line for line in imports if not line.startswith("from __future__")], names, "\n".join(lines).strip()


def standalone_source(arm: str) -> str:
    """The text of the file for models of `arm`."""
    imports, names, parts = {"from types import SimpleNamespace"}, [], []
    for module in (name.format(arm=arm) for name in MODULES):
        needed, defined, text = take_apart(module)
        imports.update(needed)
        names += defined
        parts.append(f"# ---- spherelm.{module}\n\n{text}")
        if module in NAMESPACES:
            parts.append(NAMESPACES[module].format(members=", ".join(f"{name}={name}" for name in defined)))
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"defined in more than one module: {', '.join(sorted(twice))}"
    header = HEADER.format(version=metadata.version("spherelm"), imports="\n".join(sorted(imports)))
    return header + "\n\n" + "\n\n\n".join(parts) + "\n"
