"""Where the time of a forward goes, operation by operation: onnxruntime's own profile, and PyTorch's."""

import json
import tempfile
from collections import Counter
from pathlib import Path

from .systems import System, opened, some_inputs

_RUNS = 10
_KEPT = 12  # operations that are named
REST = "others"

Profile = list[tuple[str, float, int]]  # (operation, milliseconds of a forward, how often), the longest first


def profiled(system: System, batch: int, length: int) -> Profile:
    """Of one thread."""
    inputs = some_inputs(batch, length)
    return _kept(*(_onnx(system.path, inputs) if system.kind == "onnx" else _torch(system, inputs)))


def _kept(spent: Counter[str], calls: Counter[str]) -> Profile:
    named = [(name, ms / _RUNS, calls[name] // _RUNS) for name, ms in spent.most_common(_KEPT)]
    rest = sum(spent.values()) / _RUNS - sum(ms for _, ms, _ in named)
    return [*named, (REST, rest, sum(calls.values()) // _RUNS - sum(n for *_, n in named))]


def _onnx(path: str, inputs: dict) -> tuple[Counter[str], Counter[str]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {each.name: inputs[each.name] for each in session.get_inputs()}
        for _ in range(_RUNS):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            name = event["args"]["op_name"]
            spent[name] += event["dur"] / 1e3  # microseconds
            calls[name] += 1
    return spent, calls


def _torch(system: System, inputs: dict) -> tuple[Counter[str], Counter[str]]:
    import torch.profiler

    call = opened(system, 1)
    call(inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(_RUNS):
            call(inputs)
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        spent[name] += event.self_cpu_time_total / 1e3
        calls[name] += event.count
    return spent, calls
