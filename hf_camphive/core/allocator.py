"""How this process allocates memory; set by the command line and the benchmarks, never by an import."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
KEPT, STEP = 2**30, 2**26  # bytes


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, in place of giving it back to the system at once; whether that could be set.

    glibc maps each block above 32 MiB anew, so that every activation of a network is paid for by page faults, which cost
    more than many an operation on it. Elsewhere than under glibc nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_MMAP_THRESHOLD: KEPT, M_TRIM_THRESHOLD: KEPT, M_TOP_PAD: STEP}
    return all(mallopt(key, value) == 1 for key, value in settings.items())
