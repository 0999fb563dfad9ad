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
# The stored run is SST-2 on MiniLM (2,000 examples, two epochs, prior `bops`, 50 draws, three restarts, which are the
# chains), made by `python experiments/grid.py experiments/grids/reading.yaml --glue_dir path/to/glue`. For another
# one, set `PYRO_BLORA_RUN` to its folder, absolute or as seen from this file.

# %%
import json
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ announces its next version, tqdm misses a widget
    import arviz as az

    from pyro_blora.posterior import Posterior
    from pyro_blora.posterior.arviz_compat import group, pareto_weights, read

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
RUN = HERE / os.environ.get("PYRO_BLORA_RUN", "example/bops")
data, summary = read(RUN), json.loads((RUN / "summary.json").read_text())
posterior, N = Posterior(data), summary["n_train"]
kl_weight = json.loads((RUN / "config.json").read_text())["kl_weight"]  # 1, or less for a cold posterior
log = pd.read_json(RUN / "metrics.jsonl", lines=True).set_index("step")
print(f"{summary['task']}, prior {summary['prior']}: {posterior.chains} chains, {log.index[-1]} steps")

# %% [markdown]
# ## The ELBO and its parts
#
# The loss is -ELBO / N: the NLL of a batch and the gates' KL over the number of training examples N. Until the gates
# start they are open and the KL does not count. Look for a KL that is flat at the end; the loss itself is of single
# batches, so that only its mean of five says something.

# %%
figure, panels = plt.subplots(1, 3, figsize=(14, 3.5))
log[["loss"]].assign(**{"mean of five": log["loss"].rolling(5).mean()}).plot(ax=panels[0], ylabel="nats an example")
log[["kl_z", "kl_g"]].plot(ax=panels[1], ylabel="nats", logy=True)
log[["expected_bits", "expected_rank"]].plot(ax=panels[2])
plt.show()
kl = log[["kl_z", "kl_g"]].sum(axis=1)
counted = ~np.isclose(log["loss"], log["nll"])
print(f"KL {kl.iloc[0]:.1f} nats at first and {kl.iloc[-1]:.1f} at the end, {kl.iloc[-1] / N:.4f} an example")
if counted.any():
    rest = (log["loss"] - log["nll"] - kl_weight * kl / N)[counted].abs().max()
    print(f"from step {log.index[counted][0]} on it is in the loss: loss - NLL - KL / N is at most {rest:.0e}")
print(f"ELBO of all training examples: {summary['elbo_per_example']:.4f} nats an example")

# %% [markdown]
# On the stored run the KL falls from 217.6 to 13.5 nats, nearly all at once: at 30 % of the steps the guide starts from
# what the data say about each gate. Bits are settled from then on; ranks take until step 160. An example's share of
# the KL is 0.0067 nats, so the loss is nearly all NLL. The ELBO of all training examples is -0.2729.
#
# ## Noise of the gradient, and temperature
#
# `gate_noise` is the share of the mean square of the gates' gradient that is variance, from Adam's running means: near
# 1 there is little left to follow. `gate_gradient` is its root mean square. Gates are relaxed in training, at a
# temperature that should be at its end well before the training is.

# %%
columns = [name for name in ("temperature", "gate_noise", "gate_gradient") if name in log]
log[columns].plot(subplots=True, layout=(1, 3), figsize=(14, 3.2))
plt.show()
log[columns].tail(1).round(4)

# %% [markdown]
# On the stored run `gate_noise` is 0.64 to 0.97 and 0.95 at the end: a constant learning rate would now let gates
# wander, which is why theirs decays to 1 %. The temperature is 0.1 from step 190 on. `gate_gradient` rises from 0.0005
# to 0.0027 while the temperature falls, and is level from step 220 on.
#
# ## Do restarts agree?
#
# R-hat between fits from different seeds: exact, from the moments of each chain's law, and ArviZ's own of the draws.
# 1 is agreement; above 1.05 restarts say different things. Left, the draws' BOPs by chain.

# %%
bops = [float(posterior.expected_bops(chain).adapted_ratio) for chain in range(posterior.chains)]
print("E[BOPs] of the chains:", ", ".join(f"{x:.4%}" for x in bops))
if posterior.chains > 1:
    tensors = np.array([[f"{p}.{t}" for t in posterior.layout.tensors] for p in posterior.projections])
    exact, free, drawn = posterior.rhat(), posterior.free(), az.rhat(data, var_names=["bits", "ranks"])
    bits = pd.Series(exact.z[free.z].numpy(), tensors[free.z.numpy()])
    ranks = pd.Series(exact.g[free.g].numpy(), np.array(posterior.projections)[free.g.numpy()]).add_suffix(".rank")
    figure, panels = plt.subplots(1, 2, figsize=(11, 3))
    for chain, values in enumerate(100 * group(data, "posterior")["bops_adapted"].values):
        panels[0].hist(values, bins=15, alpha=0.6, label=f"chain {chain}")
    for name, values in {"bits": bits, "ranks": ranks}.items():
        panels[1].hist(values[np.isfinite(values)], bins=30, alpha=0.6, label=name)
        print(f"R-hat of {name}: exact median {values.median():.2f}, worst {values.max():.2f}; "
              f"of draws worst {float(drawn[name].max()):.2f}; {(values > 1.05).sum()} above 1.05")  # fmt: skip
    panels[0].set(xlabel="BOPs, % of the adapted projections at 32 x 32 bit", ylabel="draws")
    panels[1].set(xlabel="exact R-hat between restarts", ylabel="chains of gates")
    for panel in panels:
        panel.legend()
    plt.show()
    print(pd.concat([bits, ranks]).nlargest(5).round(2).to_string())
