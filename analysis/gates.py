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
# Bit widths and ranks of one run, from its `posterior.nc`. Five tensors of each adapted projection are quantized:
# its `input`, its pretrained weight `base`, the adapter's `lora_A` and `lora_B`, and `hidden`, the vector between
# them. Each has a random width of 2 to 32 bit, and each adapter a random rank. Widths are chains of gates: 8 bit can
# only be open where 4 bit is.
#
# The stored run is SST-2 on MiniLM (2,000 examples, two epochs, prior `bops`, 50 draws, three restarts, which are the
# chains), made by `python experiments/grid.py experiments/grids/reading.yaml --glue_dir path/to/glue`. For another
# one, set `PYRO_BLORA_RUN` to its folder, absolute or as seen from this file. `python gates.py` runs it as it is,
# `jupytext --to notebook gates.py` makes a notebook of it.

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
RUN = HERE / os.environ.get("PYRO_BLORA_RUN", "example/bops")
data = read(RUN)
posterior, constant = Posterior(data), group(data, "constant_data")
layers, names = constant["layer"].values, posterior.projections
spent = float(posterior.expected_bops().adapted_ratio)
print(f"{posterior.chains} chains, E[BOPs] {spent:.4%} of the adapted projections at 32 x 32 bit")

# %% [markdown]
# Everything below is about the first chain, and exact where no draws are mentioned: the file holds the probabilities
# themselves.
#
# ## Depth by layer, projection and role
#
# The probability of every bit width: a panel a tensor role, a bar a projection. A bar of one colour is decided.

# %%
widths = np.exp(constant["log_q_width"]).mean("component").isel(chain=0)  # projection, tensor, width
figure, panels = plt.subplots(1, widths.sizes["tensor"], figsize=(14, 0.24 * len(names) + 1.2), sharey=True)
for panel, tensor in zip(panels, widths["tensor"].values, strict=True):
    table = widths.sel(tensor=tensor).to_pandas()
    table.plot.barh(stacked=True, ax=panel, colormap="viridis", legend=tensor == "hidden", width=0.9)
    panel.set(title=tensor, xlabel="probability", xlim=(0, 1))
panels[0].invert_yaxis()
panels[-1].legend(title="bit", bbox_to_anchor=(1, 1))
plt.show()
widths.mean("projection").to_pandas().round(2)

# %% [markdown]
# On the stored run inputs and base weights are divided between 4 and 8 bit (0.35 and 0.46 of the probability of
# inputs, 0.40 and 0.34 of base weights), and few tensors are decided. `lora_A`, `lora_B` and `hidden` have 32 bit with
# probability 0.88 to 0.89. That is the prior's word: under `bops` they cost next to nothing.
#
# ## Bit widths by layer
#
# Expected bits, averaged over the projections of a layer. The whisker is the standard deviation of one tensor's width:
# it says how undecided tensors are, not how well the mean is known. The adapter's tensors are left out, see above.

# %%
mean, variance = (x[0].numpy() for x in posterior.moments().z)
for t, tensor in enumerate(posterior.layout.tensors[:2]):
    rows = [(mean[layers == i, t].mean(), np.sqrt(variance[layers == i, t].mean())) for i in np.unique(layers)]
    plt.errorbar(np.unique(layers) + 0.1 * t, *np.transpose(rows), fmt="o", capsize=3, label=tensor)
    print(f"{tensor}: E[bits] by layer", ", ".join(f"{bits:.1f}" for bits, _ in rows))
plt.gca().set(xlabel="layer", ylabel="bit")
plt.legend()
plt.show()

# %% [markdown]
# On the stored run inputs have 5.3 to 8.4 bit, most in layers 1 and 2, and base weights 5.1 to 7.4, least in the last
# two layers. The differences between layers are smaller than the spread of a single tensor, 3 to 4 bit.
#
# ## Rank of query, key and value
#
# The paper's Figure 2: expected open ranks by layer, with central 94 % intervals. There, `value` keeps more rank than
# `query` and `key`.

# %%
law = np.exp(constant["log_q_rank"]).mean("component").isel(chain=0).dropna("projection")  # projection, open_rank
below = law.cumsum("open_rank")
ranks = pd.DataFrame({
    "layer": constant["layer"].sel(projection=law["projection"]),
    "type": constant["type"].sel(projection=law["projection"]),
    "mean": (law * law["open_rank"]).sum("open_rank"),
    "low": (below < 0.03).sum("open_rank") + 1, "high": (below < 0.97).sum("open_rank") + 1,
}, index=law["projection"].values)  # fmt: skip
for i, (kind, mine) in enumerate(ranks.groupby("type", sort=False)):
    plt.vlines(mine["layer"] + 0.12 * i, mine["low"], mine["high"], color=f"C{i}")
    plt.plot(mine["layer"] + 0.12 * i, mine["mean"], "o", color=f"C{i}", label=kind)
