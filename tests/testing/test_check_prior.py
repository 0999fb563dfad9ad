"""`check_prior` finds what is wrong with a prior and says it."""

import pytest
import torch
from contracts import BY_NAME
from torch import nn

from pyro_blora.gates import Gates, NestedBernoulli
from pyro_blora.testing import check_prior, example_layout


def distributions(z, g):
    return Gates(NestedBernoulli(z, validate_args=False), NestedBernoulli(g, validate_args=False))


def good(layout, *, rate: float = 1.0):
    return distributions(torch.full(layout.z_shape, -rate), torch.full(layout.g_shape, -rate))


class Learned(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.shapes = layout.z_shape, layout.g_shape
        self.log_rate = nn.Parameter(torch.zeros(()))

    def rate(self):
        return self.log_rate.exp()

    def forward(self):
        return distributions(*(-self.rate().expand(shape) for shape in self.shapes))


class FromRate(Learned):
    """As README writes it, with validation."""

    def forward(self):
        rate = self.rate()
        return Gates(*(NestedBernoulli.from_rate(rate.expand(shape)) for shape in self.shapes))


class PartlyFrozen(Learned):
    def __init__(self, layout):
        super().__init__(layout)
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def rate(self):
        return self.log_rate.exp() + self.frozen


class Plain(Learned):
    def forward(self):
        return tuple(super().forward())


class Breaking(Learned):
    def __init__(self, layout):
        super().__init__(layout)
        self.register_buffer("extra", torch.zeros(()))

    def rate(self):
        return self.log_rate.exp() + self.extra

    def adapt(self, means):
        self.extra.fill_(torch.nan)


class Detached(Learned):
    def rate(self):
        return self.log_rate.detach().exp()


class Elsewhere(Learned):
    def __init__(self, layout):
        super().__init__(layout)
        del self.log_rate
        self.constant = torch.ones(())

    def rate(self):
        return self.constant


class Forgetful(Learned):
    def __init__(self, layout):
        super().__init__(layout)
        self.extra = 0.0

    def rate(self):
        return self.log_rate.exp() + self.extra

    def adapt(self, means):
        self.extra += 1.0


class Talkative(Learned):
    def report(self):
        return {"rate": self.log_rate}


def noisy(layout):
    return distributions(-torch.rand(layout.z_shape), -torch.rand(layout.g_shape))


def positive(layout):
    return distributions(torch.full(layout.z_shape, 0.1), torch.zeros(layout.g_shape))


def not_a_number(layout):
    return distributions(torch.full(layout.z_shape, torch.nan), torch.zeros(layout.g_shape))


def transposed(layout):
    return distributions(torch.zeros(layout.z_shape).mT, torch.zeros(layout.g_shape))


def double(layout):
    return distributions(torch.zeros(layout.z_shape).double(), torch.zeros(layout.g_shape))


def another_law(layout):
    return Gates(torch.distributions.Bernoulli(torch.full(layout.z_shape, 0.5)), good(layout).g)


def one_site(layout):
    return good(layout).z


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (transposed, r"'transposed': z has shape \(8, 4, 5\), expected \(8, 5, 4\)"),
        (positive, "'positive': the log-probabilities of z must be <= 0"),
        (not_a_number, "'not_a_number': the log-probabilities of z must be <= 0 and not nan"),
        (another_law, "'another_law': z must be a NestedBernoulli, got Bernoulli"),
        (one_site, r"'one_site' must return Gates\(z, g\), got NestedBernoulli"),
        (double, "'double': z is torch.float64, expected torch.float32"),
        (noisy, "'noisy': built twice, it gave different distributions of z"),
        (Detached, "'Detached': its parameter 'log_rate' gets no gradient from the KL"),
        (Elsewhere, "'Elsewhere': z stays on cpu when the module moves to meta: hold its tensors with"),
        (Forgetful, "'Forgetful': what it changes in z is not in its state_dict"),
        (Plain, r"'Plain' must return Gates\(z, g\) when it is called, got tuple"),
        (Breaking, r"after adapt\(\) or explain\(\) the log-probabilities of z must be"),
        (Talkative, r"report\(\)\['rate'\] must be a number, got Parameter"),
    ],
)
def test_what_is_wrong_is_said(prior, message):
    with pytest.raises(ValueError, match=message):
        check_prior(prior)


@pytest.mark.parametrize("prior", [good, Learned, FromRate, PartlyFrozen])
def test_a_good_one_is_returned_built(prior):
    assert isinstance(check_prior(prior), nn.Module)


def test_settings_are_those_of_the_function():
    built = check_prior(good, settings={"rate": 2})
    assert built().z.log_probs.unique().item() == -2
    with pytest.raises(ValueError, match="unknown setting 'rat'"):
        check_prior(good, settings={"rat": 2})


@pytest.mark.parametrize("name", BY_NAME)
def test_the_packages_own_pass_on_the_example(name):
    check_prior(name, settings={"bops": 0.5} if name in ("budget", "random") else {})


def test_the_example_has_tensors_that_do_not_exist():
    layout = example_layout()
    assert not bool(layout.z_mask.all()) and not bool(layout.g_mask.all()) and bool(layout.g_mask.any())
