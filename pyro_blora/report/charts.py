"""The charts of a report, as Vega-Lite specifications made by Altair from tables.

Every chart takes its container's width, has a tooltip on every mark and a description for screen readers, and inherits
the page's text colour, so that it follows light, dark and paper. Titles of axes are short enough for a phone: captions
say the rest. An axis whose values are all alike is as wide as a reader expects, not as rounding errors are.
"""

import json
import math
from collections.abc import Iterable, Sequence

import altair as alt
import pandas as pd

from ..interval import PERCENT

_TEXT, _LINES = "currentColor", "#88888855"
_FONT = "system-ui, sans-serif"  # the page's; a name that Vega can measure, which "inherit" is not
_VISIBLE = 5e-4  # the least probability that has a mark
_ALIKE = 1e-6  # of the largest value: a smaller range is a rounding error
VIRIDIS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"]  # of bit widths, from the fewest to 32
TYPES = ["#3182bd", "#D55E00", "#009E73", "#CC79A7", "#b8860b", "#8c6bb1"]  # nearly Okabe and Ito's, on either paper
_CONFIG = {
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {"labelColor": _TEXT, "titleColor": _TEXT, "gridColor": _LINES, "domainColor": _LINES, "tickColor": _LINES,
             "titleFontWeight": "normal", "labelOverlap": "greedy", "labelSeparation": 6},
    "legend": {"labelColor": _TEXT, "titleColor": _TEXT, "orient": "top", "titleFontWeight": "normal", "columns": 5},
    "title": {"color": _TEXT},
}  # fmt: skip


# Of bars, from few bits to many; each stands out from white and from black paper, and has an outline besides.
STEPS = ["#6a51a3", "#4575b4", "#1b9e9e", "#4daf4a", "#b8860b"]


def _scale(values: Iterable[float], log: bool = False) -> alt.Scale:
    """The scale of an axis, without its zero; a wider domain where all values are equal."""
    found = [float(x) for x in values if x is not None and math.isfinite(x)]
    low, high = (min(found), max(found)) if found else (1.0, 1.0)
    if high - low > _ALIKE * max(abs(low), abs(high)):
        return alt.Scale(type="log") if log else alt.Scale(zero=False)
    if log:
        return alt.Scale(type="log", domain=[low / 2, high * 2])
    pad = 0.1 * abs(high) or 1.0
    return alt.Scale(domain=[low - pad, high + pad])


# Altair would check each object as it is made: the tests check what comes out. And it looks for the class of a plain
# string among all that it has, hence Tooltip, Y2 and X2 below.
_unchecked = alt.utils.schemapi.debug_mode(False)


def _spec(chart: alt.TopLevelMixin, description: str) -> dict:
    spec = chart.properties(width="container", description=description).to_dict(validate=False)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["config"] = _CONFIG
    return spec


def _data(table: pd.DataFrame) -> alt.Data:
    """The rows inside the specification; no number is cut, nan becomes null."""
    return alt.Data(values=json.loads(table.to_json(orient="records")))


def _shades(count: int) -> list[str]:
    """Colours of viridis at equal distances, as many as there are bit widths."""
    found = []
    for i in range(count):
        place, part = divmod(i * (len(VIRIDIS) - 1), max(1, count - 1))
        near, far = (bytes.fromhex(VIRIDIS[min(k, len(VIRIDIS) - 1)][1:]) for k in (place, place + 1))
        share = part / max(1, count - 1)
        mixed = (round((1 - share) * a + share * b) for a, b in zip(near, far, strict=True))
        found.append("#" + bytes(mixed).hex())
    return found


@_unchecked
def gate_map(cells: pd.DataFrame, ladder: Sequence[int]) -> dict:
    """Deployed width as colour, a circle as large as the doubt; columns: see `sections.gates.cells_of`."""
    columns = list(dict.fromkeys(cells["column"]))
    tips = [name for name in cells.columns if name not in ("column", "layer", "doubt", "label", "width")]
    base = alt.Chart(_data(cells)).encode(
        x=alt.X(
            "column:N",
            sort=columns,
            title=None,
            axis=alt.Axis(orient="top", labelAngle=-90, labelLimit=120, labelOverlap=False),
        ),
        y=alt.Y("layer:O", title="layer"),
        tooltip=[alt.Tooltip(f"{name}:N") for name in tips],
    )
    colours = alt.Scale(domain=[*ladder], range=_shades(len(ladder)))
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


