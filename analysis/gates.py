# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What the gates learned
#
# The bit widths and ranks of one run, from its `posterior.nc`. Each adapted projection has five quantized tensors:
# its `input`, its pretrained weight `base`, the adapter's `lora_A` and `lora_B`, and `hidden`, the vector between
# them. The width of each is random, 2 to 32 bit, and so is the rank of each adapter. Both are ladders of gates: the
# 8-bit gate can only be open where the 4-bit gate is.
#
# **BOPs** (bit operations) are multiplications times the bits of the weight times the bits of the activation, here as
# a share of what the adapted projections need at 32 x 32 bit. **Nats** are natural-logarithm units of information.
#
# The stored run is SST-2 on MiniLM (2,000 examples, two epochs, prior `bops`, 50 draws; three restarts, which are
# ArviZ's chains), made by `python experiments/grid.py experiments/grids/reading.yaml --glue_dir path/to/glue`. To read
# another run, set `PYRO_BLORA_RUN` to its folder, absolute or relative to this file. `python gates.py` runs as it is;
# `make notebooks` executes it into `gates.ipynb`.

# %%
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, NullLocator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ announces its next version, tqdm misses a widget
    import arviz as az

    from pyro_blora.posterior import Posterior
    from pyro_blora.posterior.arviz_compat import group, read

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
plt.style.use(["default", HERE / "pictures.mplstyle"])
RUN = HERE / os.environ.get("PYRO_BLORA_RUN", "example/bops")
data = read(RUN)
posterior, constant = Posterior(data), group(data, "constant_data")
layers, names, tensors = constant["layer"].values, posterior.projections, posterior.layout.tensors
spent = float(posterior.expected_bops().adapted_ratio)
print(f"E[BOPs] {spent:.4%} of the adapted projections at 32 x 32 bit, first of {posterior.chains} chains")

# %% [markdown]
# Everything below is of the first chain, and exact unless draws are mentioned: the file holds the probabilities
# themselves.
#
# ## Bit widths of every tensor
#
# The probability of each bit width: one panel for each tensor role, one bar for each projection (layer and type). A bar
# of one colour is a width that is decided.

# %%
widths = np.exp(constant["log_q_width"]).mean("component").isel(chain=0)  # projection, tensor, width
figure, panels = plt.subplots(1, len(tensors), figsize=(10, 0.22 * len(names) + 1.3), sharey=True)
for panel, tensor in zip(panels, tensors, strict=True):
    table = widths.sel(tensor=tensor).to_pandas()
    table.plot.barh(stacked=True, ax=panel, colormap="viridis", legend=False, width=0.9)
    expected = float((table.mean() * table.columns).sum())
    panel.set(title=f"{tensor}: E[bits] {expected:.1f}", xlabel="probability", ylabel="", xlim=(0, 1))
    panel.set_xticks([0, 0.5, 1], ["0", "½", "1"])
panels[0].invert_yaxis()
figure.legend(*panels[0].get_legend_handles_labels(), title="bit width", loc="outside right upper")
plt.show()
widths.mean("projection").to_pandas().round(2)

# %% [markdown]
# On the stored run inputs and base weights are divided between 4 and 8 bit (0.28 and 0.54 of the probability of
# inputs, 0.43 and 0.37 of base weights), and few tensors are decided. `lora_A`, `lora_B` and `hidden` have 32 bit with
# probability 0.89 to 0.90. That comes from the prior: under `bops` they cost next to nothing.
#
# ## Bit widths by layer
#
# Expected bits, averaged over the projections of a layer. The whisker is the standard deviation of one tensor's width:
# how undecided a tensor is, not how well the mean is known. The adapter's tensors are left out (see above).

# %%
mean, variance = (x[0].numpy() for x in posterior.moments().z)  # of the first chain, projection by tensor
depths = np.unique(layers)
bits = np.array([mean[layers == i].mean(0) for i in depths])  # layer by tensor
spread = np.array([np.sqrt(variance[layers == i].mean(0)) for i in depths])
for t, (tensor, marker) in enumerate(zip(tensors[:2], "os", strict=True)):
    place = depths + 0.12 * t - 0.06
    plt.errorbar(place, bits[:, t], spread[:, t], fmt=marker, capsize=3, label=tensor)
    print(f"{tensor}: E[bits] by layer", ", ".join(f"{x:.1f}" for x in bits[:, t]))
apart, own = np.ptp(bits[:, :2], axis=0).max(), spread[:, :2].mean()
finding = f"Layers differ by up to {apart:.1f} bits, the width of one tensor by ± {own:.1f}"
plt.gca().set(xlabel="layer", ylabel="expected bit width ± standard deviation, bits", title=finding)
plt.xticks(depths)
plt.legend()
plt.show()

# %% [markdown]
# On the stored run inputs have 7.3 to 9.6 bit, most in layers 1 and 4, and base weights 5.7 to 7.1, least in the last
# two layers. The differences between layers are smaller than the spread of a single tensor, about 4 bit.
#
# ## Rank of query, key and value
#
# The question of the paper's Figure 2: the expected number of open ranks by layer, with central 94 % intervals. There,
# `value` keeps more rank than `query` and `key`.

