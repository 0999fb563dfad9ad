"""Parameter-free guides: ranks from DyLoRA's sampler or AdaLoRA's allocator.

Every bit gate is open, so use them with a prior whose z is `off`. Source: see the functions.
"""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..gates import Gates, NestedBernoulli
from ..layout import AdapterLayout
from ..registries import register_guide
from .base import Guide


def _point(gates: Gates[Tensor]) -> Gates[dist.TorchDistribution]:
    return Gates(*(dist.Delta(x, event_dim=1, validate_args=False) for x in gates))


class UniformRank(Guide):
    """One rank for all adapters, each with the same probability; the largest is deployed."""

    serves_every_rank = True  # so every rank is evaluated

    z: Tensor  # (R, L, T, K), all ones
    g: Tensor  # (R, L, R - 1), a component for each rank

    def __init__(self, layout: AdapterLayout):
        super().__init__()
        ranks = torch.arange(layout.rank)  # ranks - 1 of the components
        opened = (ranks[:-1] < ranks[:, None, None]) | ~layout.g_mask[:, None]  # what does not exist is open
        self.register_buffer("z", torch.ones(layout.rank, *layout.z_shape), persistent=False)
        self.register_buffer("g", opened.float(), persistent=False)

    def distributions(self, temperature: float | Tensor, hard: bool) -> Gates[dist.TorchDistribution]:
        rank = int(torch.randint(len(self.z), ()))  # drawn on the host: no transfer
        return _point(Gates(self.z[rank], self.g[rank]))

    def components(self) -> Gates[NestedBernoulli]:
        return Gates(*(NestedBernoulli(x.log(), validate_args=False) for x in (self.z, self.g)))

    def posterior(self) -> Gates[NestedBernoulli]:
        opened = torch.nn.functional.pad(self.g.mean(0), (1, 0), value=1.0)  # (L, R) marginals, none of them 0
        conditional = opened[..., 1:] / opened[..., :-1]
        return Gates(*(NestedBernoulli(x.log(), validate_args=False) for x in (self.z[0], conditional)))

    def deployed(self) -> Gates[Tensor]:
        return Gates(self.z[-1], self.g[-1])

    def divergence(self, prior: Gates[NestedBernoulli], z_mask: Tensor, g_mask: Tensor) -> Gates[Tensor]:
        kl_z = torch.where(z_mask, -prior.z.log_prob(self.z), 0.0).sum((-1, -2)).mean()
        kl_g = torch.where(g_mask, -prior.g.log_prob(self.g), 0.0).sum(-1).mean()
        return Gates(kl_z, kl_g - math.log(len(self.g)))


class Allocated(Guide):
    """One rank for each adapter, as set by the last call of `allocate`."""

    z: Tensor  # (L, T, K), all ones
    ranks: Tensor  # (L,)
    before: Tensor  # (R - 1,), ranks before each gate

    def __init__(self, layout: AdapterLayout, target_rank: int):
        super().__init__()
        self.target_rank = target_rank
        self.register_buffer("z", torch.ones(layout.z_shape), persistent=False)
        self.register_buffer("ranks", torch.full(layout.g_shape[:1], layout.rank))
        self.register_buffer("before", torch.arange(1, layout.rank), persistent=False)

    def allocate(self, ranks: Tensor) -> None:
        """Open ranks of every projection, (L,); the first is always open, so 0 counts as 1."""
        self.ranks.copy_(ranks)

    def _ladders(self) -> Gates[Tensor]:
        return Gates(self.z, (self.before < self.ranks[:, None]).to(self.z))

    def distributions(self, temperature: float | Tensor, hard: bool) -> Gates[dist.TorchDistribution]:
        return _point(self._ladders())

    def posterior(self) -> Gates[NestedBernoulli]:
        return Gates(*(NestedBernoulli(x.log(), validate_args=False) for x in self._ladders()))


@register_guide("uniform_rank")
def uniform_rank(layout: AdapterLayout, prior: nn.Module) -> UniformRank:
    """One rank for all adapters, drawn uniformly in every step; for method `dylora`. No settings.

    Source: Valipour et al., DyLoRA (2023), with the prior `depth` on the ranks.
    """
    return UniformRank(layout)


@register_guide("allocated")
def allocated(layout: AdapterLayout, prior: nn.Module, *, target_rank: int | None = None) -> Allocated:
    """The ranks that AdaLoRA's allocator has kept, a point; for method `adalora`.

    Settings: target_rank, their average at the end (default: two thirds of `rank`, AdaLoRA's own ratio).
    Source: Zhang et al., AdaLoRA (2023).
    """
    target_rank = max(1, 2 * layout.rank // 3) if target_rank is None else target_rank
    if not 1 <= target_rank < layout.rank:
        raise ValueError(
            f"guide 'allocated': target_rank must be from 1 to {layout.rank - 1}, below the rank {layout.rank} where "
            f"AdaLoRA starts, got {target_rank}: raise --rank"
        )
    return Allocated(layout, target_rank)
