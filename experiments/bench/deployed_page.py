"""The page of `deploy_benchmark.py`: what matters first, then every number, then how good the proxies are."""

import os
from collections.abc import Callable
from pathlib import Path

from . import deployed_figures, proxies
from .artefacts import FP32, STATIC, STATIC_OURS
from .deployed import Row, Timed
from .deployed_words import EMBEDDINGS, GPU, PROXIES, SCORES, TIMES, WHERE
from .profiles import Profile

_MB = 1e6
_PACKAGES = ("python", "torch", "onnxruntime", "transformers", "peft", "torchao")
_SHOWN = ((1, 32), (8, 128), (32, 128))  # sizes in the first table
_NEAR = 0.05  # slower than onnxruntime's static int8 by no more
_TARGETS = {(1, 32): 0.40, (8, 128): 0.55}  # of fp32 onnxruntime's time
_FEW = 1000  # training rows, below which nothing is learned that a score could be about
_TRIAL = "**A trial on few rows: it shows that the script runs, and no score or time that one should keep.**"
_POINTS = 0.003  # of the metric, from the gated model's
_ON_DISK = 0.30  # of the model at 32 bit
NARROW = ("ours, W8A8", "ours, latency")  # what the targets of time are about: nearly all products are of integers
_RIVALS = (FP32, STATIC, STATIC_OURS)


class _Found:
    """Rows by task and system, times by system and size."""

    def __init__(self, rows: list[Row], timed: list[Timed]):
        self.rows, self.timed = rows, timed
        self.tasks = list(dict.fromkeys(row.task for row in rows))
        self.sizes = list(dict.fromkeys((x.batch, x.length) for x in timed))
        self.shown = [size for size in _SHOWN if size in self.sizes]
        self.threads = list(dict.fromkeys(x.threads for x in timed))
        self._rows = {(row.task, row.system): row for row in rows}
        self._times = {(x.system, x.batch, x.length, x.threads): x for x in timed}

    def row(self, task: str, system: str) -> Row:
        return self._rows[task, system]

    def time(self, system: str, batch: int, length: int, threads: int | None = None) -> Timed:
        return self._times[system, batch, length, threads or self.threads[0]]


def write(
    report: Path, figures: Path, rows: list[Row], timed: list[Timed], profiles: dict[str, Profile],
    allocated: list[proxies.Allocated], told: dict, command: str,
) -> None:  # fmt: skip
    """The page at `report`, deployed.png and proxies.png in `figures`."""
    for folder in (report.parent, figures):
        folder.mkdir(parents=True, exist_ok=True)
    deployed_figures.systems(rows, timed, figures / "deployed.png")
    deployed_figures.proxies(allocated, figures / "proxies.png")
    place, found = os.path.relpath(figures, report.parent), _Found(rows, timed)
    versions = ", ".join(f"{name} {told[name]}" for name in _PACKAGES)
    parts = [
        "# Deployed models", "",
        f"```sh\n{command}\n```", "",
        f"MiniLM, scope `encoder`, {told['rows']:,} training rows, {told['epochs']} epochs, seed 0; "
        f"{told['hardware']}, {told['date']}, commit {told['commit']}; {versions}. The machine's load was "
        f"{told['load']:.1f} when it began.", "",
        *([_TRIAL, ""] if told["rows"] < _FEW else []), *_what_matters(found),
        f"![Time and NLL of every system]({place}/deployed.png)", "",
        *_targets(found), *_scores(found), *_times(found), *_where(profiles), *_proxies(allocated, place), GPU,
    ]  # fmt: skip
    report.write_text("\n".join(parts), encoding="utf-8")


def _table(heads: list[str], lines: list[list[str]]) -> list[str]:
    rule = "|" + "---|" * len(heads)
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in lines), ""]


def _what_matters(found: _Found) -> list[str]:
    metrics = [f"{task}: {what}" for task in found.tasks for what in (found.row(task, FP32).metric, "NLL")]
    names = [row.system for row in found.rows if row.task == found.tasks[0] and row.kind == "onnx"]
    lines = []
    for name in (name for name in names if name in _RIVALS or found.row(found.tasks[0], name).ours):
        times = [f"{found.time(name, *size).ratio:.2f}" for size in found.shown]
        each = [found.row(task, name) for task in found.tasks]
        lines.append([name, *times, *(f"{x:.4f}" for row in each for x in (row.value, row.nll))])
    return [
        "## What matters", "",
        f"Time of a forward (texts x tokens) as a share of fp32 onnxruntime's, {found.threads[0]} thread; metric, and "
        "NLL in nats per example, on the whole dev set.", "",
        *_table(["", *(f"{batch} x {length}" for batch, length in found.shown), *metrics], lines),
    ]  # fmt: skip


