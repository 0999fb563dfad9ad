"""`check_guide` finds what is wrong with a guide and says it."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_blora.gates import Gates, NestedBernoulli, RelaxedNestedBernoulli
from pyro_blora.guides import GUIDES, MeanField
from pyro_blora.priors import build_prior
from pyro_blora.testing import check_guide
from pyro_blora.testing.priors import GatesAlone
from pyro_blora.testing.promises import example_layout


class Plain(nn.Module):
    """A guide that shares no code with the package's: one relaxed ladder for every tensor, and for every adapter."""

    def __init__(self, layout, prior):
        super().__init__()
        self.shapes = layout.z_shape, layout.g_shape
        self.z, self.g = (nn.Parameter(torch.full(shape[-1:], 2.0)) for shape in self.shapes)

    def logits(self):
        return [x.expand(shape) for x, shape in zip((self.z, self.g), self.shapes, strict=True)]

    def distributions(self, temperature, hard):
        return Gates(*(RelaxedNestedBernoulli(x, temperature, hard) for x in self.logits()))

    def posterior(self):
        return Gates(*(RelaxedNestedBernoulli(x, 1.0).discrete for x in self.logits()))


class NoDraw(Plain):
    def distributions(self, temperature, hard):
        return self.posterior()


class Transposed(Plain):
    def distributions(self, temperature, hard):
        z, g = super().distributions(temperature, hard)
        return Gates(RelaxedNestedBernoulli(z.logits.mT, temperature, hard), g)


class Changed(Plain):
    """Its draws are changed by a function."""

    def distributions(self, temperature, hard):
        distributions = super().distributions(temperature, hard)
        return Gates(
            *(
                dist.Delta(self.change(distribution.rsample()), event_dim=1, validate_args=False)
                for distribution in distributions
            )
        )


class Outside(Changed):
    def change(self, value):
        return value + 1.0


class NotNested(Changed):
    def change(self, value):
        return torch.cat([0.0 * value[..., :1], 0.0 * value[..., 1:] + 1.0], -1)


class Soft(Changed):
    def change(self, value):
        return 0.5 * value


class Own(dist.TorchDistribution):
    """Draws of another distribution, and no KL."""

    has_rsample, arg_constraints = True, {}

    def __init__(self, distribution):
        self.distribution = distribution
        super().__init__(distribution.batch_shape, distribution.event_shape)

    def rsample(self, sample_shape=()):
        return self.distribution.rsample(sample_shape)


class WithoutKL(Plain):
    def distributions(self, temperature, hard):
        return Gates(*map(Own, super().distributions(temperature, hard)))


class Detached(Plain):
    def logits(self):
        return [x.detach() for x in super().logits()]


class OneSite(Plain):
    def logits(self):
        z, g = super().logits()
        return [z, 0.0 * g]


class Infinite(Plain):
    def logits(self):
        return [torch.where(x > 0, x, (x - x).sqrt()) for x in super().logits()]


class Tuple(Plain):
    def posterior(self):
        return tuple(super().posterior())


class Relaxed(Plain):
    def posterior(self):
        return self.distributions(1.0, True)


class Positive(Plain):
    def posterior(self):
        return Gates(*(NestedBernoulli(x, validate_args=False) for x in self.logits()))


class Elsewhere(Plain):
    def __init__(self, layout, prior):
        super().__init__(layout, prior)
        self.extra = torch.zeros(1)

    def logits(self):
        return [x + self.extra for x in super().logits()]


class Forgetful(Plain):
    def state_dict(self, *args, **settings):
        return {name: torch.ones_like(x) for name, x in super().state_dict(*args, **settings).items()}


class OtherComponents(Plain):
    def components(self):
        return Gates(*(NestedBernoulli(0.5 * distribution.log_probs[None]) for distribution in self.posterior()))


class FlatComponents(Plain):
    def components(self):
        return self.posterior()


class VectorDivergence(Plain):
    def divergence(self, prior, z_mask, g_mask):
        return Gates(torch.zeros(2), torch.zeros(2))


class Startled(Plain):
    def start(self, log_bayes_factors):
        nn.init.constant_(self.z, torch.inf)


