"""The section that compares fits from several seeds."""

import pandas as pd

from ...evaluation.verdicts import of_score
from ...registries import register_section
from ..run_folder import RunFiles, Section


@register_section("Restarts", place=70)
def restarts(run: RunFiles, title: str) -> Section:
    """Whether fits from several seeds agree."""
    others = run.summary.get("restarts", [])
    if not others:
        raise ValueError("One fit: --restarts 3 adds two more from other seeds, and R-hat shows whether they agree.")
    rows = [
        {"seed": s["seed"], run.metric: of_score(s, run.metric), "NLL": of_score(s, "nll"),
         "ELBO per example": round(s["elbo_per_example"], 4), "E[BOPs], adapted": f"{s['bops']['adapted_ratio']:.2%}"}
        for s in [run.summary | run.summary.get("first_fit", {}), *others]
    ]  # fmt: skip
    rhat = run.posterior.rhat()
    lines = [("bits", rhat.z[run.posterior.free().z]), ("ranks", rhat.g[run.posterior.free().g])]
    summaries = [  # `median` takes the lower of two, as inf - inf is nan
        f"{name}: median {float(x.median()):.2f}, worst {float(x.max()):.2f}" for name, x in lines if len(x)
    ]
    text = f"R-hat between {run.posterior.chains} fits, at infinitely many draws. {'; '.join(summaries)}."
    return Section(title, [text], tables=[("", pd.DataFrame(rows), True)])
