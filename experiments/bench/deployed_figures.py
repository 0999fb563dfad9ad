"""The figures of the benchmark of deployed models, by altair."""

from pathlib import Path

import altair as alt
import pandas as pd

from . import proxies as studied
from .deployed import Row, Timed

_FAMILIES = {"ours": "#0072B2", "onnxruntime": "#D55E00", "torch": "#000000"}  # colours of Okabe and Ito
_SIZE = (8, 128)


def systems(rows: list[Row], timed: list[Timed], path: Path) -> None:
    """NLL against time at 8 x 128 tokens, a panel for each task; the best are at the bottom left."""
    threads = min(x.threads for x in timed)
    ratios = {x.system: x.ratio for x in timed if (x.threads, x.batch, x.length) == (threads, *_SIZE)}
    table = pd.DataFrame([
        {"task": row.task, "system": row.system.removeprefix("onnxruntime "), "time": ratios[row.system],
         "NLL": row.nll, "of": "ours" if row.ours else "onnxruntime" if row.kind == "onnx" else "torch"}
        for row in rows
    ])  # fmt: skip
    panels = []
    for task in dict.fromkeys(table["task"]):
        base = alt.Chart(table[table["task"] == task]).encode(
            x=alt.X("time:Q", title=f"time at {_SIZE[0]} x {_SIZE[1]}, share of fp32 onnxruntime",
                    scale=alt.Scale(type="log", nice=False, padding=30)),
            y=alt.Y("NLL:Q", title="NLL (nats per example)", scale=alt.Scale(zero=False)),
            color=alt.Color("of:N", title=None, scale=alt.Scale(domain=[*_FAMILIES], range=[*_FAMILIES.values()])),
        )  # fmt: skip
        text = base.mark_text(align="left", dx=6, dy=-4, fontSize=9).encode(text="system:N")
        panels.append((base.mark_point(filled=True, size=60) + text).properties(title=task, width=420, height=320))
    alt.hconcat(*panels).resolve_scale(y="independent").save(str(path), scale_factor=1.5)


def proxies(allocated: list[studied.Allocated], path: Path) -> None:
    """Measured time against each predictor, at both sizes; uniform allocations have their names."""
    panels = []
    for batch, length in studied.SIZES:
        at, row = f"{batch} x {length}", []
        for predictor, title in (("bops", "BOPs, share of the model's"), ("bytes", "bytes of the packed projections"),
                                 (f"latency {at}", "seconds by the table of products")):  # fmt: skip
            table = pd.DataFrame([
                {"predicted": each.predicted[predictor], "ms": 1e3 * each.times[at], "name": each.name,
                 "kind": "random" if each.name.startswith("random") else "uniform"}
                for each in allocated
            ])  # fmt: skip
            base = alt.Chart(table).encode(
                x=alt.X("predicted:Q", title=title), y=alt.Y("ms:Q", title=f"ms at {batch} x {length}"),
                color=alt.Color("kind:N", title=None, scale=alt.Scale(range=["#0072B2", "#D55E00"])),
            )  # fmt: skip
            named = base.transform_filter("datum.kind == 'uniform'").mark_text(align="left", dx=5, fontSize=8)
            row.append((base.mark_point(filled=True) + named.encode(text="name:N")).properties(width=240, height=180))
        panels.append(alt.hconcat(*row))
    alt.vconcat(*panels).save(str(path), scale_factor=1.5)
