"""`check_weights` finds what is wrong with a distribution of the weights and says it."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_blora.testing import check_weights
from pyro_blora.weights import WEIGHTS, Gaussian, Point, RandomWeights


class Own(RandomWeights):
    """Gaussian with one standard deviation."""

    in_training = True

    def __init__(self, weights, head):
        super().__init__(weights, head)
        self.log_std = nn.Parameter(torch.zeros(()))

    def distribution(self):
        return dist.Normal(self.mean, self.log_std.exp()).to_event(1)

    def prior(self):
        return dist.Normal(torch.zeros_like(self.mean), 1.0).to_event(1)

    def divergence(self):
        return torch.distributions.kl_divergence(self.distribution(), self.prior())

    def draw(self, draws):
        return self.distribution().sample((draws,))


class NoDraw(RandomWeights):
    pass


class OtherKeys(Own):
    @property
    def random(self):
        return ((7, "lora_C"),)


class TooFew(Own):
    @property
    def stored(self):
        return 1


class OfNothing(Point):
    in_training = True


class Loose(Own):
    def distribution(self):
        return dist.Normal(self.mean, self.log_std.exp())


class Discrete(Own):
    def distribution(self):
        return dist.Delta(self.mean.detach(), event_dim=1)

    def divergence(self):
        return self.mean.sum()


class Unlearned(Own):
    def divergence(self):
        return self.mean.square().sum()


class NumberKL(Own):
    def divergence(self):
        return 1.0


class Cold(Own):
    kl_weight = 0.0


class Flat(Own):
    def draw(self, draws):
        return self.mean.expand(draws, -1)


class Double(Own):
    def draw(self, draws):
        return super().draw(draws).double()


class Turned(Own):
    def draw(self, draws):
        return super().draw(draws).mT


class Overflowing(Own):
    def draw(self, draws):
        return super().draw(draws) / 0.0


class Unseeded(Own):
    generator = torch.Generator()

    def draw(self, draws):
        return torch.randn(draws, self.size, generator=self.generator)


class Forgetful(Own):
    extra = 0.0

    def collect(self, step, steps):
        self.extra += 1.0

    def draw(self, draws):
        return super().draw(draws) + self.extra


class Failing(Own):
    def collect(self, step, steps):
        raise RuntimeError("no memory")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda weights, head: nn.Identity(), "must return a pyro_blora.weights.Weights, got Identity: subclass it"),
        (NoDraw, r"it is random in 4 parts and has no draw\(S\): return \(S, 32\) draws"),
        (OtherKeys, "random has keys that it was not given: choose among"),
        (TooFew, "stored is 1, less than the 32 numbers of the mean"),
        (OfNothing, "it is in_training and nothing is random: subclass RandomWeights"),
        (
            Loose,
            r"distribution\(\) has batch shape \(32,\) and event shape \(\), expected \(\) and \(32,\): end with",
        ),
        (Discrete, "gradient in some of its parameters"),
        (Unlearned, "the KL has no finite gradient in some of its parameters"),
        (NumberKL, r"divergence\(\) must be KL\(distribution\(\) \|\| prior\(\)\), one finite number"),
        (Cold, "kl_weight is 0.0, expected a positive number"),
        (Flat, "two draws are the same"),
        (Double, r"draw\(4\) has shape \(4, 32\) and torch.float64, expected \(4, 32\) and torch.float32"),
        (Turned, r"draw\(4\) has shape \(32, 4\)"),
        (Overflowing, r"draw\(4\) is not finite"),
        (Unseeded, "draws differ from the same seed: draw with torch's global generator"),
        (Forgetful, "draws are others after load_state_dict: hold what is learned or collected in"),
        (Failing, r"'Failing': collect\(step, steps\) fails: RuntimeError: no memory"),
    ],
)
def test_what_is_wrong_is_said(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights)


def test_a_good_one_is_returned_built():
    assert isinstance(check_weights(Own), Own)
    assert check_weights("gaussian", {"sides": "both"}).size == 32


@pytest.mark.parametrize("name", WEIGHTS.names())
def test_the_packages_own_pass(name):
    assert isinstance(check_weights(name), Gaussian) == (name in ("gaussian", "low_rank"))
