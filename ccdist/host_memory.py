"""How the C library of Linux treats large blocks of memory."""

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_BLOCK, NEVER = 2**30, 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process reuse large blocks that it freed, instead of returning them to the system each time.

    Activations of a few tens of megabytes are allocated and freed hundreds of times in a training step. By default
    each of them is mapped anew, and touching its pages for the first time costs more than many of the operations on
    it. For command lines and workers to call once; a library function should not change its process.

    Returns:
        Whether it took effect: False where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