# %%
probability = np.exp(constant["log_q_rank"]).mean("component").isel(chain=0).dropna("projection")
below = probability.cumsum("open_rank")
ranks = pd.DataFrame({
    "layer": constant["layer"].sel(projection=probability["projection"]),
    "type": constant["type"].sel(projection=probability["projection"]),
    "mean": (probability * probability["open_rank"]).sum("open_rank"),
    "low": (below < 0.03).sum("open_rank") + 1, "high": (below < 0.97).sum("open_rank") + 1,
}, index=probability["projection"].values)  # fmt: skip
by_type, largest = ranks.groupby("type", sort=False), probability.sizes["open_rank"]
figure, panel = plt.subplots(figsize=(7, 4))
for i, (kind, mine) in enumerate(by_type):
    place = mine["layer"] + 0.16 * (i - (by_type.ngroups - 1) / 2)
    panel.vlines(place, mine["low"], mine["high"], color=f"C{i}")
    panel.plot(place, mine["mean"], "os^Dv"[i % 5], color=f"C{i}", label=kind)
found = ", ".join(f"{kind} {rank:.1f}" for kind, rank in by_type["mean"].mean().items())
panel.set(xlabel="layer", ylabel=f"open ranks, of {largest}", title=f"E[rank] over all layers: {found} of {largest}")
panel.set_xticks(np.unique(ranks["layer"]))
figure.legend(title="mean, 94 % interval", loc="outside right upper")
plt.show()
by_type["mean"].mean().round(2)

# %% [markdown]
# The stored run does not show it: query 7.83, key 7.88 and value 7.88 of 8 on average, and all intervals reach up to 8.
# Under `bops` a rank costs little, so nearly all stay open: `benchmarks/ranks.md` has priors that make ranks dear.
#
# ## Gates that the data did not inform
#
# KL from prior to posterior of each ladder of gates, in nats; `rank` is the adapter's rank ladder. Below 0.05 (grey)
# the posterior is still the prior, and another prior would give another answer.

# %%
kl, free = posterior.kl(), posterior.free()
columns = [*tensors, "rank"]
moved = pd.DataFrame(np.column_stack([kl.z, kl.g]), names, columns)
moved = moved.where(np.column_stack([free.z, free.g]))  # nan where there is no gate or the prior leaves no choice
silent = moved < 0.05
finding = f"{silent.sum().sum()} of {moved.count().sum()} ladders are within 0.05 nats of their prior"
figure, panel = plt.subplots(figsize=(6.5, 0.24 * len(names) + 1.2))
panel.set_facecolor("0.9")
image = panel.imshow(moved.mask(silent), cmap="YlGnBu", norm="log", vmin=0.05, vmax=1, aspect="auto")
for (row, column), value in np.ndenumerate(moved.values):
    if np.isfinite(value):
        panel.text(column, row, f"{value:.2f}", ha="center", va="center", size=8, color="w" if value > 0.35 else "k")
panel.set_xticks(range(len(columns)), columns)
panel.set_yticks(range(len(names)), names)
panel.set_title(finding)
figure.colorbar(image, label="KL, nats", extend="max", ticks=[0.05, 0.1, 0.2, 0.5, 1], format="%g")
plt.show()
print(finding)
for column in columns:
    print(f"{column}:", "all" if silent[column].all() else ", ".join(silent.index[silent[column]]) or "none")

# %% [markdown]
# On the stored run 59 of 108 ladders stayed at their prior: all 54 of the adapters' tensors, 3 base weights, 2 ranks.
# What was learned is the width of inputs, up to 1.78 nats, and of base weights, up to 0.49; of ranks at most 0.20.
#
# ## Prior against posterior
#
# Left, the bit operations of draws from the prior that was used and from the posterior. Right, the expected bits of
# each tensor, projections in order from left to right, and a dash where its prior alone puts it.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 4))
draws = {name: 100 * group(data, name)["bops_adapted"].isel(chain=0).values for name in ("prior", "posterior")}
for name, values in draws.items():
    panels[0].hist(values, bins=np.histogram_bin_edges([*draws.values()], 30), alpha=0.7, label=name)
    print(f"{name}: mean BOPs of draws {values.mean():.2f} %")
rise = ", ".join(f"{name} {values.mean():.1f} %" for name, values in draws.items())
panels[0].set(xlabel="BOPs, % of the adapted projections at 32 x 32 bit", ylabel="draws", title=f"Mean BOPs: {rise}")
panels[0].legend()
before = posterior.log_prior.z[0].exp().numpy() @ np.array(posterior.layout.ladder)  # projection by tensor
for t in range(len(tensors)):
    place = t + np.linspace(-0.35, 0.35, len(names))[free.z[:, t]]
    panels[1].plot(place, before[free.z[:, t], t], "_", color="black", label="prior" if t == 0 else None)
    panels[1].plot(place, mean[free.z[:, t], t], "o", mfc="none", color="C0", label="posterior" if t == 0 else None)
panels[1].set(yscale="log", ylabel="expected bit width, bits", title="A tensor on its dash was not moved by the data")
panels[1].yaxis.set(major_locator=FixedLocator(posterior.layout.ladder), minor_locator=NullLocator())
panels[1].yaxis.set_major_formatter("{x:.0f}")
panels[1].set_xticks(range(len(tensors)), tensors)
panels[1].legend()
plt.show()

# %% [markdown]
# On the stored run the data justify more bits than the prior alone would give: draws of the prior take 4.16 % of the
# bit operations, of the posterior 7.04 %. Inputs rise from 5.1 to 8.3 bit, base weights from 5.1 to 6.5 (E[bits] of
# `summary.json`). The adapters' tensors stay where their prior puts them.
#
# ## The same in ArviZ's summary
#
# `az.summary` of the draws of all chains, named `[projection]`; `r_hat` compares restarts, where there are some.

# %%
az.summary(data, var_names=["bops_adapted", "ranks"], kind="all" if posterior.chains > 1 else "stats")

# %% [markdown]
# On the stored run the mean BOPs of all draws are 7.0 %, and `r_hat` is 1.01. All ranks are near 1.0 but value of layer
# 2, which has 1.29.
