"""What a process that trains asks of its machine."""

import ctypes
import platform

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names for them, from malloc.h
_KEEP = 1 << 30  # bytes


def keep_freed_memory() -> bool:
    """Let glibc keep what tensors free, up to 1 GiB, for the next ones; True where that is possible.

    By default it hands every large tensor back to the system, and a step on a CPU pays for its pages again: about a
    tenth of its time. Call it in a process of your own, before training; CUDA has an allocator of its own.
    """
    if platform.system() != "Linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(name, _KEEP) for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