class Failing(Plain):
    def components(self):
        raise KeyError("no such component")


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda layout, prior: nn.Identity(), r"must return an nn.Module with distributions\(\) and posterior\(\)"),
        (lambda layout, prior: 3, r"missing: \['distributions', 'posterior'\]"),
        (NoDraw, "'NoDraw': z of distributions.* is a NestedBernoulli, which has no reparametrized draw"),
        (Transposed, r"a draw of z from distributions.* has shape \(8, 4, 5\), expected \(8, 5, 4\)"),
        (Outside, r"a draw of z from distributions.* leaves \[0, 1\]"),
        (NotNested, r"a draw of z from distributions.* opens a gate above a closed one: multiply the gates"),
        (Soft, "a draw of z from distributions.* is not 0 or 1: threshold it"),
        (WithoutKL, "no KL divergence is registered for z, a Own against a NestedBernoulli: register its closed form"),
        (Detached, "the KL of z has no gradient: compute distributions"),
        (OneSite, "the KL of g does not depend on its parameters: nothing would be learned there"),
        (Infinite, "the gradient of the KL of z is not finite"),
        (Tuple, r"posterior\(\) must return Gates\(z, g\), got tuple"),
        (Relaxed, r"z of posterior\(\) must be a NestedBernoulli, got RelaxedNestedBernoulli"),
        (Positive, r"the log-probabilities of z of posterior\(\) must be <= 0"),
        (Elsewhere, r"it fails after .to\(meta\) .*: hold its tensors with self.register_buffer"),
        (Forgetful, "z is not restored by its state_dict"),
        (OtherComponents, r"z of posterior\(\) is not the mean of its components"),
        (FlatComponents, r"z of components\(\) must be a NestedBernoulli of shape \(M, 8, 5, 4\)"),
        (VectorDivergence, r"divergence\(\) must return Gates of two finite numbers"),
        (Startled, r"after start\(\) its parameters are not finite"),
        (Failing, r"'Failing': components\(\) fails: KeyError: 'no such component'"),
    ],
)
def test_what_is_wrong_is_said(guide, message):
    with pytest.raises(ValueError, match=message):
        check_guide(guide)


def test_a_plain_module_with_what_it_must_have_is_returned_as_a_guide():
    built = check_guide(Plain)
    assert type(built).__name__ == "Plain" and isinstance(built, Plain)
    assert not built.has_divergence and not built.is_allocated and built.deployed() is None


def test_a_guide_that_lets_go_of_what_the_prior_pins_is_refused():
    with pytest.raises(ValueError, match="has a gate of z where the prior gives it probability 0: hold gates"):
        check_guide(Plain, prior="fixed", prior_settings={"bits": 2})
    check_guide("mean_field", prior="fixed", prior_settings={"bits": 2})


def test_settings_are_those_of_the_function():
    def cautious(layout, prior, *, logit: float = 2.0):
        return MeanField(layout, prior, logit)

    check_guide(cautious, settings={"logit": 1})
    with pytest.raises(ValueError, match="guide 'cautious': unknown setting 'logits': did you mean 'logit'"):
        check_guide(cautious, settings={"logits": 1})


@pytest.mark.parametrize("name", GUIDES.names())
def test_the_packages_own_pass(name):
    learned_alone = name in ("uniform_rank", "allocated")  # of ranks, with no bit gates
    check_guide(name, prior="depth", prior_settings={"z": "off"} if learned_alone else {})


def test_the_global_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    check_guide("mixture")
    assert torch.equal(before, torch.get_rng_state())


def test_a_guide_that_moves_what_the_prior_keeps_is_refused_before_it_trains():
    """Its divergence is infinite: a training would go on, and report a posterior that cannot be."""
    layout = example_layout()
    for settings, site in (({"g": "off"}, "g"), ({"z": "off"}, "z")):
        prior = build_prior("bops", layout, settings)
        with pytest.raises(ValueError, match=f"the guide Plain moves gates of site '{site}' that the prior keeps open"):
            GatesAlone(layout, prior, Plain(layout, prior), n_train=10)
        GatesAlone(layout, prior, MeanField(layout, prior, 2.0), n_train=10)
