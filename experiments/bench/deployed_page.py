"""The page of `deploy_benchmark.py`: what matters first, then every number, then how good the proxies are."""

import os
from pathlib import Path

from . import deployed_figures, proxies
from .artefacts import FP32, STATIC, STATIC_OURS
from .deployed import SIZES, Row, Timed

_MB = 1e6
_PACKAGES = ("python", "torch", "onnxruntime", "transformers", "peft", "torchao")
_NEAR = 0.05  # slower than onnxruntime's static int8 by no more
_TARGETS = {(1, 32): 0.40, (8, 128): 0.55}  # of fp32 onnxruntime's time
_POINTS = 0.003  # of the metric, from the gated model's
_ON_DISK = 0.30  # of the model at 32 bit
NARROW = ("ours, W8A8", "ours, latency")  # what the targets of time are about: nearly all products are integer products


def write(
    report: Path, figures: Path, rows: list[Row], timed: list[Timed], allocated: list[proxies.Allocated], told: dict,
    command: str,
) -> None:  # fmt: skip
    """The page at `report`, deployed.png and proxies.png in `figures`."""
    for folder in (report.parent, figures):
        folder.mkdir(parents=True, exist_ok=True)
    deployed_figures.systems(rows, timed, figures / "deployed.png")
    deployed_figures.proxies(allocated, figures / "proxies.png")
    place = os.path.relpath(figures, report.parent)
    parts = [
        "# Deployed models", "",
        f"```sh\n{command}\n```", "",
        f"MiniLM, scope `encoder`, {told['rows']:,} training rows, {told['epochs']} epochs, seed 0; {told['hardware']}, "
        f"{told['date']}, commit {told['commit']}; {', '.join(f'{name} {told[name]}' for name in _PACKAGES)}. The load "
        f"of the machine when it began was {told['load']:.1f}.", "",
        *_what_matters(rows, timed), f"![Time and NLL of every system]({place}/deployed.png)", "",
        *_targets(rows, timed), *_scores(rows), *_times(timed), *_where(), *_proxies(allocated, place), *_gpu(),
    ]  # fmt: skip
    report.write_text("\n".join(parts), encoding="utf-8")


def _at(timed: list[Timed], system: str, batch: int, length: int, threads: int = 1) -> Timed:
    return next(x for x in timed if (x.system, x.batch, x.length, x.threads) == (system, batch, length, threads))


def _of(rows: list[Row], task: str, system: str) -> Row:
    return next(x for x in rows if (x.task, x.system) == (task, system))


def _tasks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.task for row in rows))


def _what_matters(rows: list[Row], timed: list[Timed]) -> list[str]:
    threads, tasks = min(x.threads for x in timed), _tasks(rows)
    names = [
        row.system for row in rows if row.task == tasks[0] and (row.ours or row.system in (FP32, STATIC, STATIC_OURS))
    ]
    sizes = ((1, 32), (8, 128), (32, 128))
    heads = [*(f"{batch} x {length}" for batch, length in sizes), *(f"{task}: {what}" for task in tasks for what in
             (_of(rows, task, FP32).metric, "NLL"))]  # fmt: skip
    lines = [
        "## What matters", "",
        f"Time as a share of fp32 onnxruntime's, {threads} thread; metric and NLL (nats per example) on the whole dev set.",
        "", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|",
    ]  # fmt: skip
    for name in names:
        if "packed" in name:
            continue
        times = [f"{_at(timed, name, *size, threads).ratio:.2f}" for size in sizes]
        scores = [f"{x:.4f}" for task in tasks for x in (_of(rows, task, name).value, _of(rows, task, name).nll)]
        lines.append(f"| {name} | {' | '.join(times + scores)} |")
    return [*lines, ""]


