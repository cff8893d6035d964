"""The two kits of parts beside each other."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

import pytest

from spherelm.models import gpt, ngpt

LONGEST = 115


def defined(module: ModuleType) -> list[ast.stmt]:
    """The names that a module defines, in order."""
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    return [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, kinds)]


def shown(node: ast.AST) -> str:
    """A parameter or a name as it is written, the arm's own config left out."""
    return ast.unparse(node).replace("NGPTConfig", "GPTConfig")


def test_both_define_the_same_names_in_the_same_order() -> None:
    pairs = list(zip(defined(gpt), defined(ngpt), strict=True))
    for ours, theirs in pairs:
        assert type(ours) is type(theirs)
        if isinstance(ours, ast.FunctionDef) and isinstance(theirs, ast.FunctionDef):
            assert ours.name == theirs.name
            assert shown(ours.args) == shown(theirs.args)
        elif isinstance(ours, ast.ClassDef) and isinstance(theirs, ast.ClassDef):
            assert {ours.name, theirs.name} in ({"Residual", "Step"}, {"Head"})
            methods = [[m for m in one.body if isinstance(m, ast.FunctionDef)] for one in (ours, theirs)]
            assert [(m.name, shown(m.args)) for m in methods[0]] == [(m.name, shown(m.args)) for m in methods[1]]
        else:
            assert shown(getattr(ours, "targets", [ours])[0]) == shown(getattr(theirs, "targets", [theirs])[0])
    assert len(pairs) > 9


@pytest.mark.parametrize("module", [gpt, ngpt], ids=["gpt", "ngpt"])
def test_a_kit_fits_on_a_page(module: ModuleType) -> None:
    assert len(inspect.getsource(module).splitlines()) <= LONGEST