else:
    print("One chain: --restarts 3 would tell.")

# %% [markdown]
# On the stored run bits agree mostly (median 1.00, worst 1.15) and ranks less (median 1.03); 7 of each are above 1.05.
# The worst is the rank of value in layer 1, 1.63 exact and 1.69 of draws: 3.2 in the first fit, above 7 in the others.
# The total is more alike than its parts: E[BOPs] 6.10, 6.94 and 6.58 %. So trust totals, and not what one gate does.
#
# ## Effective draws
#
# Draws of a guide are independent, so there are about as many effective ones as draws; chains that disagree pull the
# number down. Read the median: the estimate for a rank that is 8 in nearly all draws is noisy, and the least of many
# can be small in a single chain too.

# %%
effective = az.ess(data, var_names=["bits", "ranks"])
for name in ("bits", "ranks"):
    values = effective[name].values[np.isfinite(effective[name].values)]
    if len(values):
        print(f"ESS of {name}: median {np.median(values):.0f}, least {values.min():.0f}")

# %% [markdown]
# On the stored run, of 150 draws, the median is 150 for bits and 117 for ranks. The least, 6, is the rank of value in
# layer 1, about which the fits do disagree.
#
# ## Pareto k of the continuous block
#
# Where the prior's rates are random (`--prior hierarchical`), the ratio of their best law to their guide has a tail
# whose Pareto k says how good the guide is: below 0.7 it can be trusted. Everything else that is continuous is a point
# estimate.

# %%
stats = group(data, "sample_stats")
if "log_ratio" in stats:
    for chain, log_ratios in enumerate(stats["log_ratio"].values):
        print(f"chain {chain}: Pareto k of the rates {pareto_weights(log_ratios)[1]:.2f}")
else:
    print("The weights are point estimates, and no rate is random: nothing continuous is random in this run.")

# %% [markdown]
# On the stored run there is nothing to check here. It also means that no spread below includes doubt about weights:
# only restarts show it.
#
# ## Would it predict data like these?
#
# Predictive checks on the held-out rows, a point a draw. Left, the share of the last label in simulated data; the
# line is the observed share. Right, the accuracy that a draw has with the labels that it simulated, against the one
# that it has with the observed labels: above the diagonal it promises more than it keeps.

# %%
predictive, observed = group(data, "predictions"), group(data, "predictions_constant_data")["label"]
figure, panels = plt.subplots(1, 2, figsize=(11, 4))
if "probability" in predictive:
    simulated, probability, last = predictive["label"], predictive["probability"], int(observed.max())
    guess, mean = probability.argmax("class"), probability.mean("draw")
    has, simulates = (guess == observed).mean("example"), (guess == simulated).mean("example")
    shares = (simulated == last).mean("example")
    print(f"share of label {last}: observed {float((observed == last).mean()):.3f}")
    for chain in range(posterior.chains):
        panels[0].hist(shares[chain], bins=15, alpha=0.6, label=f"chain {chain}")
        panels[1].plot(has[chain], simulates[chain], "o", mfc="none", label=f"chain {chain}")
    panels[0].axvline(float((observed == last).mean()), color="black", linestyle="--")
    panels[0].set(xlabel=f"simulated share of label {last}", ylabel="draws")
    panels[1].axline((float(has.mean()),) * 2, slope=1, color="black", linewidth=0.8)
    panels[1].set(xlabel="accuracy of a draw", ylabel="accuracy with simulated labels")
    panels[1].legend(bbox_to_anchor=(1, 1))
    print(pd.DataFrame({
        "simulated share": shares.mean("draw"), "highest of a draw": shares.max("draw"),
        "a draw promises": probability.max("class").mean(("draw", "example")), "a draw has": has.mean("draw"),
        "with simulated labels": simulates.mean("draw"), "averaged promises": mean.max("class").mean("example"),
        "averaged has": (mean.argmax("class") == observed).mean("example"),
    }).rename_axis("chain").T.round(3))  # fmt: skip
else:
    panels[0].scatter(observed, predictive["mean"].mean(("chain", "draw")), s=6)
    panels[0].set(xlabel="observed", ylabel="predicted")
plt.show()

# %% [markdown]
# On the stored run 0.509 of the examples are positive. The first two fits simulate shares around that, 0.504 and 0.521;
# the third has 0.466, and not one of its draws reaches 0.509: it leans to the negative, which the mean of all chains,
# 0.497, would hide.
#
# Draws are overconfident: they promise 0.854, 0.880 and 0.865 and have 0.831, 0.811 and 0.816. Averaging over draws
# mends this for the first fit (0.847 promised, 0.845 kept) and hardly for the others (0.875 and 0.815; 0.861 and
# 0.818): draws of gates alone do not calibrate a fit.
