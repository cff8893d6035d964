"""The Triton kernels against `sphere`, in Triton's interpreter, by pip install '.[triton]' in a clone of spherelm."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: pip install '.[triton]' in a clone of spherelm",
)

CHECK = """
import torch
from spherelm import sphere
from spherelm.layers import triton_sphere

def same(ours, reference, tensors, tolerance):
    grad = torch.randn_like(reference)
    results = []
    for out in (ours, reference):
        results.append([out, *torch.autograd.grad(out, tensors, grad, retain_graph=True)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
    for shape in ((2, 3, 24), (260, 5)):
        h, target = (sphere.norm(torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2))
        alpha = torch.rand(shape[-1]).requires_grad_()
        same(triton_sphere.norm(3 * h), sphere.norm(3 * h), [h], 4 * tolerance)
        same(triton_sphere.step(h, target, alpha), sphere.step(h, target, alpha), [h, target, alpha], 4 * tolerance)

def curvature(module):
    out = module.step(module.norm(h), module.norm(target), alpha).square()
    first = torch.autograd.grad((out * torch.arange(5.0)).sum(), [h, target, alpha], create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), [h, target, alpha])

h, target = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
for ours, reference in zip(curvature(triton_sphere), curvature(sphere), strict=True):
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
each = torch.func.vmap(torch.func.grad(lambda x: triton_sphere.norm(x)[0]))(h)
torch.testing.assert_close(each, torch.autograd.grad(sphere.norm(h)[:, 0].sum(), h)[0], rtol=1e-5, atol=1e-6)
zero = torch.zeros(2, 8, requires_grad=True)
assert not triton_sphere.norm(zero).any()
assert not torch.autograd.grad(triton_sphere.norm(zero).sum(), zero)[0].any()
strided = torch.randn(6, 4, 5).transpose(0, 2).requires_grad_()
same(triton_sphere.norm(strided), sphere.norm(strided), [strided], 1e-5)
try:
    triton_sphere.step(h, target, torch.ones(1))
except ValueError as error:
    assert "use spherelm.sphere.step" in str(error)
else:
    raise AssertionError
"""


def test_norm_and_step_and_their_gradients_are_those_of_sphere() -> None:
    # A process of its own: Triton reads the variable when it is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