@_unchecked
def rank_map(ranks: pd.DataFrame) -> dict:
    """Probability of every number of open ranks, a row a projection; its mean and interval on hover.

    Without those that no reader sees, which are most of them where ranks are many.
    """
    order, numbers = list(dict.fromkeys(ranks["projection"])), [*range(1, int(ranks["rank"].max()) + 1)]
    ranks = ranks[ranks["probability"] >= _VISIBLE]
    y = alt.Y("projection:N", sort=order, title=None)
    squares = alt.Chart(_data(ranks)).mark_rect().encode(
        x=alt.X("rank:O", title="open ranks", scale=alt.Scale(domain=numbers), axis=alt.Axis(labelAngle=0)), y=y,
        color=alt.Color("probability:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]),
                        legend=alt.Legend(format=".0%", columns=1, values=[0, 0.5, 1])),
        tooltip=[alt.Tooltip("projection:N"), alt.Tooltip("rank:O"), alt.Tooltip("probability:Q", format=".3f"),
                 alt.Tooltip("mean:Q", format=".2f"), alt.Tooltip("interval:N")],
    )  # fmt: skip
    return _spec(squares.properties(height=17 * len(order)), "Posterior of the rank of every projection")


@_unchecked
def rank_means(means: pd.DataFrame) -> dict:
    """Mean rank with its 94 % interval by layer, a colour a projection type: the paper's Figure 2."""
    types = list(dict.fromkeys(means["type"]))
    base = alt.Chart(_data(means)).encode(
        x=alt.X("layer:O", axis=alt.Axis(labelAngle=0)), xOffset=alt.XOffset("type:N", sort=types),
        color=alt.Color("type:N", sort=types, scale=alt.Scale(domain=types, range=TYPES[: len(types)])),
        tooltip=[alt.Tooltip("projection:N"), alt.Tooltip("mean:Q", format=".2f"), alt.Tooltip("interval:N")],
    )  # fmt: skip
    scale = _scale([*means["low"], *means["high"], *means["mean"]])
    y, low = (alt.Y(f"{name}:Q", title="open ranks", scale=scale) for name in ("mean", "low"))
    return _spec(
        (base.mark_rule(strokeWidth=2).encode(y=low, y2=alt.Y2("high:Q"))
         + base.mark_point(filled=True, size=45, opacity=1).encode(y=y)).properties(height=220),
        f"Mean rank of query, key and value by layer with {PERCENT} intervals",
    )  # fmt: skip


@_unchecked
def reliability(bins: pd.DataFrame) -> dict:
    """Accuracy against confidence, a point a bin, as large as its share of the examples; the diagonal is calibrated."""
    end = pd.DataFrame({"confidence": [0.0, 1.0], "accuracy": [0.0, 1.0]})
    low = float(min(bins["confidence"].min(), bins["accuracy"].min()))
    scale = alt.Scale(domain=[max(0.0, low - 0.05), 1.0], clamp=True)
    x = alt.X(
        "confidence:Q",
        scale=scale,
        title="confidence",
        axis=alt.Axis(tickCount=6),
    )
    y = alt.Y("accuracy:Q", scale=scale, title="accuracy")
    line = alt.Chart(_data(end)).mark_line(color=_TEXT, strokeDash=[4, 4], opacity=0.6).encode(x=x, y=y)
    base = alt.Chart(_data(bins)).encode(
        x=x, tooltip=[alt.Tooltip("bin:N"), alt.Tooltip("confidence:Q", format=".3f"),
                      alt.Tooltip("accuracy:Q", format=".3f"), alt.Tooltip("examples:Q")],
    )  # fmt: skip
    errors = base.mark_rule(color=TYPES[0], strokeWidth=1.5).encode(
        y=alt.Y("low:Q", title="accuracy"), y2=alt.Y2("high:Q")
    )
    points = base.mark_point(filled=True, color=TYPES[0], opacity=1).encode(
        y=y, size=alt.Size("examples:Q", scale=alt.Scale(range=[20, 260]), legend=None)
    )
    return _spec((line + errors + points).properties(height=300), "Reliability diagram")


