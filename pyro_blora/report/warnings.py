"""Summary text and reliability warnings of a report.

The thresholds of the warnings are the constants below.
"""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from ..evaluation.baselines import ERRORS, NOISE, gain
from ..evaluation.verdicts import beside, nothing_learned, of_chance, of_score
from ..posterior.calibration import TEMPERATURES
from ..posterior.gate_posterior import Posterior
from ..weights.laplace import PRECISIONS

SURE = 0.95  # probability of one width or rank, above which a ladder counts as decided
COLLAPSED = 0.9  # share of the free ladders that are decided for their lowest rung
INFORMED = 0.05  # nats of KL to the prior, below which the data did not move a ladder
UNINFORMED = 0.5  # share of the free ladders below that
RHAT = 1.05  # of restarts, above which they disagree; ArviZ's usual limit for chains is 1.01 to 1.1
DISAGREE = 0.1  # share of the ladders above that
FEW_DRAWS = 8  # below that, averages over draws are rough; every preset has as many, the default is 15
CLIPPED = 0.05  # share of a tensor's values beyond its range, where it is deployed at 8 bit or more
EDGE = 0.05  # of the logarithm: a fitted number that close to the end of what was tried was not found, but cut off
GAP = 0.02  # of the metric, between averaged and deployed predictions; of an error in shares of the constant answer's
_EXACT_FROM = 8  # bits: coarser grids clip on purpose, as a range that covers everything would round the rest away


def in_words(summary: dict) -> list[str]:
    """Paragraphs: how well it predicts, beside a temperature where one was fitted, what that costs, what gates kept."""
    metric, deployed, bops = summary["metric"]["name"], summary["deployed"], summary["bops"]
    text = [
        f"On {summary['n_eval']:,} held-out examples of {summary['task']}: {_beside_constant(summary, metric)}; "
        f"NLL {of_score(summary, 'nll', 3)} nats per example{_frequencies(summary)}. "
        f"Prediction: {summary['averaging'].rstrip(',')}. What is deployed, one allocation, has {metric} "
        f"{of_score(deployed, metric, 3)} and NLL {of_score(deployed, 'nll', 3)}."
    ]
    nothing = nothing_learned(summary)
    if _has_ece(summary) and not nothing:
        chance = of_chance(summary)
        text.append(
            f"Its confidence is off by {summary['ece']['value']:.3f} on average (ECE)."
            + (f" For comparison, {chance}." if chance else "")
        )
    if (found := _against_a_temperature(summary)) and not nothing:
        temperature, scaled, gain = found
        verdict = f"averaging is better by {gain:.3f}" if gain > 0 else "averaging does not beat that one number"
        if summary["nll"] == deployed["nll"]:
            verdict = "nothing was averaged"
        elif scaled > deployed["nll"]:
            verdict = f"that temperature is of no use here, and averaging gains {deployed['nll'] - summary['nll']:+.3f}"
        text.append(
            f"At {temperature:.2f}, the temperature of least NLL on rows held out of training, what is deployed has an "
            f"NLL of {scaled:.3f}: {verdict}."
        )
    low, high = bops["interval"]
    text.append(
        f"The adapted projections take {bops['adapted_ratio']:.1%} [{low:.1%}, {high:.1%}] of their bit operations at "
        f"32 x 32 bit with all ranks, the whole model {bops['model_ratio']:.1%} of its own. What is deployed takes "
        f"{bops['deployed']['adapted_ratio']:.1%} and {bops['deployed']['model_ratio']:.1%}."
    )
    bits = ", ".join(f"{name} {value:.1f}" for name, value in summary["expected_bits"].items())
    ranks = ", ".join(f"{name} {value:.1f}" for name, value in summary["expected_rank"].items())
    weights = summary.get("weights", {})  # older runs have none
    if weights.get("random"):
        text.append(
            f"{weights['random']:,} weights of the adapter are random, by distribution {weights_name(summary)}, with "
            f"a standard deviation of {weights['std']:.2g}. {weights['stored']:,} numbers are kept to draw them."
        )
    text.append(
        f"Expected bits: {bits}."
        + (f" Expected ranks: {ranks}." if ranks else "")
        + "".join(f" {summary[what]}" for what in ("rested", "sharing") if summary.get(what))
    )
    return text


