"""A part's page, from its lines: JSON beside Markdown, each replaced whole."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

from .session import NO_TIME, ROOT

_PACKAGES = ("torch", "pyro-ppl", "transformers", "peft", "arviz", "triton")


def machine() -> dict:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        card = f"no GPU, {os.cpu_count()} cores"
    found = {"card": card, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    found["commit"] = commit.stdout.strip() or "unknown"
    return found


def write(out: Path, part: str, title: str, told: dict, command: str, lines: list[dict]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {"part": part, "machine": told, "command": command, "lines": lines}
    _replace(out / f"{part}.json", json.dumps(content, indent=1) + "\n")
    head = ", ".join(f"{key} {value}" for key, value in told.items() if key != "card")
    text = [f"# {title}", "", f"`{command}` on {told['card']}; {head}.", ""]
    late = [line["name"] for line in lines if NO_TIME in line.get("failed", "")]
    for line in lines:
        if line["name"] not in late:
            text += [f"## {line['name']}", "", *_body(line), ""]
    if late:
        text += ["## No time was left for", "", *(f"- {name}" for name in late), ""]
    _replace(out / f"{part}.md", "\n".join(text))


def _body(line: dict) -> list[str]:
    if "failed" in line:
        return ["Failed:", "", "```", *line["failed"].splitlines(), "```"]
    if "rows" in line:
        table = ["| section | subject | | against | | ratio | goal |", "|---|---|---|---|---|---|---|"]
        return table + [_row(row) for row in line["rows"]]
    values = {key: value for key, value in line.items() if key not in ("name", "folder")}
    return ["| | |", "|---|---|", *(f"| {key} | {_shown(value)} |" for key, value in values.items())]


def _row(row: dict) -> str:
    ratio, goal = row["ratio"], row["goal"]
    shown = f"{ratio[0]:.3g} [{ratio[1]:.3g}, {ratio[2]:.3g}]" if ratio else ""
    theirs = f"{row['rival_value'][0]:.4g} {row['unit']}" if row["rival_value"] else ""
    return (
        f"| {row['section']} | {row['subject']} | {row['value'][0]:.4g} {row['unit']} | {row['rival'] or ''} "
        f"| {theirs} | {shown} | {'' if goal is None else f'{goal:.3g}'} |"
    )


def _shown(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_shown(x)}" for key, x in value.items())
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