plt.gca().set(xlabel="layer", ylabel="open ranks")
plt.legend(bbox_to_anchor=(1, 1))
plt.show()
ranks.groupby("type", sort=False)["mean"].mean().round(2)

# %% [markdown]
# The stored run does not show it: query 7.30, key 7.56 and value 6.73 of 8 on average, and all intervals reach up to 8.
# Only in layer 5 has value the most; in layer 1 it has 3.2, which another restart does not repeat (`convergence.py`).
# Under `bops` a rank costs little, so most stay open: `benchmarks/ranks.md` asks with priors that make ranks dear, and
# finds the paper's order on SST-2 and MRPC, and nothing decided on the three other tasks.
#
# ## Gates that the data did not inform
#
# KL from prior to posterior of each chain of gates, in nats; `rank` is the adapter's chain. Below 0.05 the posterior is
# the prior, and another prior would say something else. Such a chain is below the middle of the map's colours, and is
# listed.

# %%
kl, free = posterior.kl(), posterior.free()
columns = [*posterior.layout.tensors, "rank"]
moved = pd.DataFrame(np.column_stack([kl.z, kl.g]), names, columns)
moved = moved.where(np.column_stack([free.z, free.g]))  # nan where there is no gate or the prior leaves no choice
figure, panel = plt.subplots(figsize=(6, 0.24 * len(names) + 1.2))
image = panel.imshow(moved.clip(lower=0.005), norm="log", vmin=0.005, vmax=0.5, aspect="auto")
panel.set_xticks(range(len(columns)), columns)
panel.set_yticks(range(len(names)), names)
figure.colorbar(image, label="KL, nats", extend="both")
plt.show()
silent = moved < 0.05
print(f"{silent.sum().sum()} of {moved.count().sum()} chains of gates are within 0.05 nats of their prior")
for column in columns:
    print(f"{column}:", "all" if silent[column].all() else ", ".join(silent.index[silent[column]]) or "none")

# %% [markdown]
# On the stored run 67 of 108 chains are silent: 53 of the 54 of the adapters' tensors, 6 base weights, 6 ranks and 2
# inputs. What was learned is the width of inputs, up to 1.20 nats, of base weights, and the rank of value in layer 1.
#
# ## Prior against posterior
#
# Left, the bit operations of draws from the prior that was used and from the posterior. Right, the expected bits of
# each tensor under both; on the diagonal the data did not move them.

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 4))
for name in ("prior", "posterior"):
    values = 100 * group(data, name)["bops_adapted"].isel(chain=0).values
    panels[0].hist(values, bins=20, density=True, alpha=0.6, label=name)
    print(f"{name}: mean BOPs of draws {values.mean():.2f} %")
panels[0].set(xlabel="BOPs, % of the adapted projections at 32 x 32 bit", ylabel="density")
before = posterior.log_prior.z[0].exp().numpy() @ np.array(posterior.layout.ladder)
for t, tensor in enumerate(posterior.layout.tensors):
    panels[1].plot(before[free.z[:, t], t], mean[free.z[:, t], t], "o", mfc="none", label=tensor)
panels[1].plot([2, 32], [2, 32], color="black", linewidth=0.8)
panels[1].set(xlabel="E[bits] under the prior", ylabel="E[bits] under the posterior", xscale="log", yscale="log")
for axis in (panels[1].xaxis, panels[1].yaxis):
    axis.set(major_locator=FixedLocator(posterior.layout.ladder), minor_locator=NullLocator())
    axis.set_major_formatter("{x:.0f}")
for panel in panels:
    panel.legend()
plt.show()

# %% [markdown]
# On the stored run the data pay for more than the prior would give: draws of the prior take 4.16 % of the bit
# operations, of the posterior 5.89 %. Inputs rise from 5.1 to 7.0 bit, base weights from 5.1 to 6.3 (E[bits] of
# `summary.json`). Adapters are on the diagonal.
#
# ## The same in ArviZ's words
#
# `az.summary` of the draws of all chains, named `[projection]`; `r_hat` compares restarts, where there are some.

# %%
az.summary(data, var_names=["bops_adapted", "ranks"], kind="all" if posterior.chains > 1 else "stats")

# %% [markdown]
# On the stored run the mean BOPs of all draws are 6.5 %, as the other two restarts spend more than the first, and
# `r_hat` is 1.12. Most ranks are near 1.0; value of layer 1 has 1.69.
