"""What every guide must pass, the package's and a user's own; priors: pyro_blora.testing.check_prior.

from contracts import check_guide
check_guide("my_guides.py:shared", layout, "nested")
"""

import copy

import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_blora.gates import Gates, NestedBernoulli, pinned_logits
from pyro_blora.guides import GUIDES, build_guide, components, draw_gates, fixed_rank, log_prob
from pyro_blora.priors import build_prior

LEARNING = [name for name in GUIDES.names() if GUIDES.resolve(name).__module__ != fixed_rank.__name__]
MOVES = ({"dtype": torch.float64}, {"device": "meta"})


def masks(layout):
    """The gates that exist, in the shapes of z and g."""
    z = layout.z_mask[..., None].expand(layout.z_shape)
    return Gates(z, layout.g_mask[:, None].expand(layout.g_shape))


def shapes(layout):
    return Gates(layout.z_shape, layout.g_shape)


def check_guide(name, layout, prior_name, settings=None, prior_settings=None, *, learns=True):
    """A guide has a differentiable KL to the prior (if it learns), keeps its pins, and reports discrete laws.

    Of the chains that exist: what a guide says about the others is neither reported nor charged.
    """
    torch.manual_seed(0)
    module = build_prior(prior_name, layout, prior_settings)
    guide, prior = build_guide(name, layout, module, settings), module()
    assert isinstance(guide, nn.Module)
    for hard in (True, False):
        _check_laws(guide.laws(0.5, hard), prior, layout, hard)
    if learns:
        _check_gradient(guide, prior, layout)
    _check_posterior(guide, prior, layout)
    _check_joint(guide, prior, layout)
    _check_moves(guide, layout)
    if hasattr(guide, "start"):
        for nats in (0.0, 30.0):  # nothing, and much, said by the data
            guide.start(Gates(*(nats * torch.randn(law.depth_log_probs.shape) for law in prior)))
            assert all(bool(parameter.isfinite().all()) for parameter in guide.parameters())
            _check_gradient(guide, prior, layout, sure=True)
            _check_posterior(guide, prior, layout)
            _check_joint(guide, prior, layout)


def existing(kl, layout):
    """KLs of the chains that exist, and 0 for the others."""
    return Gates(*(torch.where(mask, x, 0.0) for x, mask in zip(kl, (layout.z_mask, layout.g_mask), strict=True)))


def _check_laws(laws, prior, layout, hard):
    for law, shape in zip(laws, shapes(layout), strict=True):
        value = law.rsample()
        assert law.batch_shape == shape[:-1] and value.shape == shape
        assert bool(((value >= 0) & (value <= 1)).all())
        assert bool((value[..., 1:] <= value[..., :-1] + 1e-6).all())
        if hard:
            assert bool(((value == 0) | (value == 1)).all())
    if hard:
        _check_possible(Gates(*(law.rsample().detach() for law in laws)), prior, layout)
    for kl in existing(map(kl_divergence, laws, prior), layout):
        assert bool(kl.isfinite().all())


def _check_possible(gates, prior, layout):
    """No gate that exists is where the prior says it cannot be."""
    for value, base, mask in zip(gates, prior, (layout.z_mask, layout.g_mask), strict=True):
        assert bool((base.log_prob(value)[..., mask] > -torch.inf).all())


def _check_gradient(guide, prior, layout, sure=False):
    """The KL and the sample reach the parameters wherever something is free, with finite slopes (0 if it is sure)."""
    free = [bool((pinned_logits(law.log_probs).isnan() & mask).any())
            for law, mask in zip(prior, masks(layout), strict=True)]  # fmt: skip
    parameters, laws = list(guide.parameters()), guide.laws(0.5, True)
    divergences = existing(map(kl_divergence, laws, prior), layout)
    flat = [bool((base.depth_log_probs.diff().abs() < 1e-5).all()) for base in prior]  # a point costs the same anywhere
    for law, kl, is_free, is_flat in zip(laws, divergences, free, flat, strict=True):
        for value, may_be_flat in ((kl.sum(), is_flat), (law.rsample().sum(), False)):
            assert value.requires_grad or not is_free
            if value.requires_grad:
                slopes = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
                assert all(bool(slope.isfinite().all()) for slope in slopes)
                at_optimum = bool(value.abs() < 1e-4)  # a guide that starts as its prior has a KL and a slope of 0
                moves = any(bool((slope != 0).any()) for slope in slopes)
                assert moves or at_optimum or not is_free or sure or may_be_flat


def _check_posterior(guide, prior, layout):
    posterior = guide.posterior()
    assert isinstance(posterior, Gates)
    for law, base, shape, exists in zip(posterior, prior, shapes(layout), masks(layout), strict=True):
        assert isinstance(law, NestedBernoulli)
        assert law.log_probs.shape == shape and bool((law.log_probs <= 0).all())
        pins = torch.where(exists, pinned_logits(base.log_probs), torch.nan)
        assert bool((law.log_probs[pins == torch.inf] == 0).all())
        assert bool((law.log_probs[pins == -torch.inf] == -torch.inf).all())
        assert bool((law.mode <= 1).all())
    for kl in existing(map(kl_divergence, posterior, prior), layout):
        assert bool(kl.isfinite().all())
    _check_possible(Gates(*(law.mode for law in posterior)), prior, layout)


def _check_joint(guide, prior, layout):
    """The posterior is the marginal of the joint law, whose draws are possible and whose KL is finite, with a slope."""
    laws, draws = components(guide), draw_gates(guide, 3)
    for law, marginal, draw, shape in zip(laws, guide.posterior(), draws, shapes(layout), strict=True):
        assert isinstance(law, NestedBernoulli) and law.log_probs.shape == (len(law.log_probs), *shape)
        torch.testing.assert_close(law.depth_probs.mean(0), marginal.depth_probs, atol=1e-5, rtol=1e-5)
        assert draw.shape == (3, *shape) and draw.dtype == torch.float32
    _check_possible(draws, prior, layout)
    assert bool(log_prob(guide, draws, layout.z_mask, layout.g_mask).isfinite().all())
    if hasattr(guide, "divergence"):
        divergence = sum(guide.divergence(prior, layout.z_mask, layout.g_mask))
        assert bool(divergence.isfinite()) and divergence.shape == ()
        if divergence.requires_grad:
            slopes = torch.autograd.grad(divergence, [*guide.parameters()], retain_graph=True, materialize_grads=True)
            assert all(bool(slope.isfinite().all()) for slope in slopes)


def _check_moves(guide, layout):
    for move in MOVES:
        moved = copy.deepcopy(guide).to(**move)
        for law, value in zip(moved.posterior(), (law.rsample() for law in moved.laws(0.5, True)), strict=True):
            for tensor in (law.log_probs, value):
                assert tensor.dtype == move.get("dtype", torch.float32)
                assert tensor.device.type == move.get("device", "cpu")
    twin = copy.deepcopy(guide)
    for parameter in twin.parameters():
        parameter.data.fill_(-1.0)
    twin.load_state_dict(guide.state_dict())
    for law, same in zip(guide.posterior(), twin.posterior(), strict=True):
        assert torch.equal(law.log_probs, same.log_probs)