def _beside_constant(summary: dict, name: str) -> str:
    constant = beside(summary, name, "constant")
    beside_it = "" if constant is None else f" (one answer for every example: {constant:.3f})"
    return f"{name} {of_score(summary, name, 3)}{beside_it}"


def _frequencies(summary: dict) -> str:
    constant = beside(summary, "nll", "constant")
    what = summary.get("constant_answer", "label frequencies")
    return "" if constant is None else f" ({what}: {constant:.3f})"


def weights_name(summary: dict) -> str:
    """Its name; of an ensemble's members, too, where they have one."""
    weights = summary.get("weights", {})  # older runs have none
    of = weights.get("of", "point")
    return weights.get("law", "point") + ("" if of == "point" else f" of {of}")


def _against_a_temperature(summary: dict) -> tuple[float, float, float] | None:
    """(temperature and NLL of the deployed predictions at it, what averaging gains beside that), nats per example."""
    deployed = summary.get("calibration", {}).get("deployed", {})
    if "scaled" not in deployed:
        return None
    scaled = deployed["scaled"]["nll"]
    return deployed["temperature"], scaled, scaled - summary["nll"]


def _has_ece(summary: dict) -> bool:
    return summary["ece"]["value"] is not None


def warnings(summary: dict, posterior: Posterior | None) -> list[str]:
    """Reliability warnings of a run, one sentence or two each; empty where there are none."""
    nothing = nothing_learned(summary)
    found = [nothing] if nothing else []
    found += [summary["missed"]] if "missed" in summary else []
    found += _of_predictions(summary, is_empty=bool(nothing))
    if posterior is not None:
        free = posterior.free()
        if not any(bool(x.any()) for x in free):
            return [*found, "No gate is random in this run: there is a prediction, but no posterior of gates to read."]
        found += [*_collapsed(posterior, free), *_uninformed(posterior, free), *_restarts(posterior, free)]
        found += _clipped(posterior)
    return found


def is_over_draws(summary: dict) -> bool:
    """Whether predictions are averaged over draws: of gates, weights or dropout masks that are random."""
    return f"over {summary['draws']} draws of" in summary["averaging"]


def _of_predictions(summary: dict, is_empty: bool) -> Iterator[str]:
    if is_over_draws(summary) and summary["draws"] < FEW_DRAWS:
        yield (
            f"Few draws: {summary['draws']}. Averaged predictions, tails and R-hat of draws are rough. The "
            f"distributions of single gates on this page are exact all the same. More: --draws {FEW_DRAWS} (one "
            "forward of the examples each)."
        )
    weights = weights_name(summary)
    if weights != "point" and _has_ece(summary) and not _against_a_temperature(summary):
        yield (
            f"Random weights, by distribution {weights}, were not compared with temperature scaling, which any claim "
            "of calibration has to beat: --validation 0.1 holds out the rows that a temperature is fitted to."
            + (" They would choose Laplace's prior precision, too." if "prior_precision" in summary["weights"] else "")
        )
    temperature = summary.get("calibration", {}).get("deployed", {}).get("temperature", 1.0)
    precision = summary.get("weights", {}).get("prior_precision", 1.0)
    for name, value, bounds in (
        ("temperature", temperature, TEMPERATURES), ("Laplace's prior precision", precision, PRECISIONS)
    ):  # fmt: skip
        if not bounds[0] + EDGE < math.log(value) < bounds[1] - EDGE:
            yield (
                f"The {name}, {value:.3g}, is at the edge of the values tried: the rows held out do not determine it. "
                "More of them, or a longer training, might."
            )
    metric, deployed = summary["metric"], summary["deployed"]
    gap = gain(metric["name"], metric["value"], deployed["metric"]["value"])
    unit = (beside(summary, metric["name"], "constant") or 1.0) if metric["name"] in ERRORS else 1.0
    if abs(gap) > max(GAP * unit, NOISE * (deployed.get("difference_error") or 0.0)) and not is_empty:
        yield (
            f"What is deployed is {'worse' if gap > 0 else 'better'} by {abs(gap):.3f} in {metric['name']} "
            "than the average over draws: quote the one that you will use."
        )
    low, high = summary["bops"]["interval"]
    at = summary["bops"]["deployed"]["adapted_ratio"]
    if not low <= at <= high and high > low:
        yield (
            f"The deployed allocation takes {at:.1%} of the bit operations, outside the posterior's interval "
            f"[{low:.1%}, {high:.1%}]. Many gates are undecided, and rounding each to its more probable side "
            "moves all in one direction: --kl_weight 0.1 makes gates more decided."
        )


