"""The section on bit operations: where they are spent, what the gates save, what if one were forced."""

import pandas as pd
import torch

from ...bops import at_full_width, bops_by_product
from ...posterior.gate_posterior import Posterior, marginals_of
from ...registries import register_section
from .. import charts
from ..run_folder import RunFiles, Section

_ROWS = 10  # of tables that name the most


@register_section("Bit operations", place=50)
def bit_operations(run: RunFiles, title: str) -> Section:
    """Where bit operations are spent, what the gates save, what forcing one would cost."""
    posterior, summary = run.posterior, run.summary
    gates, spent = posterior.gates(), spent_of(posterior)
    low, high = summary["bops"]["interval"]
    counted = [p.adapted for p in posterior.layout.projections]
    counted = counted if any(counted) else [True] * len(counted)  # after full fine-tuning
    names = [name for name, is_counted in zip(posterior.projections, counted, strict=True) if is_counted]
    saved = gates[gates["projection"].isin(names) | (gates["saving_adapted"] != 0)]  # an input may have other readers
    saved = saved.assign(gates=saved["rung"].astype(str).add(" bit").where(saved["site"] == "z", "ranks"))
    text = [
        f"E[BOPs] is {summary['bops']['adapted_ratio']:.2%} [{low:.2%}, {high:.2%}] of the "
        f"{float(at_full_width(posterior.layout).adapted):.3g} bit operations of the adapted projections. The saving, "
        f"{saved['saving_adapted'].sum():.2%}, is divided among the gates by Shapley values: what each one adds, "
        "averaged over the orders in which they could have closed.",
        "What if a gate were forced to its other state? The tables predict it with all other gates as they are; "
        "`pyro-blora what-if` answers for any gate.",
    ]
    most = gates.sort_values("saving_model", ascending=False).head(_ROWS)
    cheap = gates[gates["deployed"] & (gates["bops_change"] < 0)].sort_values("elbo_loss").head(_ROWS)
    dear = gates[~gates["deployed"] & gates["elbo_loss"].notna()].sort_values("nll_rise").head(_ROWS)
    tables = [
        ("The gates that save most", _shown(most), True),
        ("What if: open gates that could be closed at the least loss of ELBO", _shown(cheap), True),
        ("What if: closed gates that would lower the NLL most if they were open", _shown(dear), False),
        ("Bit operations by part", spent.round(6), False),
    ]
    if not any(bool(mask.any()) for mask in posterior.free()):  # nothing can be forced
        text, tables = text[:1], tables[-1:]
    of = "Shares of the adapted projections at 32 x 32 bit with all ranks."
    made = [
        (
            charts.bars(spent[spent["share"] > 0], "part", "share", "product", "spent"),
            f"Where bit operations are spent. {of}",
        )
    ]
    if saved["saving_adapted"].abs().max() > 0:
        made.append((charts.bars(saved, "tensor", "saving_adapted", "gates", "saved"), f"What the gates save. {of}"))
    else:
        text.append("Nothing is saved: every gate is open.")
    return Section(title, text, charts=made, tables=tables)


def _shown(gates: pd.DataFrame) -> pd.DataFrame:
    """The columns of `Posterior.gates` that a reader wants, formatted."""
    return pd.DataFrame({
        "gate": gates["gate"], "P(open)": gates["probability"].map("{:.3f}".format),
        "saves": gates["saving_model"].map("{:.3%} of the model".format), "forced": gates["forced"],
        "BOPs then": _cells(gates["bops_change"], "{:+.3%}"),
        "ELBO loses (nat)": _cells(gates["elbo_loss"], "{:.2f}"),
        "NLL rises (nat)": _cells(gates["nll_rise"], "{:.2f}"),
    })  # fmt: skip


def _cells(column: pd.Series, form: str) -> list[str]:
    """`-` for nan: the gate cannot be forced."""
    return ["-" if x != x else form.format(x) for x in column.tolist()]


def spent_of(posterior: Posterior, chain: int = 0) -> pd.DataFrame:
    """Expected bit operations by projection type and product, exact: shares of `adapted`, 0 if none is, of `model`."""
    layout, full = posterior.layout, at_full_width(posterior.layout)
    z, g = marginals_of(posterior, chain)  # (M, ...)
    counted = layout.g_mask | ~layout.g_mask.any()  # all of them after full fine-tuning
    lines = []
    for part in dict.fromkeys(p.type for p in layout.projections):
        mine = torch.tensor([p.type == part for p in layout.projections])
        for product, each in bops_by_product(layout, z, g).items():
            total, adapted = (float(each.mean(0)[rows].sum()) for rows in (mine, mine & counted))
            if total > 0:
                shares = {"share": adapted / float(full.adapted), "of model": total / float(full.model)}
                lines.append({"part": part, "product": product, **shares})
    return pd.DataFrame(lines)
