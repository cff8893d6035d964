"""Hooks that the copies of an optimizer keep, which torch leaves out of `copy.deepcopy`
and of pickles without a word.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
"""Where torch keeps them."""


def keep_hooks(optimizer: Optimizer, *handles: RemovableHandle) -> None:
    """Let copies and pickles of `optimizer` keep the hooks behind `handles`, until they are removed.

    A hook is copied with what it holds on to: that of a model continues with the copy of the model, which is the one
    that is copied in the same call. So hooks must be picklable: no functions inside of functions.
    """
    kept = vars(optimizer).setdefault("_kept_hooks", set())
    kept.update(handle.id for handle in handles)
    _watch(optimizer)


def _watch(optimizer: Optimizer) -> None:
    # Both copy and pickle ask the object, not its class. A weak reference, so that an optimizer is freed when it is
    # dropped.
    vars(optimizer)["__reduce_ex__"] = partial(_reduced, weakref.ref(optimizer))


def _reduced(reference: weakref.ref[Optimizer], protocol: Any) -> tuple[Any, ...]:
    """How copy and pickle take the optimizer apart: as torch does, and the hooks to be kept."""
    optimizer = reference()
    assert optimizer is not None
    state, kept = dict(optimizer.__getstate__()), vars(optimizer)["_kept_hooks"]
    # Under names: the numbers of another process's handles would be given away again.
    for name in HOOKS:
        state[name] = OrderedDict((f"kept {key}", hook) for key, hook in vars(optimizer)[name].items() if key in kept)
    state["_kept_hooks"] = {key for name in HOOKS for key in state[name]}
    return _blank, (type(optimizer),), state


def _blank(kind: type[Optimizer]) -> Optimizer:
    """An optimizer whose state is to be set."""
    optimizer = kind.__new__(kind)
    _watch(optimizer)
    return optimizer
