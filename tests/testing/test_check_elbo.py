"""`check_elbo` finds what is wrong with an ELBO and says it."""

import dataclasses

import pytest
import torch

from pyro_blora.elbos import ELBOS, GateELBO, Relaxed, StraightThrough
from pyro_blora.testing import check_elbo


class Averaged(StraightThrough):
    """A good one: the mean over several draws."""

    def __init__(self, *, count: int = 2):
        super().__init__()
        self.count = count

    def expected_nll(self, at):
        return sum(at.nll(gates) for gates in (at.gates, *(at.gates_of(0) for _ in range(self.count - 1)))) / self.count


class Doubled(StraightThrough):
    def expected_nll(self, at):
        return 2 * super().expected_nll(at)


class Detached(StraightThrough):
    def expected_nll(self, at):
        return super().expected_nll(at).detach()


class OfTheMode(GateELBO):
    def expected_nll(self, at):
        return at.nll(type(at.gates)(*(distribution.discrete.mode for distribution in at.distributions)))


class PerExample(StraightThrough):
    def differentiable_loss(self, model, guide, *args, **kwargs):
        return self.terms(model, guide, *args, **kwargs).loss


class Sampled(StraightThrough):
    def terms(self, *args, **kwargs):
        terms = super().terms(*args, **kwargs)
        return dataclasses.replace(terms, kl_z=terms.kl_z + torch.randn(()))


class NeverHeld(StraightThrough):
    def terms(self, *args, **kwargs):
        return dataclasses.replace(super().terms(*args, **kwargs), gate_weight=1.0)


class Failing(StraightThrough):
    def expected_nll(self, at):
        raise KeyError("label")


def with_arguments(score, guide):
    return None


@pytest.mark.parametrize(
    ("elbo", "message"),
    [
        (with_arguments, "estimator 'with_arguments' takes arguments: it must be a subclass"),
        (lambda: 3, "makes a int, which is no ELBO of gates"),
        (Doubled, "estimator 'Doubled': its estimates of the expected NLL have mean .* exact is"),
        (Detached, 'the gradient of the expected NLL does not reach the "network\'s weight"'),
        (OfTheMode, "the gradient of the expected NLL does not reach the 'z_evidence'"),
        (PerExample, "the same draws give different losses"),
        (Sampled, "in closed form they are .* do not estimate them|the same draws give different losses"),
        (NeverHeld, r"where the gates are given, terms\(\) must be their NLL and KLs of weight 0"),
        (Failing, "terms.*fails: KeyError: 'label'"),
    ],
)
def test_what_is_wrong_is_said(elbo, message):
    with pytest.raises(ValueError, match=message):
        check_elbo(elbo)


def test_a_good_one_is_returned_with_its_settings():
    assert check_elbo(Averaged, {"count": 3}).count == 3
    assert isinstance(check_elbo(lambda: Relaxed()), Relaxed)
    with pytest.raises(ValueError, match="estimator 'Averaged': unknown setting 'counts': did you mean 'count'"):
        check_elbo(Averaged, {"counts": 3})


@pytest.mark.parametrize("name", ELBOS.names())
def test_the_packages_own_pass(name):
    check_elbo(name)
