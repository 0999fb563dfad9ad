# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Can it be believed?
#
# How the training went, whether restarts agree, and whether the posterior predicts data like those that were seen.
# The stored run is SST-2 on MiniLM (2,000 examples, two epochs, prior `bops`, 50 draws, three restarts), made by
# `python experiments/grid.py experiments/grids/reading.yaml --glue_dir path/to/glue`; `PYRO_BLORA_RUN` names
# another.

# %%
import json
import os
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from pyro_blora.arviz_data import group, pareto_weights, read
from pyro_blora.diagnostics import Posterior

RUN = Path(os.environ.get("PYRO_BLORA_RUN", "example/bops"))
data, summary = read(RUN), json.loads((RUN / "summary.json").read_text())
posterior = Posterior(data)
log = pd.read_json(RUN / "metrics.jsonl", lines=True).set_index("step")
print(f"{summary['task']}, prior {summary['prior']}: {posterior.chains} chains, {log.index[-1]} steps")

# %% [markdown]
# ## The ELBO and its parts
#
# The loss is -ELBO / N: the NLL of a batch, and the KL of the gates over the number of examples. Until the gates
# start they are open and the KL does not count.
#
# On the stored run the KL falls from over 200 to 11 nats when the guide starts from the data, at 30 % of the steps,
# and is flat from there on. Over 2,000 examples that is 0.007 nats an example: the loss is nearly all NLL, and its
# jumps are those of single batches.

# %%
figure, panels = plt.subplots(1, 3, figsize=(14, 3.5))
log[["loss", "nll"]].plot(ax=panels[0], ylabel="nats an example")
log[["kl_z", "kl_g"]].plot(ax=panels[1], ylabel="nats", logy=True)
log[["expected_bits", "expected_rank"]].plot(ax=panels[2])
plt.show()

# %% [markdown]
# ## Noise of the gradient, and temperature
#
# `gate_noise` is the share of the mean square of the gates' gradient that is variance, from Adam's running means.
# Near 1 there is nothing left to follow: steps at this learning rate are a random walk, which is why it falls to 1
# %.
#
# On the stored run it is 0.95 at the end, and the temperature of the relaxation has long been at its end, 0.1.

# %%
shown = [name for name in ("temperature", "gate_noise") if name in log]
log[shown].plot(figsize=(7, 3.5))
plt.show()
log[shown].tail(1).round(2)

# %% [markdown]
# ## Do restarts agree?
#
# R-hat between fits: exact, from the moments of each chain's law, and ArviZ's own from the draws. One chain has
# none.
#
# On the stored run bits agree (median 1.00, worst 1.15), ranks mostly (median 1.03), but not about value of layer 1
# (1.63 exact, 1.69 from draws): one seed closes its ranks, two do not. The total is more alike than its parts: 6.1,
# 6.9 and 6.6 % of the bit operations.

# %%
exact = {
    name: x[mask].numpy() for name, x, mask in zip(("bits", "ranks"), posterior.rhat(), posterior.free(), strict=True)
}
bops = [float(posterior.expected_bops(chain).adapted_ratio) for chain in range(posterior.chains)]
print("E[BOPs] of the chains:", ", ".join(f"{x:.4%}" for x in bops))
if posterior.chains > 1:
    drawn = az.rhat(data, var_names=["bits", "ranks"])
    for name, values in exact.items():
        if len(values):
            print(f"R-hat of {name}: exact median {np.median(values):.2f}, worst {values.max():.2f}; "
                  f"of draws worst {float(drawn[name].max()):.2f}")  # fmt: skip
else:
    print("One chain: --restarts 3 would tell.")
plt.figure(figsize=(7, 3))
for name, values in exact.items():
    plt.hist(values[np.isfinite(values)], bins=30, alpha=0.6, label=name)
plt.gca().set(xlabel="R-hat between restarts", ylabel="chains of gates")
plt.legend()
plt.show()

# %% [markdown]
# ## Effective draws
#
# Draws of a guide are independent, so that their effective number is their number, unless chains disagree.
#
# On the stored run the median is 150 for bits, of 150 draws, and 6 for the rank of value in layer 1.

# %%
effective = az.ess(data, var_names=["bits", "ranks"])
for name in ("bits", "ranks"):
    values = effective[name].values[np.isfinite(effective[name].values)]
    if len(values):
        print(f"ESS of {name}: median {np.median(values):.0f}, least {values.min():.0f}")

# %% [markdown]
# ## Pareto k of the continuous block
#
# Where the prior's rates are random (`--prior hierarchical`), the tail of the ratio between their best law and
# their guide says how good the guide is: below 0.7 it can be trusted. Everything else that is continuous is a point
# estimate.

# %%
stats = group(data, "sample_stats")
if "log_ratio" in stats:
    _, k = pareto_weights(stats["log_ratio"].isel(chain=0).values)
    print(f"Pareto k of the rates: {k:.2f}")
else:
    print("The weights are point estimates, and no rate is random: this run has no continuous block.")

# %% [markdown]
# ## Would it predict data like these?
#
# Posterior predictive check: the share of each label in simulated data against the observed share; and the accuracy
# that the predicted probabilities promise, against the one that they have.
#
# On the stored run labels come out as observed (0.50 positive, 0.51 observed). Single draws promise 0.87 and have
# 0.81 to 0.83: a draw alone is overconfident. Averaging over draws is what brings ECE down to 0.035.

# %%
predictive, observed = group(data, "posterior_predictive"), group(data, "observed_data")["label"]
if "label" in predictive:
    simulated = predictive["label"]
    for value in np.unique(observed):
        shares = (simulated == value).mean("example").values.ravel()
        plt.hist(shares, bins=25, alpha=0.6, label=f"simulated share of label {value}")
        plt.axvline(float((observed == value).mean()), color="black", linestyle="--")
        print(f"label {value}: observed {float((observed == value).mean()):.3f}, simulated {shares.mean():.3f}")
    plt.legend()
    plt.show()
    probability = predictive["probability"]
    right = (probability.argmax("class") == observed).mean("example").mean("draw").values
    promised = probability.max("class").mean(("draw", "example")).values
    for chain, (has, says) in enumerate(zip(right, promised, strict=True)):
        print(f"chain {chain}: a draw promises accuracy {says:.3f} and has {has:.3f}")
else:
    plt.scatter(observed, predictive["mean"].mean(("chain", "draw")), s=6)
    plt.gca().set(xlabel="observed", ylabel="predicted")
    plt.show()
