"""The charts of a report, as Vega-Lite specifications made by Altair from tables.

Every chart takes its container's width, has a tooltip on every mark and a description for screen readers, and inherits
the page's text colour, so that it follows light, dark and paper.
"""

import json

import altair as alt
import pandas as pd

_TEXT, _LINES = "currentColor", "#88888855"
WIDTHS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"]  # viridis, from 2 to 32 bit
TYPES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito
_CONFIG = {
    "background": "transparent",
    "font": "inherit",
    "view": {"stroke": None},
    "axis": {"labelColor": _TEXT, "titleColor": _TEXT, "gridColor": _LINES, "domainColor": _LINES, "tickColor": _LINES,
             "titleFontWeight": "normal"},
    "legend": {"labelColor": _TEXT, "titleColor": _TEXT, "orient": "top", "titleFontWeight": "normal", "columns": 5},
    "title": {"color": _TEXT},
}  # fmt: skip


def _spec(chart: alt.TopLevelMixin, description: str) -> dict:
    spec = chart.properties(width="container", description=description).to_dict(validate=False)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["config"] = _CONFIG
    return spec


def _data(table: pd.DataFrame) -> alt.Data:
    """The rows inside the specification; no number is cut, nan becomes null."""
    return alt.Data(values=json.loads(table.to_json(orient="records")))


def gate_map(cells: pd.DataFrame) -> dict:
    """Deployed width as colour, a circle as large as the doubt; columns: see `report.cells_of`."""
    columns = list(dict.fromkeys(cells["column"]))
    tips = [name for name in cells.columns if name not in ("column", "layer", "doubt", "label", "width")]
    base = alt.Chart(_data(cells)).encode(
        x=alt.X("column:N", sort=columns, title=None, axis=alt.Axis(orient="top", labelAngle=-60, labelLimit=120)),
        y=alt.Y("layer:O", title="layer"),
        tooltip=[alt.Tooltip(f"{name}:N") for name in tips],
    )
    widths = sorted(set(cells["width"]) | {2, 4, 8, 16, 32})
    colours = alt.Scale(domain=widths, range=WIDTHS)
    squares = base.mark_rect(stroke="#8888", strokeWidth=0.5).encode(
        color=alt.Color("width:O", scale=colours, title="deployed bits")
    )
    size = alt.Scale(domain=[0, 0.8], range=[0, 130], clamp=True)
    doubts = base.mark_point(fill="white", stroke="black", strokeWidth=0.7, opacity=0.9).encode(
        size=alt.Size("doubt:Q", scale=size, legend=None)
    )
    chart = (squares + doubts).resolve_scale(color="independent", size="independent")
    layers = cells["layer"].nunique()
    return _spec(chart.properties(height=28 * layers), "Gate map: bit width of every tensor by layer")


def rank_map(ranks: pd.DataFrame) -> dict:
    """Probability of every number of open ranks, a row a projection; its mean and interval on hover."""
    order = list(dict.fromkeys(ranks["projection"]))
    y = alt.Y("projection:N", sort=order, title=None)
    squares = alt.Chart(_data(ranks)).mark_rect().encode(
        x=alt.X("rank:O", title="open ranks", axis=alt.Axis(labelAngle=0)), y=y,
        color=alt.Color("probability:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]),
                        legend=alt.Legend(format=".0%", columns=1)),
        tooltip=["projection:N", "rank:O", alt.Tooltip("probability:Q", format=".3f"),
                 alt.Tooltip("mean:Q", format=".2f"), "interval:N"],
    )  # fmt: skip
    return _spec(squares.properties(height=17 * len(order)), "Posterior of the rank of every projection")


def rank_means(means: pd.DataFrame) -> dict:
    """Mean rank with its 94 % interval by layer, a colour a projection type: the paper's Figure 2."""
    types = list(dict.fromkeys(means["type"]))
    base = alt.Chart(_data(means)).encode(
        x=alt.X("layer:O", axis=alt.Axis(labelAngle=0)), xOffset=alt.XOffset("type:N", sort=types),
        color=alt.Color("type:N", sort=types, scale=alt.Scale(domain=types, range=TYPES[: len(types)])),
        tooltip=["projection:N", alt.Tooltip("mean:Q", format=".2f"), "interval:N"],
    )  # fmt: skip
    y = alt.Y("mean:Q", title="open ranks", scale=alt.Scale(zero=False))
    return _spec(
        (base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title="open ranks"), y2="high:Q")
         + base.mark_point(filled=True, size=45, opacity=1).encode(y=y)).properties(height=220),
        "Mean rank of query, key and value by layer with 94 % intervals",
    )  # fmt: skip


