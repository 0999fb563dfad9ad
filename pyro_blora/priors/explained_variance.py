"""A prior of the ranks from the principal components of the layers' inputs."""

import torch
from torch import Tensor, nn

from ..gates import Gates, NestedBernoulli
from ..layout import AdapterLayout
from ..registries import register_prior
from .base import Prior


class ExplainedVariance(Prior):
    """Depths of bits are equally likely; a rank's log-odds say how much of its layer's input it explains.

    log-odds of rank r = strength * log(ratio_r / cut), with ratio_r the share of the input's variance along its r-th
    principal component, and the cut the smallest that EVA would keep if it kept `share` of all ranks. Ranks are even
    until the gates start and the data are seen.
    """

    z_depths: Tensor  # (L, T, K + 1), log-probabilities
    adapted: Tensor  # (L,) bool
    log_odds: Tensor  # (L, R - 1)

    def __init__(self, layout: AdapterLayout, strength: float, share: float):
        super().__init__()
        self.strength, self.share, self.silent = strength, share, False
        self.register_buffer("z_depths", torch.zeros(*layout.z_shape[:2], layout.z_shape[-1] + 1), persistent=False)
        self.register_buffer("adapted", layout.g_mask.clone(), persistent=False)
        self.register_buffer("log_odds", torch.zeros(layout.g_shape))

    def only(self, site: str) -> None:
        self.silent = site == "z"

    @torch.no_grad()
    def explain(self, ratios: Tensor) -> None:
        """Set the log-odds.  ratios (L, R): share of the variance along each of R principal components, falling."""
        log_ratios = ratios.to(self.log_odds).clamp(min=torch.finfo(self.log_odds.dtype).tiny).log()
        cut = log_ratios[self.adapted].quantile(1 - self.share)
        self.log_odds.copy_(self.strength * (log_ratios[:, 1:] - cut))

    def forward(self) -> Gates[NestedBernoulli]:
        z = NestedBernoulli.from_depth_logits(self.z_depths, validate_args=False)
        return Gates(z, NestedBernoulli(nn.functional.logsigmoid(self.log_odds), validate_args=False))

    def report(self) -> dict[str, float]:
        """Ranks that the prior alone expects, averaged over the adapters."""
        expected = 1 + self.log_odds.sigmoid().cumprod(-1).sum(-1)
        return {} if self.silent else {"prior_rank": expected[self.adapted].mean().item()}


@register_prior("eva")
def eva(layout: AdapterLayout, *, strength: float = 1.0, share: float = 0.5) -> ExplainedVariance:
    """Bit widths equally likely; a rank's log-odds from the variance of the layer's input that it explains.

    Settings: strength, of the log-odds in the logarithm of that share of variance; share, of all ranks, whose
    odds are at least even.
    Source: Paischer et al., EVA (2024), as a prior instead of an initialization.
    """
    if not (strength > 0 and 0 < share <= 1):
        raise ValueError(f"prior 'eva': strength must be > 0 and share in (0, 1], got {strength} and {share}")
    return ExplainedVariance(layout, float(strength), float(share))
