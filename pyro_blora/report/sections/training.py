"""The section of the training's curves."""

import numpy as np

from ...registries import register_section
from .. import charts
from ..run_folder import RunFiles, Section
from ..warnings import of_training

_STEPS = 300  # points of a curve, at most
_CURVES = (  # logged numbers, title of their axis, caption, whether the axis is logarithmic
    (("loss", "nll"), "nats per example", "Loss and NLL of single batches.", False),
    (("kl_z", "kl_g"), "KL, nats", "KL of the gates from their prior: bits (z) and ranks (g).", True),
    (("expected_bits", "expected_rank"), "bits, ranks", "Expected bits and ranks, means over all tensors.", False),
    (("bops_adapted", "bops_model"), "E[BOPs], ratio", "Expected bit operations, of those at 32 x 32 bit.", False),
    (("grad_norm", "gate_gradient"), "norm", "Norms of the gradients of adapter and gates.", True),
    (("gate_noise", "temperature"), "share, temperature",
     "Share of the gates' gradient that is noise, and the temperature of the relaxation.", False),
    (("gates_moved", "gates_error"), "nats", "Log Bayes factors of the gates: how far they are from their start, and "
     "the standard error of the averages that they follow (root mean squares).", False),
)  # fmt: skip


@register_section("Training", place=60)
def training(run: RunFiles, title: str) -> Section:
    """The curves of the training."""
    log = run.log
    if log.empty:
        raise ValueError("metrics.jsonl has no lines: no curves.")
    warned = of_training(log)
    log = log.replace([np.inf, -np.inf], np.nan)  # which a chart cannot show
    log = log.iloc[np.unique(np.linspace(0, len(log) - 1, min(len(log), _STEPS)).round().astype(int))]
    made = []
    absent = []
    for wanted, axis, caption, log_scale in _CURVES:
        names = [name for name in wanted if name in log]
        shown = log.assign(**{n: log[n].where(log[n] > 0) for n in names}) if log_scale else log
        if names and shown[names].notna().any(axis=None):
            made.append((charts.curves(shown, names, axis, caption, log_scale), caption))
        elif names:
            absent += names
    text = ["Before the gates start they are open and the KL does not count."]
    if absent:
        text.append(f"Without a curve, as they are 0 throughout: {', '.join(absent)}.")
    return Section(title, text, warned, made)
