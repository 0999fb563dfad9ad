"""Smoothing: what the channels of an input are divided by before they are rounded, and the weights multiplied with.

    y = Q(W diag(s)) Q(x / s)        s > 0, one a channel of the input, learned as log(s) like the ranges

Without rounding this is W x, whatever s; with a coarse grid it moves outliers of an activation, which stretch the grid
of all its channels, into the weights that read it: the base weight and lora_A. Projections that share the grid of their
input share s. It costs a division for each element of an input, which bit operations do not count.
Source: Xiao et al., SmoothQuant (2023), which s starts from (ranges.start_smoothing); learned as in OmniQuant (2024).
"""

import torch
from torch import Tensor, nn

from ..layout import AdapterLayout


class Smoothing(nn.Module):
    """s of every projection of a layout, 1 at first.

    Parameter: log_scale (n_1 + n_2 + ...,), of the inputs that have a grid of their own, in the layout's order.
    """

    def __init__(self, layout: AdapterLayout, device: torch.device):
        super().__init__()
        self.owners = layout.input_owner.tolist()
        self.sizes = {owner: layout.projections[owner].in_features for owner in self.owners}
        self.log_scale = nn.Parameter(torch.zeros(sum(self.sizes.values()), device=device))

    def scales(self) -> list[Tensor]:
        """s (n,) of each projection."""
        by_owner = dict(zip(self.sizes, self.log_scale.exp().split([*self.sizes.values()]), strict=True))
        return [by_owner[owner] for owner in self.owners]

    @torch.no_grad()
    def set(self, scales: dict[int, Tensor]) -> None:
        """scales: s (n,) > 0 by the projection whose input has the grid."""
        self.log_scale.copy_(torch.cat([scales[owner] for owner in self.sizes]).log())
