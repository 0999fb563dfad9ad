"""Timings of things that are run in turn: only their ratios mean something on a machine that others use too."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

FEWEST, MOST = 5, 200  # rounds


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: a subject against a rival, both run in turn.

    values: medians, quartiles (low, high) in `unit`; ratio: median and quartiles of the rounds' ratios. goal: the
    largest ratio (or value, where there is no rival) that is wanted; a `faster` goal is the least rival / subject.
    """

    section: str
    subject: str
    rival: str | None
    unit: str
    value: tuple[float, float, float]
    rival_value: tuple[float, float, float] | None = None
    ratio: tuple[float, float, float] | None = None
    goal: float | None = None
    faster: bool = False
    at: float | None = None  # place on the axis of a growth plot

    @property
    def figure(self) -> tuple[float, float, float]:
        """What the goal is about: the ratio, turned round where the subject is to be faster; else the value."""
        if self.ratio is None:
            return self.value
        return tuple(1 / x for x in reversed_spread(self.ratio)) if self.faster else self.ratio

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.figure[0] >= self.goal if self.faster else self.figure[0] <= self.goal


def reversed_spread(spread: tuple[float, float, float]) -> tuple[float, float, float]:
    """Median, low, high, with the ends changed over, as they are for the inverse."""
    return spread[0], spread[2], spread[1]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return statistics.median(values), low, high


def in_turn(functions: dict[str, Callable], *, seconds: float, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every call of every function, in rounds that run each once, for about `seconds` in all.

    Each is called twice before, so that caches are warm; every second round goes backwards.
    """

    def timed(function: Callable) -> float:
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for function in functions.values():
        function()
    once = sum(timed(function) for function in functions.values())
    rounds = min(MOST, max(FEWEST, round(seconds / once)))
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: -1 if i % 2 else 1]:
            taken[name].append(timed(functions[name]))
    return taken


def recorded(function: Callable) -> Callable[[], None]:
    """The function's kernels as one CUDA graph: what the GPU takes, without the host's launches."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def compared(section: str, taken: dict[str, list[float]], subject: str, rival: str, **more) -> Row:
    """The row of two of the functions that ran in turn, in milliseconds."""
    ratios = [ours / theirs for ours, theirs in zip(taken[subject], taken[rival], strict=True)]
    ours, theirs = (spread([1e3 * x for x in taken[name]]) for name in (subject, rival))
    return Row(section, subject, rival, "ms", ours, theirs, spread(ratios), **more)
