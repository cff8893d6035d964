"""The rules that keep the floors apart and the files small, read off the source itself."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spherelm

SOURCE = Path(spherelm.__file__).resolve().parent
TREES = {path.relative_to(SOURCE): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
Functions = (ast.FunctionDef, ast.AsyncFunctionDef)

OWNERS = {
    "matplotlib": {"report"},
    "datasets": {"data/hub"},
    "fsspec": {"data/hub"},
    "pyarrow": {"data/rows"},
    "zstandard": {"data/compression"},
    "sentencepiece": {"data/tokenizer"},
    # Tokenizers by their names on the hub on the one hand, models on the other.
    "transformers": {"data/tokenizer", "interop/huggingface"},
    "huggingface_hub": {"interop/huggingface"},
    "peft": {"interop/huggingface"},
    "lm_eval": {"evaluate/harness"},
    "mamba_ssm": {"layers/mamba_kernel"},
    "sacrebleu": {"evaluate/translation"},
    "onnxscript": {"interop/onnx"},
    "torchao": {"layers/low_precision"},
    "wandb": {"train/sinks/wandb"},
    "trackio": {"train/sinks/trackio"},
    "torchtitan": {"interop/torchtitan"},
    "tyro": {"interop/torchtitan"},  # torchtitan's own, for its command line
}
"""The module, or package, that alone imports an optional library; whatever else is not in the core has none yet."""

OPTIONAL = [*OWNERS, "plotly", "tensorboard", "accelerate", "yaml", "pandas"]
COLLECTIVE_FLOORS = {Path(f"{name}.py") for name in ("runs/checkpoint", "train/parallel")}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "base", "tools", "lib"}


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    """Every node of these kinds in every file."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield path, node