def _targets(rows: list[Row], timed: list[Timed]) -> list[str]:
    threads = min(x.threads for x in timed)
    lines = ["## Targets", "", "| target | measured | |", "|---|---|---|"]

    def line(what: str, measured: str, met: bool) -> None:
        lines.append(f"| {what} | {measured} | {'met' if met else 'missed'} |")

    for name in NARROW:
        for static in (STATIC, STATIC_OURS):
            worst = max(
                _at(timed, name, *size, threads).ratio / _at(timed, static, *size, threads).ratio for size in SIZES
            )
            line(f"{name}: at every size no more than {_NEAR:.0%} slower than {static}", f"{worst:.2f} of its time at most",
                 worst <= 1 + _NEAR)  # fmt: skip
        for (batch, length), goal in _TARGETS.items():
            ratio = _at(timed, name, batch, length, threads).ratio
            line(
                f"{name}: ≤ {goal:.2f} of fp32 onnxruntime's time at {batch} x {length}", f"{ratio:.2f}", ratio <= goal
            )
    for task in _tasks(rows):
        for name in NARROW:
            mine, static = _of(rows, task, name), _of(rows, task, STATIC)
            line(f"{task}, {name}: NLL below that of {STATIC}", f"{mine.nll:.4f}, there {static.nll:.4f}",
                 mine.nll < static.nll)  # fmt: skip
        for row in rows:
            if row.task == task and row.ours:
                gap = abs(row.value - row.gated)
                line(f"{task}, {row.system}: {row.metric} within {_POINTS:.1%} of the gated model's",
                     f"{row.value:.4f}, there {row.gated:.4f}", gap <= _POINTS)  # fmt: skip
        packed = next(row for row in rows if row.task == task and row.kind == "packed")
        share = packed.bytes / _of(rows, task, FP32).bytes
        line(f"{task}, {packed.system}: ≤ {_ON_DISK:.2f} of fp32's bytes", f"{share:.2f}", share <= _ON_DISK)
    return [*lines, "", "Embeddings are not quantized in training and are 47.7 of MiniLM's 90.9 MB, so the packed model "
            "with exact embeddings cannot reach its target on this backbone; `--embeddings 8` does: "
            "[Deploy](../docs/how-to/deploy.md).", ""]  # fmt: skip


