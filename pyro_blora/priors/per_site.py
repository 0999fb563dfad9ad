"""A prior by name, of both sites or of each site its own.

Either site can have a prior of its own: the settings `z` and `g` name it, `z.NAME` and `g.NAME` are its settings, and
`off` opens all its gates for good (32 bit; rank R).
"""

import torch
from torch import Tensor, nn

from ..gates import Gates
from ..layout import AdapterLayout
from .base import PRIORS, build_one
from .budget import Budget

_OFF = ("fixed", {})  # what the word `off` means
HOOKS = ("adapt", "explain", "pyro_model", "pyro_guide", "sample_prior", "report")


class Separate(nn.Module):
    """The z of one prior and the g of another; what only one of them can do is done by it alone."""

    def __init__(self, z: nn.Module, g: nn.Module):
        super().__init__()
        if isinstance(z, Budget) and isinstance(g, Budget):
            raise ValueError("z and g cannot both have prior 'budget', whose targets are of the same bit operations")
        self.z, self.g = z, g
        for site, part in (("z", z), ("g", g)):
            if hasattr(part, "only"):
                part.only(site)
            if isinstance(part, Budget):  # as far as this site's gates reach, with the other's as they are
                means = Gates(*(law.mean for law in self()))
                ends = (means._replace(**{site: torch.full_like(getattr(means, site), v)}) for v in (0.0, 1.0))
                part.require_reach(*ends)

    def forward(self) -> Gates:
        return Gates(self.z().z, self.g().g)

    def __getattr__(self, name: str):
        if name in HOOKS and any(hasattr(part, name) for part in (self.z, self.g)):
            return getattr(type(self), f"_{name}").__get__(self)
        return super().__getattr__(name)

    def _each(self, name: str) -> dict[str, nn.Module]:
        return {site: part for site, part in (("z", self.z), ("g", self.g)) if hasattr(part, name)}

    def _adapt(self, means: Gates) -> None:
        for part in self._each("adapt").values():
            part.adapt(means)

    def _explain(self, ratios: Tensor) -> None:
        for part in self._each("explain").values():
            part.explain(ratios)

    def _pyro_model(self) -> Gates:
        z, g = (part.pyro_model() if hasattr(part, "pyro_model") else part() for part in (self.z, self.g))
        return Gates(z.z, g.g)

    def _pyro_guide(self) -> dict[str, Tensor]:
        parts = self._each("pyro_guide").values()
        return {name: value for part in parts for name, value in part.pyro_guide().items()}

    def _sample_prior(self, draws: int) -> Gates:
        laws = []
        for site, part in (("z", self.z), ("g", self.g)):
            if hasattr(part, "sample_prior"):
                laws.append(getattr(part.sample_prior(draws), site))
            else:
                law = getattr(part(), site)
                laws.append(law.expand((draws, *law.batch_shape)))
        return Gates(*laws)

    def _report(self) -> dict[str, float]:
        parts = self._each("report").items()
        return {f"{site}_{name}": value for site, part in parts for name, value in part.report().items()}


def build_prior(name: str, layout: AdapterLayout, settings: dict | None = None) -> nn.Module:
    """The named prior on a layout, as a module that returns Gates when called; settings `z` and `g` replace a site.

    Errors: ValueError for an unknown name or setting, and for a law of the wrong kind or shape.
    """
    built = {owner: build_one(*part, layout) for owner, part in parts(name, settings or {}).items()}
    whole = built.get("both")
    return Separate(built.get("z", whole), built.get("g", whole)) if built.keys() - {"both"} else whole


def parts(name: str, settings: dict) -> dict[str, tuple[str, dict]]:
    """Name and settings of what is left of the prior of `both` sites, and of a `z` and a `g` of their own.

    Errors: ValueError for an unknown name or setting, and for settings of a prior that has no site left.
    """
    own = {site: str(settings[site]) for site in ("z", "g") if site in settings}
    found = {} if len(own) == 2 else {"both": (name, {})}
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