@_unchecked
def curves(log: pd.DataFrame, names: list[str], axis: str, description: str, log_scale: bool = False) -> dict:
    """Lines of logged numbers over the optimizer steps."""
    long = log.melt("step", names, var_name="quantity", value_name="value").dropna()
    colour = alt.Color("quantity:N", sort=names, title=None, scale=alt.Scale(domain=names, range=TYPES[: len(names)]))
    lines = (
        alt.Chart(_data(long))
        .mark_line(point={"size": 14, "filled": True})
        .encode(
            x=alt.X("step:Q", scale=_scale(long["step"]), axis=alt.Axis(format="d", tickMinStep=1)),
            y=alt.Y("value:Q", title=axis, scale=_scale(long["value"], log_scale), axis=alt.Axis(tickCount=5)),
            color=colour,
            tooltip=[alt.Tooltip("step:Q"), alt.Tooltip("quantity:N"), alt.Tooltip("value:Q", format=".4g")],
        )
    )
    return _spec(lines.properties(height=200), description)


@_unchecked
def bars(table: pd.DataFrame, category: str, value: str, group: str, title: str) -> dict:
    """Stacked horizontal bars, shares of the denominator."""
    order, groups = list(dict.fromkeys(table[category])), list(dict.fromkeys(table[group]))
    table = table.groupby([category, group], sort=False)[[value]].sum().reset_index()  # not a row for every gate
    colours = (STEPS + TYPES)[: len(groups)]
    empty = not table.groupby(category)[value].sum().abs().max() > 0
    scale = alt.Scale(domain=[0, 1]) if empty else alt.Undefined
    chart = (
        alt.Chart(_data(table))
        .mark_bar(stroke=_TEXT, strokeWidth=0.5)
        .encode(
            y=alt.Y(f"{category}:N", sort=order, title=None),
            x=alt.X(f"sum({value}):Q", title=title, axis=alt.Axis(format="~%", tickCount=5), scale=scale),
            color=alt.Color(f"{group}:N", sort=groups, scale=alt.Scale(domain=groups, range=colours)),
            tooltip=[
                alt.Tooltip(f"{category}:N"),
                alt.Tooltip(f"{group}:N"),
                alt.Tooltip(f"sum({value}):Q", format=".3%", title=title),
            ],
        )
    )
    return _spec(chart.properties(height=26 * len(order) + 10), title)


@_unchecked
def trade_off(runs: pd.DataFrame, metric: str) -> dict:
    """A grid's runs: metric against expected bit operations; lines are 94 % intervals, and ± a standard error."""
    names = list(dict.fromkeys(runs["run"]))
    few = len(names) <= 12  # as many as a legend can hold
    runs = runs.assign(**{side: runs["score"] + sign * runs["error"].astype(float)
                          for side, sign in (("below", -1), ("above", 1))})  # fmt: skip
    base = alt.Chart(_data(runs)).encode(
        color=alt.Color("run:N", sort=names, legend=alt.Legend(columns=1, labelLimit=280) if few else None),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("seed:N"), alt.Tooltip("score:Q", format=".4f", title=metric),
                 alt.Tooltip("bops:Q", format=".2%", title="E[BOPs] / adapted"), alt.Tooltip("interval:N")],
    )  # fmt: skip
    across = _scale([*runs["low"], *runs["high"], *runs["bops"]], log=True)
    axis = alt.Axis(format="~%", tickCount=4)
    upright = _scale([*runs["score"], *runs["below"], *runs["above"]])
    x, low = (alt.X(f"{name}:Q", title="E[BOPs], adapted", scale=across, axis=axis) for name in ("bops", "low"))
    y, below = (
        alt.Y(f"{name}:Q", title=metric, scale=upright, axis=alt.Axis(tickCount=6)) for name in ("score", "below")
    )
    rules = base.mark_rule(opacity=0.5).encode(x=low, x2=alt.X2("high:Q"), y=y)
    errors = base.mark_rule(opacity=0.5).encode(x=x, y=below, y2=alt.Y2("above:Q"))
    points = base.mark_point(filled=True, size=70, opacity=1).encode(x=x, y=y)
    return _spec((rules + errors + points).properties(height=320), f"{metric} against expected bit operations")
