"""The measurements of the benchmark of deployed models, each kept as JSON when it is finished."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pyro_blora.deploy import load
from pyro_blora.deploy.held_out import HeldOut, Measured, held_out_of
from pyro_blora.progress import silenced

from .artefacts import FP32, MERGED, STATIC, Studied
from .deployed_child import measured
from .page import machine
from .profiles import Profile, profiled
from .systems import System, opened, some_inputs
from .timing import in_turn

SIZES = tuple((batch, length) for batch in (1, 8, 32) for length in (32, 128))
PROFILED = (MERGED, FP32, STATIC, "ours, W8A8")
_EVALUATED_ON = 2  # threads


@dataclasses.dataclass(frozen=True)
class Row:
    """A system on a task. bytes: on the disk; resident: of a process with it, imports: of one before it."""

    task: str
    system: str
    kind: str
    ours: bool
    bytes: int
    load_s: float
    resident: int
    imports: int
    metric: str
    value: float
    nll: float
    gated: float  # metric of its run's deployed allocation
    differ: int | None  # decisions that are not those of its run


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of a forward: median and 95th percentile; ratio: median of its rounds' ratios to the first system."""

    system: str
    threads: int
    batch: int
    length: int
    median: float
    p95: float
    ratio: float


class Measuring:
    """Rows and times of the systems of a study.  keep: folder of what is finished; sizes: texts and tokens."""

    def __init__(
        self, studied: Studied, keep: Path, seconds: float, threads: tuple[int, ...],
        sizes: tuple[tuple[int, int], ...] = SIZES,
    ):  # fmt: skip
        self.studied, self.keep, self.seconds, self.threads = studied, keep, seconds, threads
        self.sizes = sizes
        self._systems: dict[str, list[tuple[System, Path]]] = {}
        self._held_out: dict[Path, HeldOut] = {}

    def systems(self, task: str) -> list[tuple[System, Path]]:
        if task not in self._systems:
            self._systems[task] = list(self.studied.systems(task))
        return self._systems[task]

    def told(self) -> dict:
        """Machine, versions and commit, as they were when the first row was kept."""
        return self._kept("machine.json", lambda: self._machine)

    @cached_property
    def _machine(self) -> dict:
        versions = {"onnxruntime": importlib.metadata.version("onnxruntime"), "torchao": "not installed"}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions["torchao"] = importlib.metadata.version("torchao")
        studied = {"rows": self.studied.max_train, "epochs": self.studied.epochs}
        return machine("cpu") | versions | studied | {"load": os.getloadavg()[0], "began": str(datetime.datetime.now())}

    def rows(self, task: str) -> list[Row]:
        """Size, memory and scores of every system."""
        systems = self.systems(task)  # first, so that a mistaken command leaves no folder
        self.told()
        return [self._row(task, system, run) for system, run in systems]

    def _row(self, task: str, system: System, run: Path) -> Row:
        def made() -> dict:
            print(f"{task}: {system.name}", flush=True)
            scored = self._scored(system, run)
            found = self._kept(f"memory-{_plain(system.name)}.json", lambda: measured(system))  # of any task
            return dataclasses.asdict(Row(
                task, system.name, system.kind, system.ours, system.bytes, found["load_s"], found["resident"],
                found["imports"], scored.metric, scored.value, scored.nll, scored.deployed, scored.differ,
            ))  # fmt: skip

        return Row(**self._kept(f"{task}-{_plain(system.name)}.json", made))

    def _scored(self, system: System, run: Path) -> Measured:
        call = opened(system, _EVALUATED_ON)
        if run not in self._held_out:
            self._held_out[run] = held_out_of(load(run).source, run)

        def answer(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.from_numpy(np.array(call({name: x.numpy() for name, x in inputs.items()})))

        with silenced(True):
            return self._held_out[run].measure(answer)

    def times(self, task: str) -> list[Timed]:
        """Of every size and number of threads: all systems in turn."""
        found = []
        for threads in self.threads:
            calls: dict[str, Callable] = {}
            for batch, length in self.sizes:
                name = f"times-{threads}-{batch}x{length}.json"

                def made(batch=batch, length=length, threads=threads, calls=calls) -> list[dict]:
                    if not calls:
                        calls |= {system.name: opened(system, threads) for system, _ in self.systems(task)}
                    print(f"{threads} threads, {batch} x {length}", flush=True)
                    inputs = some_inputs(batch, length)
                    timed = {name: lambda call=call: call(inputs) for name, call in calls.items()}
                    return [dataclasses.asdict(each) for each in
                            _summed(in_turn(timed, seconds=self.seconds), threads, batch, length)]  # fmt: skip

                found += [Timed(**each) for each in self._kept(name, made)]
        return found

    def profiles(self, task: str, batch: int, length: int) -> dict[str, Profile]:
        """Of the systems of PROFILED, by name."""

        def made() -> dict:
            chosen = [system for system, _ in self.systems(task) if system.name in PROFILED]
            return {system.name: profiled(system, batch, length) for system in chosen}

        return self._kept(f"profiles-{batch}x{length}.json", made)

    def _kept(self, name: str, make: Callable):
        path = self.keep / name
        if not path.exists():
            text = json.dumps(make(), indent=1)
            self.keep.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(text + "\n", encoding="utf-8")
            path.with_suffix(".tmp").rename(path)
        return json.loads(path.read_text(encoding="utf-8"))


def _summed(taken: dict[str, list[float]], threads: int, batch: int, length: int) -> list[Timed]:
    ratios = {name: float(np.median(np.array(each) / np.array(taken[FP32]))) for name, each in taken.items()}
    return [Timed(name, threads, batch, length, float(np.median(each)), float(np.percentile(each, 95)), ratios[name])
            for name, each in taken.items()]  # fmt: skip


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).replace("--", "-").strip("-").lower()