def _scores(rows: list[Row]) -> list[str]:
    lines = ["## Size, memory, scores", "",
             "Resident memory is that of a fresh process after one batch of 8 x 128 tokens, in brackets what its imports take "
             "of it; load: seconds from the files to the first call, in that process. Disk: weights and their description. "
             "`differ`: decisions that are not those of the run that it was made of.", ""]  # fmt: skip
    for task in _tasks(rows):
        mine = [row for row in rows if row.task == task]
        lines += [f"### {task}", "", f"| | disk, MB | resident, MB | load, s | {mine[0].metric} | gated model | NLL | differ |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in mine:
            differ = "" if row.differ is None else str(row.differ)
            lines.append(
                f"| {row.system} | {row.bytes / _MB:.1f} | {row.resident / _MB:.0f} ({row.imports / _MB:.0f}) | "
                f"{row.load_s:.2f} | {row.value:.4f} | {row.gated:.4f} | {row.nll:.4f} | {differ} |"
            )
        lines.append("")
    return lines


def _times(timed: list[Timed]) -> list[str]:
    names = list(dict.fromkeys(x.system for x in timed))
    lines = ["## Times", "", "Milliseconds of a forward, median / 95th percentile, all systems in turn in one process; "
             f"below, the median of the rounds' ratios to {FP32}. onnxruntime's threads do not spin after a call, as they "
             "would run beside the next system.", ""]  # fmt: skip
    for threads in dict.fromkeys(x.threads for x in timed):
        sizes = [size for size in SIZES if any((x.batch, x.length) == size for x in timed)]
        head = " | ".join(f"{batch} x {length}" for batch, length in sizes)
        rule = "|---" * (len(sizes) + 1) + "|"
        lines += [f"### {threads} thread{'s' if threads > 1 else ''}", "", f"| ms | {head} |", rule]
        for name in names:
            cells = (_at(timed, name, *size, threads) for size in sizes)
            lines.append(f"| {name} | " + " | ".join(f"{1e3 * x.median:.1f} / {1e3 * x.p95:.1f}" for x in cells) + " |")
        lines += ["", f"| share of {FP32} | {head} |", rule]
        for name in names:
            lines.append(
                f"| {name} | " + " | ".join(f"{_at(timed, name, *size, threads).ratio:.2f}" for size in sizes) + " |"
            )
        lines += ["", f"| texts per second | {head} |", rule]
        for name in names:
            cells = (_at(timed, name, *size, threads) for size in sizes)
            lines.append(f"| {name} | " + " | ".join(f"{x.batch / x.median:,.0f}" for x in cells) + " |")
        lines.append("")
    return lines


def _where() -> list[str]:
    return """## Where the rest of the time goes

Products of codes are a quarter to a fifth of fp32's time; what is left of a forward is not quantized. By onnxruntime's
profile of W8A8 at 8 x 128 tokens, one thread: integer products 27 %, bias and residual sums 14 %, GELU 13 %, the two products
of attention 17 %, transposes 8 %, LayerNorm 5 %, softmax 4 %, rounding inputs to codes 8 %.

What the graph that torch.onnx writes by default costs, and what `export --format onnx` does about it (at 8 x 128, W8A8 fell
from .64 to .41 of fp32's time):

- scaled-dot-product attention is exported with a test for NaN and two selections over all pairs of tokens: attention is
  exported as plain products and a softmax;
- onnxruntime 1.32 fuses a residual sum and its LayerNorm into `SkipLayerNormalization`, which takes about four times as long
  as the two: the sum is written as `Sum`, which it does not fuse;
- clipping an input to its range in float32 reads and writes four bytes a number: the codes are clipped, one byte each; then
  the product with lora_A is fused with the rounding of its result, too;
- alpha / R is in the step of lora_B.

`our graph` is the first two of these applied to onnxruntime's own fp32 and int8 models, so that the comparison is of the
quantization. onnxruntime's static int8 quantizes sums, GELU, softmax and attention, too, which costs NLL; torchao's int8 runs
without torch.compile here, which takes minutes for a model on two cores. Dynamic shapes (any batch, any length) add some twenty
small operations that compute the mask, .2 ms in all.
""".splitlines()


def _proxies(allocated: list[proxies.Allocated], place: str) -> list[str]:
    random = [each for each in allocated if each.name.startswith("random")]
    lines = ["", "## How good a proxy are bit operations?", "",
             f"{len(random)} random allocations of the same model (prior `random`, {min(proxies.SHARES):.0%} to "
             f"{max(proxies.SHARES):.0%} of the model's bit operations), exported and timed in turn on one thread. `latency` is "
             "the sum over a table of products measured alone by `pyro-blora measure-costs`; it leaves out what is not "
             "quantized.", "", "| predictor | of | Spearman | Pearson |", "|---|---|---|---|"]  # fmt: skip
    lines += [f"| {predictor} | {of} | {spearman:.2f} | {pearson:.2f} |"
              for predictor, of, spearman, pearson in proxies.correlations(allocated)]  # fmt: skip
    heads = [f"{batch} x {length}, ms" for batch, length in proxies.SIZES]
    lines += ["", f"![Predicted cost against measured time]({place}/proxies.png)", "",
              "Uniform allocations, which are not among these:", "",
              f"| | BOPs of the model | packed, MB | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]  # fmt: skip
    for each in allocated:
        if each not in random:
            times = " | ".join(f"{1e3 * each.times[f'{batch} x {length}']:.1f}" for batch, length in proxies.SIZES)
            lines.append(f"| {each.name} | {each.predicted['bops']:.1%} | {each.disk / _MB:.1f} | {times} |")
    return [*lines, "", "Below 8 x 8 bit fewer bits save disk and nothing else on this processor; above, a product with one "
            "wide factor runs in float32 whatever the other's width. That is why `--prior budget` takes a cost: "
            "`--prior.cost latency` or `bytes`, see [Deploy](../docs/how-to/deploy.md#what-it-should-cost).", ""]  # fmt: skip


def _gpu() -> list[str]:
    return ["## On a GPU", "", "None was tried: all of this is of a CPU. What would be tried: gemlite by module (weights of 1, 2, "
            "4 and 8 bit with activations at 16 or 8), and torchao's int8 and int4 with torch.compile, against bf16 and "
            "CUDA graphs, at batches of 1 to 256.", ""]  # fmt: skip
