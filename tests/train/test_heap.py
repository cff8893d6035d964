from __future__ import annotations

import platform
import resource

import pytest
import torch

from spherelm.train.heap import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc only")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    keep_freed_memory()

    def pages_of_one_more() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB, in pages of 4 KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages_of_one_more()
    assert min(pages_of_one_more() for _ in range(3)) < 1000


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("called"))
    keep_freed_memory()
