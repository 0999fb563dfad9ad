"""Exact statements about the gates of a posterior.nc, from the distributions in it, not from its draws.

`Posterior(read(path))` needs neither the model nor random numbers: the distributions of guide and prior over every
tensor's bit width and every adapter's rank are in the file's constant_data, and bit operations are a function of them.
Shapes: C chains (restarts), M equally likely components of the guide (1 for a mean field), L projections, T tensors,
K + 1 widths, R ranks.   Units: nats; BOPs as ratios to 32 x 32 bit with all ranks, unless stated.
"""

import functools
import json
import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..bops import BOPs, at_full_width, expected_bops, savings
from ..gates import Gates, NestedBernoulli
from ..layout import AdapterLayout
from .arviz_compat import group, pareto_weights
from .forcing import Forcing, WhatIf, opening


class Reweighted(NamedTuple):
    """Draws under another prior: weights (S,), Pareto k of their tail, E[BOPs] by them and by the mean field's form."""

    weights: np.ndarray
    pareto_k: float
    bops_adapted: float
    bops_exact: float


def layout_of(data) -> AdapterLayout:
    """The layout that an opened posterior.nc was written for."""
    return AdapterLayout.from_dict(json.loads(group(data, "constant_data").attrs["layout"]))


class Posterior:
    """The exact side of an opened posterior.nc (`arviz_compat.read`).

    log_q: z (C, M, L, T, K + 1), g (C, M, L, R), log probabilities of widths and ranks; log_prior: the same without M.
    What does not exist counts as open. masks: z (L, T), g (L), whether it exists. kl_weight: of the KL in training;
    a file from before it was noted counts as 1.
    """

    def __init__(self, data):
        self.data, self.layout = data, layout_of(data)
        self.constant = group(data, "constant_data")
        self.masks = Gates(self.layout.z_mask, self.layout.g_mask)
        self.log_q = Gates(self._distribution("log_q_width"), self._distribution("log_q_rank"))
        self.log_prior = Gates(self._distribution("log_prior_width"), self._distribution("log_prior_rank"))
        self.chains, self.kl_weight = len(self.log_q.z), float(self.constant.attrs.get("kl_weight", 1.0))
        self.projections = [str(name) for name in self.constant["projection"].values]
        self._forcing: dict[int, Forcing] = {}

    def _distribution(self, name: str) -> Tensor:
        distribution = torch.tensor(self.constant[name].values, dtype=torch.float64)
        opened = torch.full_like(distribution, -torch.inf)
        opened[..., -1] = 0.0
        return torch.where(distribution.isnan(), opened, distribution)

    # --- distributions ----------------------------------------------------------------------------------------------

    def depth_probs(self, chain: int = 0) -> Gates:
        """Probabilities of widths (L, T, K + 1) and of ranks (L, R)."""
        return Gates(*(x[chain].exp().mean(0) for x in self.log_q))

    def forcing(self, chain: int = 0) -> Forcing:
        """What conditions the guide on states of a ladder."""
        if chain not in self._forcing:
            self._forcing[chain] = Forcing(
                self.layout, *(Gates(*(x[chain] for x in y)) for y in (self.log_q, self.log_prior))
            )
        return self._forcing[chain]

    def expected_bops(self, chain: int = 0) -> BOPs:
        """Exact: ladders are independent given the component."""
        each = expected_bops(self.layout, *_marginals(Gates(*(x[chain] for x in self.log_q))))
        return BOPs(*(x.mean(0) for x in each))

    def moments(self) -> Gates:
        """Means and variances over the distribution of bits (2, C, L, T) and of open ranks (2, C, L)."""
        found = []
        for log_q, values in zip(self.log_q, (self.layout.ladder, range(1, self.layout.rank + 1)), strict=True):
            distribution, each = log_q.exp().mean(1), torch.tensor(list(values), dtype=torch.float64)
            mean = distribution @ each
            found.append(torch.stack([mean, (distribution @ each.square() - mean.square()).clamp(min=0.0)]))
        return Gates(*found)

    # --- bit operations ---------------------------------------------------------------------------------------------

    def gates(self, chain: int = 0) -> pd.DataFrame:
        """One row per existing gate: its names, whether it is deployed open, and the probability that it is open; what
        it contributes to the expected saving (of `adapted`, 0 where no adapted one reads it, and of `model`); and the
        WhatIf of forcing it to the other state than the deployed one.  nan where that is impossible.
        """
        full = at_full_width(self.layout)
        marginals = _marginals(Gates(*(x[chain] for x in self.log_q)))
        saved, of_adapted = (
            Gates(*(torch.stack(x).mean(0) for x in zip(*each, strict=True)))
            for each in (
                [savings(self.layout, z, g, x) for z, g in zip(*marginals, strict=True)] for x in (False, True)
            )
        )
        mean = Gates(*(x.mean(0) for x in marginals))
        deployed = Gates(*(self.constant[f"{site}_deployed"].values[chain] > 0.5 for site in "zg"))
        lines = []
        for name, (site, index, depth) in self._known.items():
            at = (*index, depth - 1)
            is_open = bool(getattr(deployed, site)[at])
            saving, adapted = (float(getattr(x, site)[at]) for x in (saved, of_adapted))
            try:
                forced = self.what_if(name, not is_open, chain)
                after = {
                    "forced": "closed" if is_open else "open", "elbo_loss": forced.elbo_loss,
                    "nll_rise": forced.nll_rise, "bops_change": forced.bops_adapted - forced.before_adapted,
                }  # fmt: skip
            except ValueError:  # pinned, or a guide that is a single allocation
                after = {"forced": "never", "elbo_loss": math.nan, "nll_rise": math.nan, "bops_change": math.nan}
            projection = self.layout.projections[index[0]]
            lines.append({
                "gate": name, "site": site, "projection": self.projections[index[0]], "layer": projection.layer,
                "type": projection.type, "tensor": self.layout.tensors[index[1]] if site == "z" else "rank",
                "rung": self.layout.ladder[depth] if site == "z" else depth + 1,
                "probability": float(getattr(mean, site)[at]), "deployed": is_open,
                "saving_adapted": adapted / float(full.adapted), "saving_model": saving / float(full.model), **after,
            })  # fmt: skip
        return pd.DataFrame(lines)

    def what_if(self, gate: str, opened: bool, chain: int = 0) -> WhatIf:
        """Force one gate, named as `7.value.lora_A.8` (bits) or `7.value.rank.5`; a ladder opens and closes in order.

        Errors: ValueError for an unknown name, with the nearest names, and for a state of probability 0 in prior or
        guide.
        """
        site, index, depth = self._find(gate)
        kept = (torch.arange(getattr(self.log_q, site).shape[-1]) >= depth) == opened
        forcing = self.forcing(chain)
        found = forcing(site, index, kept)
        if found.log_probability == -math.inf:
            allowed = bool((getattr(self.log_prior, site)[(chain, *index)][kept] > -torch.inf).any())
            why = "its guide is a single allocation" if allowed else "it is pinned by its prior"
            raise ValueError(f"gate {gate} cannot be {'open' if opened else 'closed'}: {why}")
        return WhatIf(
            gate, opened, math.exp(found.log_probability),
            -found.log_probability - (1 - self.kl_weight) * found.log_factor_loss + 0.0,
            self.kl_weight * found.log_factor_loss, found.bops_adapted, found.bops_model,
            *(float(x.mean()) for x in forcing.slopes[:2]),
        )  # fmt: skip

    @functools.cached_property
    def _known(self) -> dict[str, tuple[str, tuple, int]]:
        """(site, index of the ladder, place in it from 1) of every gate that exists, by name."""
        return {name: tuple(rest) for name, *rest in self._every_gate()}

    def _every_gate(self):
        """(name, site, index of the ladder, place in it from 1) of every gate that exists."""
        for i, projection in enumerate(self.projections):
            for t, tensor in enumerate(self.layout.tensors):
                if self.masks.z[i, t]:
                    for k, bits in enumerate(self.layout.ladder[1:], 1):
                        yield f"{projection}.{tensor}.{bits}", "z", (i, t), k
            if self.masks.g[i]:
                yield from ((f"{projection}.rank.{k + 1}", "g", (i,), k) for k in range(1, self.layout.rank))

    def _find(self, gate: str) -> tuple[str, tuple, int]:
        known = self._known
        if gate not in known:
            near = [name for name in known if name.rsplit(".", 1)[0] == gate.rsplit(".", 1)[0]]
            near = near or [name for name in known if name.split(".")[:2] == gate.split(".")[:2]] or list(known)
            raise ValueError(
                f"there is no gate {gate!r}. A gate is PROJECTION.TENSOR.BITS or PROJECTION.rank.NUMBER, such as "
                f"{', '.join(near[:4])}"
            )
        return known[gate]

    # --- whether to believe it --------------------------------------------------------------------------------------

    def kl(self, chain: int = 0) -> Gates:
        """KL(guide || prior) of every ladder, nats.  z (L, T), g (L); 0 where there is none or it is pinned."""
        return Gates(*(
            torch.where(q.exp().mean(0) > 0, q.exp().mean(0) * (q.exp().mean(0).log() - p), 0.0).sum(-1).clamp(min=0.0)
            for q, p in zip((x[chain] for x in self.log_q), (x[chain] for x in self.log_prior), strict=True)
        ))  # fmt: skip

    def free(self, chain: int = 0) -> Gates:
        """Whether a ladder exists and its prior does not pin all its gates.  z (L, T), g (L), bool"""
        return Gates(*(
            mask & ((p[chain] > -torch.inf).sum(-1) > 1) for mask, p in zip(self.masks, self.log_prior, strict=True)
        ))  # fmt: skip

    def rhat(self) -> Gates:
        """R-hat of bits (L, T) and of ranks (L) between restarts, at infinitely many draws; nan for a single one.

        1 where restarts have the same mean; infinite where each has a different value with probability 1.
        Source: Gelman and Rubin (1992), with each restart's moments from its exact distribution.
        """
        found = []
        for mean, variance in self.moments():
            between = mean.var(0) if len(mean) > 1 else torch.full_like(mean[0], torch.nan)
            ratio = torch.where(
                between < 1e-12, 0.0, between / variance.mean(0)
            )  # 0 / 0: no variance, and the same mean
            found.append((1 + ratio).sqrt())
        return Gates(*found)

    def reweighted(self, factor: float, chain: int = 0) -> Reweighted:
        """The posterior if every rate of the prior, -log p(open | the one before open), were `factor` times as large.

        By importance weights of the draws, with Pareto-smoothed tails, and by the mean field's own form, q p' / p of
        each ladder, which is exact if the log Bayes factors of a ladder do not depend on the other ladders.
        Errors: ValueError for a factor that is not positive.
        """
        if not 0 < factor < math.inf:
            raise ValueError(f"factor must be a positive number, got {factor}: 2 doubles every rate")
        drawn = group(self.data, "posterior")
        zero = torch.zeros((), dtype=torch.float64)
        log_ratio, distributions, log_mass = zero, [], zero
        for site, mask in zip("zg", self.masks, strict=True):
            log_q, log_p = getattr(self.log_q, site)[chain], getattr(self.log_prior, site)[chain]
            at_least = log_p.flip(-1).logcumsumexp(-1).flip(-1)
            rates = (at_least[..., :-1] - at_least[..., 1:]).nan_to_num(0.0)  # below a pin: of no weight
            moved = NestedBernoulli(-factor * rates, validate_args=False).depth_log_probs - log_p
            moved = torch.where(log_p > -torch.inf, moved, 0.0)
            gates = torch.tensor(np.nan_to_num(drawn[site].values[chain]))
            depth = gates.sum(-1).long()  # (S, L, T) or (S, L)
            change = moved.expand(len(depth), *moved.shape).gather(-1, depth[..., None]).squeeze(-1)
            log_ratio = log_ratio + torch.where(mask, change, 0.0).flatten(1).sum(-1)
            unnormalised = log_q + moved
            mass = unnormalised.logsumexp(-1, keepdim=True)
            distributions.append(unnormalised - mass)
            log_mass = log_mass + torch.where(mask, mass.squeeze(-1), 0.0).flatten(1).sum(-1)  # (M,)
        weights, k = pareto_weights(log_ratio.numpy())
        exact = expected_bops(self.layout, *_marginals(Gates(*distributions))).adapted_ratio
        return Reweighted(
            weights, k, float(weights @ drawn["bops_adapted"].values[chain]), float(log_mass.softmax(0) @ exact)
        )


def marginals_of(posterior: Posterior, chain: int = 0) -> Gates:
    """Probabilities that each gate is open under every component.  z (M, L, T, K), g (M, L, R - 1)"""
    return _marginals(Gates(*(x[chain] for x in posterior.log_q)))


def _marginals(log_probs_of_depths: Gates) -> Gates:
    """Probabilities that each gate is open, from log probabilities of the depths.  (..., D) -> (..., D - 1)"""
    return Gates(*map(opening, log_probs_of_depths))