def reliability(bins: pd.DataFrame) -> dict:
    """Accuracy against confidence, a point a bin, as large as its share of the examples; the diagonal is calibrated."""
    end = pd.DataFrame({"confidence": [0.0, 1.0], "accuracy": [0.0, 1.0]})
    low = float(min(bins["confidence"].min(), bins["accuracy"].min()))
    scale = alt.Scale(domain=[max(0.0, low - 0.05), 1.0], clamp=True)
    x = alt.X(
        "confidence:Q",
        scale=scale,
        title="confidence: mean predicted probability of the decision",
        axis=alt.Axis(tickCount=6),
    )
    y = alt.Y("accuracy:Q", scale=scale, title="accuracy")
    line = alt.Chart(_data(end)).mark_line(color=_TEXT, strokeDash=[4, 4], opacity=0.6).encode(x=x, y=y)
    base = alt.Chart(_data(bins)).encode(
        x=x, tooltip=["bin:N", alt.Tooltip("confidence:Q", format=".3f"), alt.Tooltip("accuracy:Q", format=".3f"),
                      "examples:Q"],
    )  # fmt: skip
    errors = base.mark_rule(color=TYPES[0], opacity=0.6).encode(y=alt.Y("low:Q", title="accuracy"), y2="high:Q")
    points = base.mark_point(filled=True, color=TYPES[0], opacity=1).encode(
        y=y, size=alt.Size("examples:Q", scale=alt.Scale(range=[20, 260]))
    )
    return _spec((line + errors + points).properties(height=300), "Reliability diagram")


def curves(log: pd.DataFrame, names: list[str], title: str, log_scale: bool = False) -> dict:
    """Lines of logged numbers over the optimizer steps."""
    long = log.melt("step", names, var_name="quantity", value_name="value").dropna()
    scale = alt.Scale(type="log") if log_scale else alt.Scale(zero=False)
    colour = alt.Color("quantity:N", sort=names, title=None, scale=alt.Scale(domain=names, range=TYPES[: len(names)]))
    lines = (
        alt.Chart(_data(long))
        .mark_line(point={"size": 14, "filled": True})
        .encode(
            x="step:Q",
            y=alt.Y("value:Q", title=title, scale=scale),
            color=colour,
            tooltip=["step:Q", "quantity:N", alt.Tooltip("value:Q", format=".4g")],
        )
    )
    return _spec(lines.properties(height=200), title)


def bars(table: pd.DataFrame, category: str, value: str, group: str, title: str) -> dict:
    """Stacked horizontal bars, shares of the denominator."""
    order, groups = list(dict.fromkeys(table[category])), list(dict.fromkeys(table[group]))
    colours = (WIDTHS + TYPES)[: len(groups)]
    chart = (
        alt.Chart(_data(table))
        .mark_bar()
        .encode(
            y=alt.Y(f"{category}:N", sort=order, title=None),
            x=alt.X(f"sum({value}):Q", title=title, axis=alt.Axis(format="%")),
            color=alt.Color(f"{group}:N", sort=groups, scale=alt.Scale(domain=groups, range=colours)),
            tooltip=[f"{category}:N", f"{group}:N", alt.Tooltip(f"sum({value}):Q", format=".3%", title=title)],
        )
    )
    return _spec(chart.properties(height=26 * len(order) + 10), title)


def trade_off(runs: pd.DataFrame, metric: str) -> dict:
    """A grid's runs: metric against expected bit operations, whiskers their 94 % intervals."""
    names = list(dict.fromkeys(runs["run"]))
    few = len(names) <= 12  # as many as a legend can hold
    base = alt.Chart(_data(runs)).encode(
        color=alt.Color("run:N", sort=names, legend=alt.Legend(columns=2, labelLimit=320) if few else None),
        tooltip=["run:N", "seed:N", alt.Tooltip("score:Q", format=".4f", title=metric),
                 alt.Tooltip("bops:Q", format=".2%", title="E[BOPs] / adapted"), "interval:N"],
    )  # fmt: skip
    axis, scale = alt.Axis(format="~%"), alt.Scale(type="log")
    title = "expected BOPs, of the adapted projections at 32 x 32"
    x = alt.X("bops:Q", title=title, scale=scale, axis=axis)
    y = alt.Y("score:Q", title=metric, scale=alt.Scale(zero=False))
    rules = base.mark_rule(opacity=0.5).encode(x=alt.X("low:Q", title=title, scale=scale, axis=axis), x2="high:Q", y=y)
    return _spec((rules + base.mark_point(filled=True, size=70, opacity=1).encode(x=x, y=y)).properties(height=320),
                 f"{metric} against expected bit operations")  # fmt: skip
