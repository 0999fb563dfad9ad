"""The first line of a run's page: its scores and bit operations."""

from ..evaluation.verdicts import beside, ece_by_chance, nothing_learned, of_score
from ..interval import PERCENT


def headline(summary: dict) -> list[tuple[str, str, str]]:
    """(what, value, remark) of the page's first line."""
    bops, metric = summary["bops"], summary["metric"]
    low, high = bops["interval"]
    name, ece, at_mode = metric["name"], summary["ece"]["value"], summary["deployed"]
    chance = ece_by_chance(summary)
    none = summary.get("no_confidence", "no confidence")  # older summaries have no reason
    remark = f"{summary['ece']['bins']} bins" + (f"; by chance up to {chance['high']:.4f}" if chance else "")
    verdict = "; nothing was learned" if nothing_learned(summary) else ""
    return [
        (name, f"{metric['value']:.4f}",
         f"{_error(summary, name)}{_constant(summary, name)}deployed {of_score(at_mode, name)}{verdict}"),
        ("NLL", f"{summary['nll']:.4f}",
         f"{_error(summary, 'nll')}{_constant(summary, 'nll')}deployed {of_score(at_mode, 'nll')}; nats per example"),
        ("ECE", "-" if ece is None else f"{ece:.4f}", none if ece is None else remark),
        (
            "E[BOPs]",
            f"{bops['adapted_ratio']:.2%}",
            f"{PERCENT} interval {low:.2%} to {high:.2%}, of the adapted projections",
        ),
        *_cost(summary),
        ("E[BOPs], model", f"{bops['model_ratio']:.2%}", "of every matrix product of a forward"),
        ("adapter", f"{summary['adapter_parameters']:,}", "parameters deployed"),
    ]  # fmt: skip


def _cost(summary: dict) -> list[tuple[str, str, str]]:
    """Of the cost by which the prior was asked, where it is not bit operations."""
    spent = summary.get("cost")
    if spent is None:
        return []
    remark = (
        f"{spent['value']:.3g} {spent['unit']} of the {spent['denominator']} projections, at full width 100 %; target "
        f"{spent['target']:.2%}, deployed {spent['deployed']['ratio']:.2%}"
    )
    return [(f"E[{spent['cost']}]", f"{spent['ratio']:.2%}", remark)]


def _error(summary: dict, name: str) -> str:
    error = beside(summary, name)
    return "" if error is None else f"± {error:.4f}; "


def _constant(summary: dict, name: str) -> str:
    constant = beside(summary, name, "constant")
    return "" if constant is None else f"constant answer {constant:.4f}; "