def imports() -> Iterator[tuple[Path, str]]:
    """Every imported module by its full name, wherever in the file the import stands."""
    for path, node in nodes(ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from ((path, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder = ("spherelm", *path.parts[: -node.level]) if node.level else ()
            module = ".".join((*folder, node.module))
            yield path, module
            yield from ((path, f"{module}.{alias.name}") for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_public_names_are_pinned() -> None:
    """As in the design. Changing this list is a decision, to be seen in the same commit."""
    public = """DecoderArch EncDecArch EncoderArch GPT GPTConfig NGPT NGPTConfig OptimConfig
        Scale ScaleSpec UnitEmbedding UnitLinear Variant
        attach_retraction build build_optimizer departure generate load_model recipe retract"""
    assert sorted(spherelm.__all__) == sorted(public.split())
    assert len(set(spherelm.__all__)) == len(spherelm.__all__)
    for name in spherelm.__all__:
        assert getattr(spherelm, name).__name__ == name
        assert name in dir(spherelm)
    with pytest.raises(AttributeError, match="module 'spherelm' has no attribute 'nonsense'"):
        spherelm.nonsense  # noqa: B018


def test_no_file_is_long() -> None:
    lengths = {str(path): len((SOURCE / path).read_text(encoding="utf-8").splitlines()) for path in TREES}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_no_function_is_long() -> None:
    lengths = {f"{path}:{node.name}": node.end_lineno - node.lineno + 1 for path, node in nodes(*Functions)}  # type: ignore
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_functions_are_short_on_the_whole() -> None:
    lengths = sorted(node.end_lineno - node.lineno + 1 for _, node in nodes(*Functions))  # type: ignore[attr-defined]
    assert lengths[len(lengths) // 2] <= 12, "the median"


def test_no_forward_reads_a_config() -> None:
    """A variant is another composition at construction.
    (transformers' models must ask their config how they are called.)
    """
    found = []
    for path, function in nodes(*Functions):
        if getattr(function, "name", "") == "forward" and path.parts[:2] != ("interop", "huggingface"):
            names = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
            names += [node.id for node in ast.walk(function) if isinstance(node, ast.Name)]
            found += [f"{path}:{function.lineno}" for name in names if name in ("config", "cfg")]  # type: ignore
    assert found == []


def test_every_optional_library_has_one_owner() -> None:
    found: dict[str, set[str]] = {}
    for path, module in imports():
        library = module.split(".")[0]
        if library in OPTIONAL:
            where = path.with_suffix("").as_posix()
            owner = next((o for o in OWNERS.get(library, ()) if where == o or where.startswith(f"{o}/")), where)
            found.setdefault(library, set()).add(owner)
    assert {library: owners for library, owners in found.items() if not owners <= OWNERS.get(library, set())} == {}


def test_only_the_declared_libraries_are_imported() -> None:
    declared = {
        "torch",
        "numpy",
        "safetensors",
        "scipy",
        "tokenizers",
        "tqdm",
        "jinja2",
        "markupsafe",
        "pydantic",
        "ruamel",
        "typing_extensions",
        "spherelm",
        *OWNERS,
    }
    imported = {module.split(".")[0] for _, module in imports()}
    assert imported - declared - sys.stdlib_module_names == set()


def named_in(module: str) -> set[Path]:
    """The files that import `module` or something in it, or write its full name."""
    every = [*imports(), *((path, dotted(node)) for path, node in nodes(ast.Attribute))]
    return {path for path, name in every if name == module or name.startswith(f"{module}.")}


def test_collectives_stay_in_two_files_and_sharded_tensors_in_one() -> None:
    """But for what gives models to other engines: it cuts their matrices, or hands torchtitan its own meshes."""
    sharded, engines = {Path("sharding.py")}, {Path("interop/tensor_parallel.py"), Path("interop/torchtitan.py")}
    assert named_in("torch.distributed") - sharded - engines == COLLECTIVE_FLOORS
    assert named_in("torch.distributed.tensor") - engines == sharded


def test_nothing_is_unpickled() -> None:
    """A checkpoint from a stranger runs no code."""
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert {(str(path), module) for path, module in imports() if module.split(".")[0] in banned} == set()
    for path, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        if dotted(node.func) == "torch.load":
            weights_only = [keyword.value for keyword in node.keywords if keyword.arg == "weights_only"]
            assert [getattr(value, "value", None) for value in weights_only] == [True], f"{path}:{node.lineno}"


def test_modules_are_named_for_what_they_hold() -> None:
    assert [str(path) for path in TREES if set(path.with_suffix("").parts) & VAGUE] == []


def test_what_is_public_is_documented() -> None:
    missing = [str(path) for path, tree in TREES.items() if not ast.get_docstring(tree)]
    for path, tree in TREES.items():
        for node in tree.body:
            if "overload" in map(ast.unparse, getattr(node, "decorator_list", ())):
                continue  # of several signatures the last is documented
            named = isinstance(node, (*Functions, ast.ClassDef)) and not node.name.startswith("_")
            if named and not ast.get_docstring(node):  # type: ignore[arg-type]
                missing.append(f"{path}:{node.name}")  # type: ignore[attr-defined]
    assert missing == []


BLOCKED = """
import importlib, json, pkgutil, sys

blocked = set(json.loads(sys.argv[1]))


class Without:
    # Does not find what is blocked, as where it is not installed.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import spherelm

light = "torch" not in sys.modules
result = {"imported": [], "said": {}, "light": light}
for module in pkgutil.walk_packages(spherelm.__path__, "spherelm.", onerror=lambda name: None):
    if module.name == "spherelm.__main__":
        continue
    try:
        importlib.import_module(module.name)
        result["imported"].append(module.name)
    except ImportError as error:
        result["said"][module.name] = str(error)
print(json.dumps(result))
"""


def test_every_module_needs_the_core_only() -> None:
    """But `interop.huggingface` and `interop.torchtitan`, which say what to install."""
    answer = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(OPTIONAL)], capture_output=True, text=True, check=True
    )
    result = json.loads(answer.stdout)
    assert result["light"], "import spherelm costs nothing"
    assert len(result["imported"]) > 40
    engine = result["said"].pop("spherelm.interop.torchtitan")
    assert engine.startswith("spherelm.interop.torchtitan needs torchtitan: pip install torchtitan==0.3.0 (")
    expected = "spherelm.interop.huggingface needs transformers: pip install '.[hf]' in a clone of spherelm"
    assert {name: said for name, said in result["said"].items() if said != expected} == {}
    assert all(name.startswith("spherelm.interop.huggingface") for name in result["said"])


LIGHT = """
import sys
from spherelm.cli import main

for arguments in (["--help"], ["train", "--help"], ["data", "prepare", "--help"]):
    sys.argv = ["spherelm", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "numpy", "scipy", "tokenizers", "matplotlib", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_is_there_at_once() -> None:
    """Without importing anything heavy."""
    answer = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
