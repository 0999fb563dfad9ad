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
# Bit widths and ranks of one run, from its `posterior.nc`. The stored run is SST-2 on MiniLM (2,000 examples, two
# epochs, prior `bops`, 50 draws, three restarts), made by `python experiments/grid.py
# experiments/grids/reading.yaml --glue_dir path/to/glue`. For another one: `PYRO_BLORA_RUN=runs/… jupytext --to
# notebook --execute analysis/gates.py`.

# %%
import os
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from pyro_blora.arviz_data import group, read
from pyro_blora.diagnostics import Posterior

data = read(Path(os.environ.get("PYRO_BLORA_RUN", "example/bops")))
posterior, constant = Posterior(data), group(data, "constant_data")
spent = float(posterior.expected_bops().adapted_ratio)
print(f"{posterior.chains} chains, E[BOPs] {spent:.4%} of the adapted projections")

# %% [markdown]
# ## Depth by layer, projection and role
#
# The probability of every bit width, exact, of the first chain: a panel a tensor role, a bar a projection. A bar of
# one colour is a decided tensor.
#
# On the stored run, inputs and base weights are divided between 4 and 8 bit. `lora_A`, `lora_B` and `hidden` are at
# 32 bit, where prior `bops` leaves them as they cost next to nothing.

# %%
widths = np.exp(constant["log_q_width"]).mean("component").isel(chain=0)  # projection, tensor, width
figure, panels = plt.subplots(
    1, widths.sizes["tensor"], figsize=(14, 0.24 * widths.sizes["projection"] + 1.2), sharey=True
)
for panel, tensor in zip(panels, widths["tensor"].values, strict=True):
    table = widths.sel(tensor=tensor).to_pandas()
    table.plot.barh(stacked=True, ax=panel, colormap="viridis", legend=tensor == "hidden", width=0.9)
    panel.set(title=tensor, xlabel="probability", xlim=(0, 1))
panels[0].invert_yaxis()
panels[-1].legend(title="bit", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## Bit widths by layer
#
# Expected bits, averaged over the projections of a layer, with the standard deviation of a tensor's own law as a
# whisker.
#
# On the stored run no layer stands out: inputs have 5 to 8 bit and base weights 5 to 7, and the laws are wider
# than the differences between layers.

# %%
mean, variance = (x[0].numpy() for x in posterior.moments().z)
layers = constant["layer"].values
for t, tensor in enumerate(posterior.layout.tensors[:2]):
    rows = [(mean[layers == i, t].mean(), np.sqrt(variance[layers == i, t].mean())) for i in np.unique(layers)]
    plt.errorbar(np.unique(layers) + 0.1 * t, *np.transpose(rows), fmt="o", capsize=3, label=tensor)
plt.gca().set(xlabel="layer", ylabel="bit")
plt.legend()
plt.show()

# %% [markdown]
# ## Rank of query, key and value
#
# The paper's Figure 2: expected open ranks by layer, with central 94 % intervals of the exact law. There, `value`
# keeps more ranks than `query` and `key`.
#
# The stored run does not show it: query 7.3, key 7.6, value 6.7 on average, with intervals that overlap everywhere.
# Under `bops` ranks are cheap, so that most stay open. `benchmarks/ranks.md` asks with a prior that makes them
# dear.

# %%
law = np.exp(constant["log_q_rank"]).mean("component").isel(chain=0).dropna("projection")  # projection, open_rank
ranks = pd.DataFrame({
    "layer": constant["layer"].sel(projection=law["projection"]),
    "type": constant["type"].sel(projection=law["projection"]),
    "mean": (law * law["open_rank"]).sum("open_rank"), "low": (law.cumsum("open_rank") < 0.03).sum("open_rank") + 1,
    "high": (law.cumsum("open_rank") < 0.97).sum("open_rank") + 1,
}, index=law["projection"].values)  # fmt: skip
for i, (name, mine) in enumerate(ranks.groupby("type", sort=False)):
    spread = np.abs(mine[["low", "high"]].to_numpy().T - mine["mean"].to_numpy())
    plt.errorbar(mine["layer"] + 0.12 * i, mine["mean"], spread, fmt="o", capsize=3, label=name)
plt.gca().set(xlabel="layer", ylabel="open ranks")
plt.legend()
plt.show()
ranks.groupby("type", sort=False)["mean"].mean().round(2)

# %% [markdown]
# ## Prior against posterior
#
# The bit operations of allocations drawn from the prior that was used, and from the posterior. Where both curves
# agree, the data said nothing about the total.
#
# On the stored run the data pay for more bits than the prior alone would: the posterior is to the right of the
# prior.

# %%
for name in ("prior", "posterior"):
    values = 100 * group(data, name)["bops_adapted"].values.ravel()
    plt.hist(values, bins=25, density=True, alpha=0.6, label=f"{name}, mean {values.mean():.1f} %")
plt.gca().set(xlabel="bit operations, % of the adapted projections at 32 x 32", ylabel="density")
plt.legend()
plt.show()

# %% [markdown]
# ## Gates that the data did not inform
#
# KL from prior to posterior of every chain of gates, nats. Below 0.05 the posterior is the prior, and another prior
# would say something else.
#
# On the stored run 53 of the 54 adapter tensors are silent, and 67 of all 108 chains.

# %%
kl = constant["z_kl"].isel(chain=0).to_series().dropna().rename("KL")
kl = pd.concat([kl.rename_axis(["projection", "tensor"]), pd.concat(
    {"rank": constant["g_kl"].isel(chain=0).to_series().dropna().rename("KL")}, names=["tensor", "projection"]
).swaplevel()])  # fmt: skip
silent = kl[kl < 0.05]
print(f"{len(silent)} of {len(kl)} chains of gates are within 0.05 nats of their prior")
silent.groupby("tensor").size().rename("silent chains")

# %% [markdown]
# ## The same in ArviZ's words
#
# `az.summary` of the draws: names are `[projection, tensor]`. With more than one chain, `r_hat` compares restarts.

# %%
az.summary(data, var_names=["bops_adapted", "ranks"])
