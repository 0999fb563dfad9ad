"""The table of the benchmark as Markdown and JSON, and the plots of growth."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt

from pyro_blora.machine import processor

from .timing import Row

_PACKAGES = ("torch", "pyro-ppl", "transformers", "peft", "accelerate")
_BOUNDS = {  # why a goal can be out of reach
    "Training step": "see where the time goes above: what plain LoRA does not have is the product of a weight's output "
    "gradient with its input, from which the gates of a frozen weight learn, and the grids' passes over memory",
    "Peak memory of training": "plain LoRA keeps no input of a frozen layer without an adapter, the gates of such a "
    "layer's weight and input need it for their gradient (of MiniLM at 32 x 64 tokens: 108 MiB)",
    "Quantizer": "each pass reads and writes memory once; with the tensors in cache its arithmetic bounds it",
}
_UNKNOWN = "run it again on a machine at rest; what differs then is noise"
_COLOURS = ("#0072B2", "#D55E00")  # of Okabe and Ito


def machine(device: str) -> dict:
    """Hardware, versions, commit and day."""
    root = Path(__file__).resolve().parent.parent.parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    """Name and widest vector instructions of the processor."""
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()})"


def write(folder: Path, report: Path, figures: Path, rows: list[Row], told: dict, missing: list[str], command: str):
    """benchmark.json in `folder`, the page at `report`, growth.png in `figures`."""
    for place in (folder, report.parent, figures):
        place.mkdir(parents=True, exist_ok=True)
    found = [dataclasses.asdict(row) | {"met": row.met} for row in rows]
    content = {"machine": told, "rows": found, "not_taken": missing}
    (folder / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    growing = [row for row in rows if row.at is not None]
    if growing:
        _plot(growing, figures / "growth.png")
    picture = f"{os.path.relpath(figures, report.parent)}/growth.png" if growing else None
    report.write_text(_markdown(rows, told, missing, command, picture), encoding="utf-8")


def _markdown(rows: list[Row], told: dict, missing: list[str], command: str, picture: str | None) -> str:
    lines = [
        "# Benchmark", "",
        f"`{command}` on {told['hardware']}, {told['threads']} threads, {told['date']}, commit {told['commit']}; "
        + ", ".join(f"{key} {told[key]}" for key in ("python", *_PACKAGES)) + ".", "",
        "Medians, with quartiles in brackets, of things run in turn in one process; ratios are those of each round. "
        "Only ratios mean something: the machine may be busy with other things. A goal is the largest ratio wanted, or "
        "with ≥ how many times as fast.", "",
    ]  # fmt: skip
    for section in dict.fromkeys(row.section for row in rows):
        lines += [f"## {section}", "", "| | | against | | ratio | goal |", "|---|---|---|---|---|---|"]
        lines += [_line(row) for row in rows if row.section == section] + [""]
    if picture:
        lines += ["## Growth", "", f"![How times grow with the size of things]({picture})", ""]
    lost = [row for row in rows if row.met is False]
    if lost:
        lines += ["## Goals that were missed", ""]
        for row in lost:
            against = f" against {row.rival}" if row.rival else ""
            why = _BOUNDS.get(_kind(row), _UNKNOWN)
            lines.append(f"- {row.subject}{against}, {row.section.lower()}: {why}.")
        lines.append("")
    if missing:
        lines += ["## Not taken on this machine", ""] + [f"- {what}" for what in missing] + [""]
    return "\n".join(lines)


def _kind(row: Row) -> str:
    """What bounds a row, as `_BOUNDS` names it."""
    return row.section if row.section in _BOUNDS else row.section.split(",")[0]


def _line(row: Row) -> str:
    subject = row.subject if row.at is None or row.rival is None else f"{row.subject}, {row.at:g}"
    rival = (row.rival or "", _number(row.rival_value, row.unit) if row.rival_value else "")
    ratio = _number(row.figure, "times" if row.faster else "") if row.ratio else ""
    goal = "" if row.goal is None else f"{'≥' if row.faster else '≤'} {row.goal:.3g} {'✓' if row.met else '✗'}"
    return f"| {subject} | {_number(row.value, row.unit)} | {' | '.join(rival)} | {ratio} | {goal} |"


def _number(spread: tuple[float, float, float], unit: str) -> str:
    median, low, high = (f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in spread)
    ends = f"[{low}, {high}]" if spread[1] < spread[2] else ""
    return " ".join(filter(None, (median, unit, ends)))


def _plot(rows: list[Row], path: Path) -> None:
    """A panel for each thing that grows: both times, and their ratio as text."""
    sections = list(dict.fromkeys(row.section for row in rows))
    figure, panels = plt.subplots(2, -(-len(sections) // 2), figsize=(11, 6), squeeze=False)
    for axes, section in zip(panels.flat, sections, strict=False):
        here = [row for row in rows if row.section == section]
        places = [row.at for row in here]
        series = {here[-1].subject: [row.value for row in here]}
        if all(row.rival_value for row in here):
            series[here[-1].rival] = [row.rival_value for row in here]
        else:
            series = {"gates alone": series[here[-1].subject]}
        for (name, values), colour in zip(series.items(), _COLOURS, strict=False):
            axes.plot(places, [v[0] for v in values], "o-", color=colour, label=name)
            axes.fill_between(places, [v[1] for v in values], [v[2] for v in values], color=colour, alpha=0.2)
        for row in here:
            if row.rival_value and len(series) == 2:
                axes.annotate(f"{row.ratio[0]:.2f}", (row.at, row.value[0]), (0, 6), textcoords="offset points",
                              fontsize=8, ha="center")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.minorticks_off()
        axes.set_ylabel("ms")
        axes.set_title(section, fontsize=10)
        axes.legend(fontsize=8)
    for axes in panels.flat[len(sections) :]:
        axes.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
