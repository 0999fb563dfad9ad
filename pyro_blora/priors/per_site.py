"""A prior by name, of both sites or of each site its own.

Either site can have a prior of its own: the settings `z` and `g` name it, `z.NAME` and `g.NAME` are its settings, and
`off` opens all its gates for good (32 bit; rank R).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..costs import Spent
from ..gates import Gates, NestedBernoulli
from ..layout import AdapterLayout
from ..registries import PRIORS
from .base import Prior, build_one
from .budget import Budget

Part = tuple[str | Callable[..., Any], dict]  # name and settings
_OFF: Part = ("fixed", {})  # what the word `off` means


class Separate(Prior):
    """The z of one prior and the g of another; each adapts, learns and reports as it does alone."""

    def __init__(self, z: Prior, g: Prior):
        super().__init__()
        if isinstance(z, Budget) and isinstance(g, Budget):
            raise ValueError("z and g cannot both have prior 'budget', whose targets are of the same cost")
        self.z, self.g = z, g
        for site, part in (("z", z), ("g", g)):
            part.only(site)
            if isinstance(part, Budget):  # as far as this site's gates reach, with the other's as they are
                means = Gates(*(q.mean for q in self()))
                ends = (means._replace(**{site: torch.full_like(getattr(means, site), v)}) for v in (0.0, 1.0))
                part.require_reach(*ends)

    def forward(self) -> Gates[NestedBernoulli]:
        return Gates(self.z().z, self.g().g)

    @property
    def adapts(self) -> bool:
        return self.z.adapts or self.g.adapts

    def adapt(self, means: Gates[Tensor]) -> None:
        self.z.adapt(means)
        self.g.adapt(means)

    @property
    def explains(self) -> bool:
        return self.z.explains or self.g.explains

    def explain(self, ratios: Tensor) -> None:
        self.z.explain(ratios)
        self.g.explain(ratios)

    def spent(self, means: Gates[Tensor]) -> Spent | None:
        return self.z.spent(means) or self.g.spent(means)

    def missed(self, means: Gates[Tensor]) -> str | None:
        return self.z.missed(means) or self.g.missed(means)

    def pyro_model(self) -> Gates[NestedBernoulli]:
        return Gates(self.z.pyro_model().z, self.g.pyro_model().g)

    def pyro_guide(self) -> dict[str, Tensor]:
        return self.z.pyro_guide() | self.g.pyro_guide()

    def sample_prior(self, draws: int) -> Gates[NestedBernoulli]:
        return Gates(self.z.sample_prior(draws).z, self.g.sample_prior(draws).g)

    def rate_parts(self) -> dict[str, Prior]:
        return {site: part for site, part in (("z", self.z), ("g", self.g)) if part.rate_names}

    def report(self) -> dict[str, float]:
        parts = (("z", self.z), ("g", self.g))
        return {f"{site}_{name}": value for site, part in parts for name, value in part.report().items()}


def build_prior(name: str | Callable[..., Any], layout: AdapterLayout, settings: dict | None = None) -> Prior:
    """The named prior on a layout, as a module that returns Gates when called.

    Settings `z` and `g` replace a site.
    Errors: ValueError for an unknown name or setting, and for a distribution of the wrong kind or shape.
    """
    built = {owner: build_one(*part, layout) for owner, part in parts(name, settings or {}).items()}
    if built.keys() == {"both"}:
        return built["both"]
    return Separate(*(built[site] if site in built else built["both"] for site in "zg"))


def parts(name: str | Callable[..., Any], settings: dict) -> dict[str, Part]:
    """Name and settings of what is left of the prior of `both` sites, and of a `z` and a `g` of their own.

    Errors: ValueError for an unknown name or setting, and for settings of a prior that has no site left.
    """
    own = {site: str(settings[site]) for site in ("z", "g") if site in settings}
    found: dict[str, Part] = {} if len(own) == 2 else {"both": (name, {})}
    found |= {site: _OFF if chosen == "off" else (chosen, {}) for site, chosen in own.items()}
    for key, value in settings.items():
        site, dot, setting = key.partition(".")
        if key in own:
            continue
        owner, setting = (site, setting) if dot else ("both", key)
        if owner not in found or own.get(owner) == "off":
            remedy = f"name one with --prior.{owner} NAME" if dot else "z and g have priors of their own"
            raise ValueError(f"setting {key!r} belongs to no prior here: {remedy}, or drop --prior.{key}")
        found[owner] = (found[owner][0], {**found[owner][1], setting: value})
    for chosen, given in found.values():
        PRIORS.settings(PRIORS.resolve(chosen), given)
    return found
