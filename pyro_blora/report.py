"""A run folder, or a grid's, becomes one HTML page: no network, no other file, light or dark, phone or paper."""

import json
import os
from pathlib import Path

import jinja2
import pandas as pd
import vl_convert

from . import charts
from .run_files import RunFiles, Section
from .sections import headline, sections_of

_TEMPLATES = Path(__file__).parent / "templates"
REPORT = "report.html"


def write_report(folder: str | Path) -> Path:
    """Write report.html into the folder of a finished run, or of a grid of them; an older page is replaced.

    Errors: ValueError for a folder that is neither.
    """
    folder = Path(folder)
    page = _run_page(RunFiles(folder)) if (folder / "summary.json").is_file() else _grid_page(folder)
    partial = folder / f".{REPORT}.partial"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, folder / REPORT)
    return folder / REPORT


def _run_page(run: RunFiles) -> str:
    summary = run.summary
    method = summary.get("method", "bayesian_lora")
    law = f"prior {summary['prior']}" if method == "bayesian_lora" else method
    title = f"{summary['task']} · {summary['backbone']} · {law}"
    return _render(title, run.folder.resolve().name, headline(summary), sections_of(run))


def _grid_page(folder: Path) -> str:
    finished = sorted(path.parent for path in folder.glob("*/summary.json"))
    logs = sorted((folder / "logs").glob("*.json"))
    if not finished and not logs:
        raise ValueError(f"{folder} is neither a finished run nor a grid's folder: it has no summary.json and no runs")
    rows, broken, labels = [], [], _labels(folder)
    for path in finished:
        try:
            rows.append(_row(RunFiles(path), labels.get(path.name)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            broken.append({"run": path.name, "what is wrong": str(error)})
    done = {path.name for path in finished}
    broken += [{"run": log.stem, "what is wrong": _said(log)} for log in logs if log.stem not in done]
    sections = [_failed(broken)] if broken else []
    if rows:
        table = pd.DataFrame(rows)
        sections += [_overview(table), *(_of_task(name, mine) for name, mine in table.groupby("task", sort=False))]
    cards = [
        ("runs", str(len(rows)), "finished"),
        ("failed or unfinished", str(len(broken)), "listed below" if broken else "none"),
    ]
    return _render(f"Grid {folder.resolve().name}", str(folder.resolve().name), cards, sections)


def _said(log: Path) -> str:
    """The last line that a run of a grid printed."""
    text = log.with_suffix(".txt")
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.is_file() else []
    last = next((line.split("\r")[-1].strip() for line in reversed(lines) if line.strip()), "")
    return last or "it printed nothing"


def _labels(folder: Path) -> dict[str, str]:
    """What the grid's axes but task and seed say of each of its run folders."""
    path = folder / "results.parquet"
    try:
        table = pd.read_parquet(path) if path.is_file() else pd.DataFrame()
    except (OSError, ValueError):  # runs have names without it
        return {}
    if "metric" not in table:
        return {}
    axes = [name for name in table.columns[: list(table.columns).index("metric")] if name not in ("task", "seed")]
    told = [", ".join(f"{name} {row[name]}" for name in axes) for _, row in table.iterrows()]
    return dict(zip(table["folder"].map(lambda place: Path(place).name), told, strict=True)) if axes else {}


def _row(run: RunFiles, label: str | None) -> dict:
    s = run.summary
    low, high = s["bops"]["interval"]
    law = s["prior"] if s.get("method", "bayesian_lora") == "bayesian_lora" else s["method"]
    return {
        "folder": run.folder.name, "task": s["task"], "run": label or f"{law}, {s['guide']}", "seed": s["seed"],
        "metric": run.metric, "score": s["metric"]["value"],
        "deployed": s["deployed"]["metric"]["value"], "nll": s["nll"],
        "ece": s["ece"]["value"], "bops": s["bops"]["adapted_ratio"], "low": low, "high": high,
        "interval": f"{low:.2%} to {high:.2%}", "parameters": s["adapter_parameters"],
        "page": f"{run.folder.name}/{REPORT}" if (run.folder / REPORT).is_file() else "",
    }  # fmt: skip


def _failed(broken: list[dict]) -> Section:
    said = f"{len(broken)} runs of this grid have no result: the grid's command goes on with them. The rest is below."
    return Section("Failed or unfinished", warnings=[said], tables=[("", pd.DataFrame(broken), True)])


def _overview(table: pd.DataFrame) -> Section:
    best = [
        f"{task}: {mine.loc[mine['nll'].idxmin(), 'run']} has the lowest NLL, {mine['nll'].min():.4f}, at "
        f"{mine.loc[mine['nll'].idxmin(), 'bops']:.1%} of the adapted projections' bit operations; "
        f"{mine.loc[mine['bops'].idxmin(), 'run']} takes the fewest, {mine['bops'].min():.1%}, at NLL "
        f"{mine.loc[mine['bops'].idxmin(), 'nll']:.4f}."
        for task, mine in table.groupby("task", sort=False)
    ]
    note = "Single numbers of single runs: `experiments/compare.py` gives paired differences with intervals."
    return Section("In plain words", [*best, note])


def _of_task(task: str, runs: pd.DataFrame) -> Section:
    metric = runs["metric"].iloc[0]
    shown = pd.DataFrame({
        "run": runs["run"], "seed": runs["seed"], metric: runs["score"].map("{:.4f}".format),
        "deployed": runs["deployed"].map("{:.4f}".format), "NLL": runs["nll"].map("{:.4f}".format),
        "ECE": runs["ece"].map(lambda x: "-" if pd.isna(x) else f"{x:.4f}"),
        "E[BOPs]": runs["bops"].map("{:.2%}".format), "94 %": runs["interval"],
        "parameters": runs["parameters"].map("{:,}".format),
        "folder": [(f, p) if p else f for f, p in zip(runs["folder"], runs["page"], strict=True)],
    })  # fmt: skip
    chart = charts.trade_off(runs.drop(columns=["folder", "page"]), metric)
    return Section(str(task), charts=[(chart, f"{metric} against expected bit operations, a point a run.")],
                   tables=[("", shown, True)])  # fmt: skip


def _render(title: str, name: str, cards: list[tuple[str, str, str]], sections: list[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    specs = {f"chart-{i}-{j}": spec for i, s in enumerate(sections) for j, (spec, _) in enumerate(s.charts)}
    as_json = json.dumps(specs, allow_nan=False).replace("</", "<\\/")  # a text may hold </script>
    script = vl_convert.javascript_bundle().replace("</script", "<\\/script") if specs else ""
    return environment.get_template("report.html.jinja").render(
        title=title, name=name, cards=cards, sections=sections, specs=as_json, script=script
    )