def _targets(found: _Found) -> list[str]:
    lines: list[list[str]] = []

    def line(what: str, measured: str, met: bool) -> None:
        lines.append([what, measured, "met" if met else "missed"])

    for name in NARROW:
        for static in (STATIC, STATIC_OURS):
            worst = max(found.time(name, *size).ratio / found.time(static, *size).ratio for size in found.sizes)
            what = f"{name}: at no size more than {_NEAR:.0%} slower than {static}"
            line(what, f"at most {worst:.2f} of its time", worst <= 1 + _NEAR)
        for (batch, length), goal in _TARGETS.items():
            ratio = found.time(name, batch, length).ratio
            line(
                f"{name}: at {batch} x {length} ≤ {goal:.2f} of fp32 onnxruntime's time", f"{ratio:.2f}", ratio <= goal
            )
    for task in found.tasks:
        theirs = found.row(task, STATIC)
        for mine in (found.row(task, name) for name in NARROW):
            what = f"{task}, {mine.system}: NLL below that of {STATIC}"
            line(what, f"{mine.nll:.4f}, there {theirs.nll:.4f}", mine.nll < theirs.nll)
        for row in (row for row in found.rows if row.task == task and row.ours):
            what = f"{task}, {row.system}: {row.metric} within {100 * _POINTS:.1f} points of the gated model's"
            line(what, f"{row.value:.4f}, there {row.gated:.4f}", abs(row.value - row.gated) <= _POINTS)
        packed = next(row for row in found.rows if row.task == task and row.kind == "packed")
        share = packed.bytes / found.row(task, FP32).bytes
        line(f"{task}, {packed.system}: ≤ {_ON_DISK:.2f} of fp32's bytes", f"{share:.2f}", share <= _ON_DISK)
    return ["## Targets", "", *_table(["target", "measured", ""], lines), EMBEDDINGS]


def _scores(found: _Found) -> list[str]:
    parts = ["## Size, memory, scores", "", SCORES]
    for task in found.tasks:
        mine = [row for row in found.rows if row.task == task]
        heads = ["", "disk, MB", "resident, MB", "load, s", mine[0].metric, "gated model", "NLL", "differ"]
        lines = [
            [row.system, f"{row.bytes / _MB:.1f}", f"{row.resident / _MB:.0f} ({row.imports / _MB:.0f})",
             f"{row.load_s:.2f}", f"{row.value:.4f}", f"{row.gated:.4f}", f"{row.nll:.4f}",
             "" if row.differ is None else str(row.differ)]
            for row in mine
        ]  # fmt: skip
        parts += [f"### {task}", "", *_table(heads, lines)]
    return parts


def _times(found: _Found) -> list[str]:
    names = list(dict.fromkeys(x.system for x in found.timed))
    shown: dict[str, Callable[[Timed], str]] = {
        "ms, median / p95": lambda x: f"{1e3 * x.median:.1f} / {1e3 * x.p95:.1f}",
        f"share of {FP32}": lambda x: f"{x.ratio:.2f}",
        "texts per second": lambda x: f"{x.batch / x.median:,.0f}",
    }
    parts = ["## Times", "", TIMES]
    for threads in found.threads:
        parts += [f"### Threads: {threads}", ""]
        for head, cell in shown.items():
            heads = [head, *(f"{batch} x {length}" for batch, length in found.sizes)]
            lines = [[name, *(cell(found.time(name, *size, threads)) for size in found.sizes)] for name in names]
            parts += _table(heads, lines)
    return parts


def _where(profiles: dict[str, Profile]) -> list[str]:
    heads, parts = ["operation", "ms of a forward", "calls"], ["## Where the time goes", "", WHERE]
    for name, profile in profiles.items():
        total = sum(ms for _, ms, _ in profile)
        parts += [f"{name}, {total:.0f} ms, 8 x 128 tokens on one thread:", ""]
        parts += _table(heads, [[operation, f"{ms:.1f}", str(calls)] for operation, ms, calls in profile])
    return parts


def _proxies(allocated: list[proxies.Allocated], place: str) -> list[str]:
    random = [each for each in allocated if each.name.startswith("random")]
    lines = [[predictor, of, f"{spearman:.2f}", f"{pearson:.2f}"]
             for predictor, of, spearman, pearson in proxies.correlations(allocated)]  # fmt: skip
    uniform = [
        [each.name, f"{each.predicted['bops']:.1%}", f"{each.disk / _MB:.1f}",
         *(f"{1e3 * each.times[f'{batch} x {length}']:.1f}" for batch, length in proxies.SIZES)]
        for each in allocated if each not in random
    ]  # fmt: skip
    heads = ["", "BOPs of the model", "packed, MB", *(f"{batch} x {length}, ms" for batch, length in proxies.SIZES)]
    return [
        "## How good a proxy are bit operations?", "",
        f"{len(random)} random allocations of one model (prior `random`, {min(proxies.SHARES):.0%} to "
        f"{max(proxies.SHARES):.0%} of the model's bit operations), exported and timed in turn on one thread. "
        "`latency` is the sum over a table of products that `pyro-blora measure-costs` measured one by one; it leaves "
        "out what is not quantized, which is the same for all.", "",
        *_table(["predictor", "of", "Spearman", "Pearson"], lines),
        f"![Predicted cost against measured time]({place}/proxies.png)", "",
        "Uniform allocations, which are not among them:", "", *_table(heads, uniform), PROXIES,
    ]  # fmt: skip
