"""Keep the memory that a training step frees: by default the C library returns it to the system, page by page.

A step makes and drops hundreds of tensors of megabytes. glibc takes each of them from the kernel and gives it back, and
the next step pays for every page again: up to a fifth of a step on a virtual machine (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for itself, until it ends.
    With another C library than glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never give the top of the heap back
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap as well
