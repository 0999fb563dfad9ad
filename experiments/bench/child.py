"""What needs a process of its own: peak memory, and the time from a command to its first step.

python -m experiments.bench.child SUBJECT SETTING_AS_JSON
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_STEPS = 3  # the optimizer's state is there from the second on


def run(subject: str, setting: dict, cache: Path | None = None) -> dict:
    """Seconds from the start to the end of the first step, and bytes at the peak above what the imports take.

    cache: folder of the compiler's cache, empty for a first time; none: the usual one.
    """
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if cache is not None:
        variables |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton"),
                      "PYRO_BLORA_CACHE": str(cache)}  # fmt: skip
    command = [sys.executable, "-m", "experiments.bench.child", subject, json.dumps(setting)]
    began = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        seconds = None
        for line in process.stdout:
            if line.startswith("stepped"):
                seconds = time.perf_counter() - began
            elif line.startswith("peak"):
                return {"seconds": seconds, "bytes": int(line.split()[1])}
    raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}")


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def _main(subject: str, setting: str) -> None:
    import torch

    from pyro_blora.machine import keep_freed_memory

    from . import subjects
    from .networks import Setting

    values = json.loads(setting)
    keep_freed_memory()
    on_gpu = values.get("device") == "cuda"
    if not on_gpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _memory("VmRSS")
    step = subjects.STEPS[subject](Setting(**values))
    for i in range(_STEPS):
        step()
        if i == 0:
            if on_gpu:
                torch.cuda.synchronize()
            print("stepped", flush=True)
    print("peak", torch.cuda.max_memory_allocated() if on_gpu else _memory("VmHWM") - before, flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
