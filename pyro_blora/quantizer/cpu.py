"""The quantizer's loops on a CPU, cpu.c, compiled once for a machine by its C compiler and kept in the cache.

A third of a second of a C compiler for each number of grids, where torch.compile takes half a minute, and a call costs
microseconds. Values are those of the eager functions to the bit; sums have the same bits with any number of threads.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..bit_widths import LADDER
from ..machine import cache_folder
from .grid import number_of_grids

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-std=c11", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_WIDE = ["-march=native", "-mprefer-vector-width=512"]
_NATIVE: tuple[list[str], ...] = (_WIDE, ["-march=native"], ["-mcpu=native"], [])  # what it knows
_COMPILERS = ("cc", "gcc", "clang")
_PATIENCE = 60.0  # seconds that the compiler may take
_KINDS = {torch.float32: 0, torch.bfloat16: 1}


def serves(x: Tensor, constants: Tensor) -> bool:
    """Whether the loops take these: plain tensors with values, in one of the precisions that are compiled."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and type(constants) is Tensor and constants.device == x.device
    return plain and x.dtype in _KINDS and constants.dtype == torch.float32


def forward(x: Tensor, c: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """sum_b w_b Q_b(x), in x's dtype, or of float32 in bfloat16 where that is wanted.

    x and c the `Constants` of G grids: (n,) and (4 G + 4,), or (rows, n) and (C, 4 G + 4), rows a multiple of C.
    """
    x, c = x.contiguous(), c.contiguous()
    out = torch.empty_like(x, dtype=dtype if x.dtype == torch.float32 and dtype in _KINDS else x.dtype)
    loops(number_of_grids(c)).quantizer_forward(
        _KINDS[x.dtype], _KINDS[out.dtype], x.data_ptr(), c.data_ptr(), out.data_ptr(), *_sizes(x, c),
        torch.get_num_threads(),
    )  # fmt: skip
    return out if dtype is None else out.to(dtype)


def backward(grad: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx as x and dL/d[ranges, w_2, ..., w_32] (C + G + 1,)."""
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return of_x, _sums(grad, x, c, of_x)


def backward_of_gates(grad: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """dL/d[ranges, w_2, ..., w_32], (C + G + 1,)."""
    return _sums(grad, x, c, None)


def _sizes(x: Tensor, c: Tensor) -> tuple[int, int, int]:
    """Rows, elements of a row, and how many rows have constants of their own."""
    return (1, x.numel(), 1) if c.dim() == 1 else (x.shape[0], x.shape[1], len(c))


KERNELS = (forward, backward, backward_of_gates)


def _sums(grad: Tensor, x: Tensor, c: Tensor, of_x: Tensor | None) -> Tensor:
    grad = grad if grad.dtype in _KINDS else grad.float()
    grad, x, c, n = grad.contiguous(), x.contiguous(), c.contiguous(), number_of_grids(c)
    rows, length, channels = _sizes(x, c)
    out = c.new_empty(channels + n + 1)
    failed = loops(n).quantizer_backward(
        _KINDS[grad.dtype], _KINDS[x.dtype], grad.data_ptr(), x.data_ptr(), c.data_ptr(),
        None if of_x is None else of_x.data_ptr(), out.data_ptr(), rows, length, channels,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for the sums of {x.numel():,} elements")
    return out


def c_compiler() -> list[str]:
    """The words that call the C compiler, $CC or the first that is there.  Errors: OSError where none is."""
    named = [shlex.split(name) for name in (os.environ.get("CC", ""), *_COMPILERS) if name]
    for words in named:
        if shutil.which(words[0]):
            return words
    raise OSError(f"no C compiler: none of {', '.join(words[0] for words in named)} is installed")


@functools.cache
def loops(grids: int = len(LADDER) - 1) -> ctypes.CDLL:
    """The loops for so many grids, made if the cache has none.  Errors: OSError where that fails, with the reason."""
    each = " ".join(f"DO({i})" for i in range(grids))
    compiler, flags = c_compiler(), (*_FLAGS, f"-DGRIDS={grids}", f"-DEACH(DO)={each}")
    made_for = (_SOURCE.read_bytes(), repr(flags), repr(compiler), torch.__version__, _processor(), str(_openmp()))
    name = hashlib.sha256(repr(made_for).encode()).hexdigest()[:16]
    try:
        path = cache_folder() / "quantizer" / f"{name}.so"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, flags, path)
        found = ctypes.CDLL(str(path))
    except (OSError, RuntimeError):  # no home, a cache that cannot be written, or is damaged: for this process alone
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.so"
            _compile(compiler, flags, path)
            found = ctypes.CDLL(str(path))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.quantizer_forward.argtypes = [number, number, *[pointer] * 3, *[size] * 3, number]
    found.quantizer_forward.restype = None
    found.quantizer_backward.argtypes = [number, number, *[pointer] * 5, *[size] * 3, number]
    return found


def _compile(compiler: list[str], flags: Sequence[str], path: Path) -> None:
    """Into another file of the folder first, and loaded there: several processes may do it at once."""
    openmp, failed = _openmp(), ""
    alone: tuple[list[str], list[str]] = (["-fopenmp-simd"], [])
    ways = [alone] if openmp is None else [(["-fopenmp"], [str(openmp)]), alone]  # clang's OpenMP is not GCC's
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "loops.o", Path(folder) / "loops.so"
        for (parallel, library), native in itertools.product(ways, _NATIVE):
            steps = (
                [*compiler, *flags, *native, *parallel, "-c", str(_SOURCE), "-o", str(made)],
                [*compiler, "-shared", str(made), *library, "-lm", "-o", str(linked)],
            )
            told = [subprocess.run(step, capture_output=True, text=True, timeout=_PATIENCE) for step in steps]
            failed = next((each.stderr.strip() or "without a word" for each in told if each.returncode), "")
            if not failed:
                try:
                    ctypes.CDLL(str(linked))
                except OSError as error:
                    failed = str(error)
                else:
                    os.replace(linked, path)
                    return
    raise OSError(f"{compiler[0]} failed: {failed.splitlines()[0]}")


def _openmp() -> Path | None:
    """The OpenMP library that PyTorch brings: two of them in a process would fight for its processors."""
    return next(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"), None)


def _processor() -> str:
    """What `native` means here: the same folder may serve machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "; ".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "model name", "Features"))))
