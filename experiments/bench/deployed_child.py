"""A fresh process for one system: seconds to load it, and resident memory with it.

python -m experiments.bench.deployed_child SYSTEM_AS_JSON BATCH_LENGTH_AND_VOCABULARY_AS_JSON
"""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from .systems import TORCH, System, opened, some_inputs

ROOT = Path(__file__).resolve().parents[2]
_LOADS = 3
_BATCH = (8, 128, 30_000)  # texts, tokens, vocabulary


def measured(system: System, batch: tuple[int, int, int] = _BATCH) -> dict:
    """load_s: median of three loads; resident: bytes of the process after one batch; imports: before it."""
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [
        sys.executable,
        "-m",
        "experiments.bench.deployed_child",
        json.dumps(dataclasses.asdict(system)),
        json.dumps(batch),
    ]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{system.name} could not be measured: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _imports(kind: str) -> None:
    if kind in TORCH:
        import torch  # noqa: F401 (its memory is measured)
        import transformers  # noqa: F401 (the same)
    else:
        import onnxruntime  # noqa: F401 (the same)


def _main(text: str, batch: str) -> None:
    system = System(**json.loads(text))
    _imports(system.kind)
    before = _resident()
    call = opened(system, 1)
    call(some_inputs(*json.loads(batch)))
    resident = _resident()
    seconds = []
    del call
    for _ in range(_LOADS):
        gc.collect()
        began = time.perf_counter()
        opened(system, 1)
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"load_s": sorted(seconds)[_LOADS // 2], "resident": resident, "imports": before}))


if __name__ == "__main__":
    _main(*sys.argv[1:3])
