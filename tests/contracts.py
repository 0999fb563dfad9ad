"""Guides that learn, the gates that exist, and `check_guide` in the order in which these tests name its arguments."""

import torch

from pyro_blora import testing
from pyro_blora.gates import Gates
from pyro_blora.guides import GUIDES, fixed_rank
from pyro_blora.priors import PRIORS

BY_NAME = [name for name in PRIORS.names() if name != "allocation"]  # priors that need no setting
LEARNING = [name for name in GUIDES.names() if GUIDES.resolve(name).__module__ != fixed_rank.__name__]


def masks(layout):
    """The gates that exist, in the shapes of z and g."""
    z = layout.z_mask[..., None].expand(layout.z_shape)
    return Gates(z, layout.g_mask[:, None].expand(layout.g_shape))


def check_guide(name, layout, prior_name, settings=None, prior_settings=None):
    torch.manual_seed(0)
    return testing.check_guide(name, layout, settings, prior=prior_name, prior_settings=prior_settings)