def _collapsed(posterior: Posterior, free) -> Iterator[str]:
    at = posterior.depth_probs()
    for what, probs, ladders, floor in (
        ("bit width", at.z, free.z, f"{posterior.layout.ladder[0]} bit"), ("rank", at.g, free.g, "rank 1")
    ):  # fmt: skip
        if bool(ladders.any()):
            share = float((probs[..., 0] > SURE)[ladders].double().mean())
            if share >= COLLAPSED:
                yield (
                    f"Collapsed: {share:.0%} of the ladders are at their lowest rung, {floor}, with a probability over "
                    f"{SURE:g}. The prior has closed everything, and no {what} was chosen: lower --prior.rate."
                )


def _uninformed(posterior: Posterior, free) -> Iterator[str]:
    kl = posterior.kl()
    ladders = torch.cat([x[mask] for x, mask in zip(kl, free, strict=True)])
    silent = int((ladders < INFORMED).sum())
    if silent > UNINFORMED * len(ladders):
        yield (
            f"Prior-dominated: the posterior of {silent} of {len(ladders)} ladders of gates is within {INFORMED} nats "
            "of its prior. For them the prior decides, not the data: another prior gives another answer."
        )


def _restarts(posterior: Posterior, free) -> Iterator[str]:
    if posterior.chains == 1:
        yield "One fit: whether another seed would find the same gates is not known. --restarts 3 fits two more."
        return
    values = torch.cat([x[mask] for x, mask in zip(posterior.rhat(), free, strict=True)])
    apart = int((values > RHAT).sum())
    each = (float(posterior.expected_bops(chain).adapted_ratio) for chain in range(posterior.chains))
    ratios = ", ".join(f"{ratio:.1%}" for ratio in each)
    if apart > DISAGREE * len(values):
        yield (
            f"Restarts disagree: {apart} of {len(values)} ladders of gates have an R-hat above {RHAT} between "
            f"{posterior.chains} fits. Their expected BOPs are {ratios}. Believe what they share (the total, means "
            "over layers), not single gates."
        )


def _clipped(posterior: Posterior) -> Iterator[str]:
    if "clipped" not in posterior.constant:
        return
    shares = posterior.constant["clipped"].isel(chain=0)
    bits = posterior.layout.ladder[0] + posterior.constant["z_deployed"].isel(chain=0).values @ _steps(posterior)
    wide = (bits >= _EXACT_FROM) & (bits < posterior.layout.ladder[-1])  # 32 bit is not clipped
    found = [
        (float(shares.values[i, t]), f"{posterior.projections[i]}.{tensor}")
        for i in range(len(bits)) for t, tensor in enumerate(posterior.layout.tensors)
        if wide[i, t] and not math.isnan(shares.values[i, t]) and shares.values[i, t] > CLIPPED
    ]  # fmt: skip
    if found:
        worst, name = max(found)
        yield (
            f"Clipped ranges: {len(found)} tensors at 8 bit or more have over {CLIPPED:.0%} of their values beyond the "
            f"range of their grid, most of all {name} with {worst:.0%}. A longer training or --lr_ranges moves ranges."
        )


def _steps(posterior: Posterior):
    return torch.tensor(posterior.layout.ladder).diff().double().numpy()


def of_training(log: pd.DataFrame) -> list[str]:
    """Warnings of a training, from its logged lines: gradients that were not finite."""
    norms = log["grad_norm"].astype(float) if "grad_norm" in log else pd.Series(dtype=float)
    bad = int((~np.isfinite(norms)).sum())
    left_out = int(log["skipped_steps"].max()) if "skipped_steps" in log else 0
    if not bad and not left_out:
        return []
    return [
        f"Gradients were not finite: {left_out} optimizer steps were left out, and {bad} of {len(log)} logged lines "
        "have a gradient norm that is not a finite number. Lower --lr, or look for rows or numbers that overflow."
    ]
