from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from spherelm.train.heap import keep_freed_memory

FAULTS = """
import resource
import torch
from spherelm.train.heap import keep_freed_memory

def pages_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**20 * size) for size in (1, 4, 8, 2)]  # 60 MiB, in pages of 4 KiB
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
assert [pages_of_a_step() for _ in range(10)][-1] < 100
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc only")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    # A new process, as training is: where the heap cannot grow any more, large blocks are mapped after all.
    subprocess.run([sys.executable, "-c", FAULTS], check=True)


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("called"))
    keep_freed_memory()
