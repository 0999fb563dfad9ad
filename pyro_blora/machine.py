"""A process on its machine: memory, threads, cache, its rank and its terminal."""

import ctypes
import os
import platform
import sys
from pathlib import Path

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names for them, from malloc.h
_KEEP = 1 << 30  # bytes
_SPINS = "1000"  # of libgomp's default of 300,000 or more: some microseconds, as long as a small kernel takes


def cache_folder() -> Path:
    """PYRO_BLORA_CACHE, or pyro_blora in the user's cache.  Errors: OSError where there is no home."""
    if given := os.environ.get("PYRO_BLORA_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_blora"
    except RuntimeError as error:  # a container's user without a name
        raise OSError(f"no folder for a cache ({error}): set PYRO_BLORA_CACHE to one") from None


def keep_freed_memory() -> bool:
    """Let glibc keep what tensors free, up to 1 GiB, for the next ones; True where that is possible.

    By default it returns every large tensor to the system, and a step on a CPU pays for its pages again: about a
    tenth of its time. Call it in your own process, before training; CUDA has its own allocator.
    """
    if platform.system() != "Linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(name, _KEEP) for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def release_freed_memory() -> None:
    """Hand the holes between tensors back to the system, once: after a start that leaves many, before long training."""
    if platform.system() == "Linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def spin_briefly() -> None:
    """Let OpenMP's threads sleep soon after a parallel part; call it before torch is imported, which loads libgomp.

    By default they spin for milliseconds, which costs nothing on an idle machine. Beside other busy programs they then
    occupy processors that the others need, and a step takes as long as its slowest thread: docs/how-to/scaling.md.
    A choice of the user's, GOMP_SPINCOUNT or OMP_WAIT_POLICY, stays. Child processes inherit it.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def processor() -> str:
    """Its name, as Linux has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return name or platform.machine()


def is_main() -> bool:
    """Whether this is the main process of those that torchrun or `accelerate launch` has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_terminal() -> bool:
    """Whether stderr is a terminal on which a line can be written again."""
    return bool(sys.stderr and sys.stderr.isatty()) and os.environ.get("TERM") not in ("dumb", "unknown")
