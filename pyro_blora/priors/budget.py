"""A prior whose rate is adapted in training so that the expected bit operations, or another cost, meet a target."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..bops import expected_bops
from ..cost_table import Times, of_file
from ..costs import DENOMINATORS, UNITS, Cost, Spent, latency, packed_bytes
from ..gates import Gates, NestedBernoulli
from ..layout import AdapterLayout
from ..registries import register_prior
from .base import Prior


class Budget(Prior):
    """p(z, g) proportional to exp(-rate * BOPs(z, g)), each ladder taken at the others' expected bits and ranks.

    cost: another cost (costs.py) in place of BOPs, which has the same properties.
    BOPs (bit operations) are linear in each ladder's gates, so the price of a gate is the derivative of E[BOPs] with
    respect to its marginal, and the gradient of the KL is that of rate * E[BOPs] - entropy. `adapt` follows prices and
    moves asinh(rate) by log(E[BOPs] / target) times a gain, but not further than Newton's step at these prices: dual
    ascent that does not swing when few bits are undecided. Rate: nats for the whole of the denominator's BOPs; below 0
    where the likelihood alone would use less than the target, which is met all the same.

    Where a cost is joint, a gate whose partner in the product is open would be free, or dearer closed than open, and no
    pair would ever close. There, prices are derivatives at half of the marginals: the mean price on the straight way
    from all gates closed to these marginals, which shares what a pair saves between the two.
    Source: Aumann and Shapley (1974), whose mean over the way is its middle, as the cost is linear in either tensor.
    """

    GAIN = 0.3  # and the largest step of asinh(rate), which is that of log(rate) for all but small rates
    LARGEST = 20.0  # asinh of 2e8 nats: where a guide does not follow, the way back stays short
    TOLERANCE = 0.1  # of the target, to be called met
    FOLLOW = 0.2  # of the way to new prices: all the way, an input and its weight would turn dear and cheap in step

    asinh_rate: Tensor  # ()
    z_price: Tensor  # (L, T, K), ratio of BOPs per gate
    g_price: Tensor  # (L, R - 1)

    def __init__(
        self, layout: AdapterLayout, target: float, denominator: str, name: str = "budget", cost: Cost | None = None
    ):
        super().__init__()
        known = ("adapted", "model") if cost is None else DENOMINATORS
        if denominator not in known:
            of = "" if cost is None else f" of cost {cost.name!r}"
            raise ValueError(
                f"prior {name!r}: denominator{of} must be {known[0]!r} or {known[1]!r}, got {denominator!r}"
            )
        self.layout, self.target, self.field = layout, target, f"{denominator}_ratio"
        self.name, self.denominator, self.cost = name, denominator, cost
        self.require_reach(*(Gates(*(torch.full(s, v) for s in (layout.z_shape, layout.g_shape))) for v in (0.0, 1.0)))
        self.register_buffer("asinh_rate", torch.tensor(math.asinh(1e3)))
        self.register_buffer("z_price", torch.zeros(layout.z_shape))
        self.register_buffer("g_price", torch.zeros(layout.g_shape))
        self._follow(Gates(torch.ones(layout.z_shape), torch.ones(layout.g_shape)))

    @property
    def is_joint(self) -> bool:
        return self.cost is not None and self.cost.joint

    def require_reach(self, closed: Gates[Tensor], opened: Gates[Tensor]) -> None:
        """Refuse a target that is not between the least and the most that the gates can spend."""
        least, most = self._ratio(*closed), self._ratio(*opened)
        if not least < self.target < most:
            setting, spend = ("bops", "bit operations") if self.cost is None else ("target", self.cost.unit)
            raise ValueError(
                f"prior {self.name!r}: {setting} must be between {least:.3g} (every gate closed) and {most:.3g} (open) "
                f"of denominator {self.denominator!r} in scope {self.layout.scope!r}, got {self.target:g}; in a larger "
                f"--scope more gates save {spend}"
            )

    def _ratio(self, z: Tensor, g: Tensor) -> Tensor:
        if self.cost is not None:
            return self.cost.of(z, g, self.denominator)[1]
        ratio: Tensor = getattr(expected_bops(self.layout, z, g), self.field)
        return ratio

    def _follow(self, means: Gates[Tensor], share: float = 1.0) -> Tensor:
        """Move the prices a share of the way to those at these marginals; returns the expected ratio there."""
        exact = [mean.detach().double() for mean in means]
        at = [(mean / 2 if self.is_joint else mean).requires_grad_() for mean in exact]
        with torch.enable_grad():
            ratio = self._ratio(*at).mean()
            prices = torch.autograd.grad(ratio, at)
        for buffer, price in zip((self.z_price, self.g_price), prices, strict=True):
            buffer.lerp_(price.sum_to_size(buffer.shape).to(buffer), share)
        return self._ratio(*exact).mean() if self.is_joint else ratio.detach()

    def _variance(self, means: Gates[Tensor]) -> Tensor:
        """Of the ratio at these prices, ladders independent given the component: minus its slope, by the Gibbs form."""

        def of_site(price: Tensor, mean: Tensor) -> Tensor:
            cost = nn.functional.pad(price.double().cumsum(-1), (1, 0))  # of each depth
            distribution = -nn.functional.pad(mean.double(), (1, 1)).diff(dim=-1)
            distribution[..., 0] += 1
            spread = (distribution * (cost - (distribution * cost).sum(-1, keepdim=True)).square()).sum(-1)
            return spread.reshape(-1, *price.shape[:-1]).mean(0).sum()

        return of_site(self.z_price, means.z) + of_site(self.g_price, means.g)

    @torch.no_grad()
    def adapt(self, means: Gates[Tensor]) -> None:
        """One step towards the target, at the marginals of M components.  z (M, L, T, K), g (M, L, R - 1)."""
        ratio = self._follow(means, self.FOLLOW)
        slope = self.asinh_rate.cosh() * self._variance(means) / ratio  # -d log E[BOPs] / d asinh(rate)
        step = (ratio / self.target).log() / slope.clamp(min=1 / self.GAIN)
        step = step.clamp(-self.GAIN, self.GAIN).to(self.asinh_rate)
        self.asinh_rate.add_(step).clamp_(-self.LARGEST, self.LARGEST)

    def forward(self) -> Gates[NestedBernoulli]:
        costs = (self.asinh_rate.sinh() * price for price in (self.z_price, self.g_price))
        depths = (-nn.functional.pad(cost.cumsum(-1), (1, 0)) for cost in costs)
        return Gates(*(NestedBernoulli.from_depth_logits(x, validate_args=False) for x in depths))

    def report(self) -> dict[str, float]:
        return {"rate": self.asinh_rate.sinh().item()}

    @torch.no_grad()
    def missed(self, means: Gates[Tensor]) -> str | None:
        ratio, unit = float(self._ratio(*means).mean()), "bit operations" if self.cost is None else self.cost.unit
        if abs(ratio - self.target) <= self.TOLERANCE * self.target:
            return None
        return (
            f"The target was missed: prior {self.name!r} was asked for {self.target:.2%} of the {unit} of denominator "
            f"{self.denominator!r}, and the gates expect {ratio:.2%}. Let them learn for longer (more --epochs, a "
            "smaller --kl_warmup), or ask for a target that is nearer."
        )

    @torch.no_grad()
    def spent(self, means: Gates[Tensor]) -> Spent | None:
        if self.cost is None:
            return None
        value, ratio = (float(x.mean()) for x in self.cost.of(*means, self.denominator))
        return Spent(self.cost.name, self.cost.unit, self.denominator, self.target, value, ratio)


@register_prior(
    "budget", reads={"costs": "pyro_blora.cost_table:of_file"},
    # what the gates start from deploys better than what a short training makes of it: benchmarks/settling.md
    proposes={"kl_warmup": 0.4, "settle": 1.0},
)  # fmt: skip
def budget(
    layout: AdapterLayout, *, bops: float = 0.1, denominator: str = "adapted", cost: str = "bops",
    target: float | None = None, costs: str | None = None, times: dict[str, Any] | None = None,
) -> Budget:  # fmt: skip
    """As `bops`, with the rate adapted in training so that the expected bit operations meet a target.

    Settings: bops, the target as a fraction of the denominator; denominator, `adapted` or `model` (see bops.py); cost,
    `bops`, `bytes` of the packed model or `latency`. Of the latter two (see costs.py): target, the fraction in place of
    bops; denominator, `adapted` or `gated`; costs, a file by `pyro-blora measure-costs`, which latency needs; times,
    what was read from it, which takes its place in the configuration.
    """
    if cost not in ("bops", *UNITS):
        raise ValueError(f"prior 'budget': cost must be one of bops, {', '.join(UNITS)}, got {cost!r}")
    if (costs or times) and cost != "latency":
        raise ValueError(f"prior 'budget': a table of times is of --prior.cost latency, not of {cost}: drop one")
    if cost == "bops":
        if target is not None:
            raise ValueError("prior 'budget': the target of cost 'bops' is --prior.bops: drop --prior.target")
        return Budget(layout, bops, denominator)
    if target is None:
        raise ValueError(f"prior 'budget': cost {cost!r} needs its target as a fraction: give --prior.target 0.5")
    if cost == "bytes":
        return Budget(layout, target, denominator, cost=packed_bytes(layout))
    if costs:
        times = of_file(costs)["times"]
    if times is None:
        raise ValueError(
            "prior 'budget': cost 'latency' needs this machine's times: pyro-blora measure-costs --to costs.json, then "
            "--prior.costs costs.json"
        )
    return Budget(layout, target, denominator, cost=latency(layout, Times(times)))
