"""Every registered prior and guide keeps the contract, and gives the answers that are known by hand."""

import math

import pytest
import torch
from contracts import BY_NAME, LEARNING, check_guide, masks
from torch import nn
from torch.distributions import kl_divergence

from pyro_blora.bops import expected_bits, expected_bops, expected_rank
from pyro_blora.gates import Gates, NestedBernoulli
from pyro_blora.guides import GUIDES, MeanField, build_guide, register_guide
from pyro_blora.layout import LADDER
from pyro_blora.priors import PRIORS, build_prior, register_prior
from pyro_blora.testing import check_prior

OWN = '''
import torch

from pyro_blora.gates import Gates, NestedBernoulli
from pyro_blora.guides import MeanField


def late_layers(layout, *, rate: float = 2.0):
    """Later layers pay less."""
    layer = torch.tensor([p.layer for p in layout.projections])
    z = (rate / (1 + layer))[:, None, None].expand(layout.z_shape)
    return Gates(NestedBernoulli.from_rate(z), NestedBernoulli.from_rate(torch.full(layout.g_shape, rate)))


def cautious(layout, prior, *, logit: float = 2.0):
    return MeanField(layout, prior, logit)
'''


@pytest.fixture
def own_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_a_registered_prior_keeps_the_contract(name, layout):
    check_prior(name, layout)


@pytest.mark.parametrize("prior", BY_NAME)
@pytest.mark.parametrize("name", LEARNING)
def test_a_registered_guide_keeps_the_contract_under_every_prior(name, prior, layout):
    check_guide(name, layout, prior)


@pytest.mark.parametrize("name", sorted(set(GUIDES.names()) - set(LEARNING)))
def test_a_guide_that_learns_nothing_keeps_the_rest_of_the_contract(name, layout):
    if name == "allocated" and layout.rank == 1:
        pytest.skip("there is no rank to allocate")
    check_guide(name, layout, "depth", prior_settings={"z": "off"})


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 1e-6}, {"rate": 300.0}, {"rate": 1.0, "rank_rate": 0.0}])
@pytest.mark.parametrize("prior", ["nested", "bops"])
@pytest.mark.parametrize("guide", LEARNING)
def test_extreme_rates_keep_the_contract(guide, prior, settings, layout):
    check_prior(prior, layout, settings)
    check_guide(guide, layout, prior, prior_settings=settings)


@pytest.mark.parametrize("bits", LADDER)
@pytest.mark.parametrize("guide", LEARNING)
def test_every_fixed_width_and_rank_keeps_the_contract(guide, bits, layout):
    for rank in (1, layout.rank):
        check_guide(guide, layout, "fixed", prior_settings={"bits": bits, "rank": rank})


def test_a_prior_and_a_guide_from_a_file_keep_the_contract(own_file, layout):
    check_prior(f"{own_file}:late_layers", layout, {"rate": 1.5})
    check_guide(f"{own_file}:cautious", layout, f"{own_file}:late_layers", {"logit": 1.0})


def test_a_prior_and_a_guide_from_the_decorator_keep_the_contract(forget, layout):
    @register_prior("halves")
    def halves(layout):
        half = math.log(2)
        z, g = torch.full(layout.z_shape, half), torch.full(layout.g_shape, half)
        return Gates(NestedBernoulli.from_rate(z), NestedBernoulli.from_rate(g))

    @register_guide("undecided")
    def undecided(layout, prior):
        return MeanField(layout, prior, 0.0)

    check_prior("halves", layout)
    for guide in LEARNING:
        check_guide(guide, layout, "halves")
    for prior in BY_NAME:
        check_guide("undecided", layout, prior)


def test_a_prior_that_learns_is_a_module(forget, layout):
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_rate = nn.Parameter(torch.zeros(()))

        def forward(self):
            z, g = (self.log_rate.exp().expand(shape) for shape in (layout.z_shape, layout.g_shape))
            return Gates(NestedBernoulli(-z, validate_args=False), NestedBernoulli(-g, validate_args=False))

    @register_prior("learned")
    def learned(layout):
        return Learned()

    check_prior("learned", layout)
    prior = build_prior("learned", layout)
    guide = build_guide("mean_field", layout, prior)
    kl_divergence(guide.distributions(0.5, True).z, prior().z).sum().backward()
    assert prior.log_rate.grad != 0
    for name in LEARNING:
        check_guide(name, layout, "learned")


def test_the_tables_of_a_prior_are_whole_in_memory(layout):
    """Also those of views: processes exchange no strides."""

    def same(layout):
        return Gates(*(NestedBernoulli(torch.tensor(-1.0).expand(shape)) for shape in (layout.z_shape, layout.g_shape)))

    prior = build_prior(same, layout)
    assert all(buffer.is_contiguous() and bool((buffer == -1).all()) for buffer in prior.buffers())


# --- known answers ----------------------------------------------------------------------------------------------------


def test_nested_opens_each_gate_with_the_exponential_of_minus_its_rate(layout):
    prior = build_prior("nested", layout, {"rate": 0.7, "rank_rate": 0.2})()
    for distribution, rate in zip(prior, (0.7, 0.2), strict=True):
        gates = torch.arange(1, distribution.event_shape[0] + 1)
        torch.testing.assert_close(distribution.mean, torch.exp(-rate * gates).expand(distribution.mean.shape))


def test_a_rank_costs_a_tenth_of_a_rung_unless_said_otherwise(layout):
    prior = build_prior("nested", layout, {"rate": 3.0})()
    assert torch.equal(prior.z.log_probs, torch.full(layout.z_shape, -3.0))
    torch.testing.assert_close(prior.g.log_probs, torch.full(layout.g_shape, -0.3))


def test_bops_rungs_cost_in_the_ratio_of_the_bits_they_add(layout):
    rates = -build_prior("bops", layout, {"rate": 0.5})().z.log_probs
    exists = layout.z_mask
    ratios = rates[exists] / rates[exists][:, :1]
    torch.testing.assert_close(ratios, torch.tensor([1.0, 2.0, 4.0, 8.0]).expand(ratios.shape))
    dearest = rates.flatten(0, 1).max(0).values
    torch.testing.assert_close(dearest, 0.5 * torch.tensor([2.0, 4.0, 8.0, 16.0]))


def test_bops_rates_are_proportional_to_the_bit_operations_a_gate_adds(layout):
    """One constant for every bit gate and every rank gate: rate / added BOPs, everything else open."""
    prior = build_prior("bops", layout, {"rate": 2.0})()
    z, g = torch.ones(layout.z_shape), torch.ones(layout.g_shape)
    constants = []
    for index in masks(layout).z.nonzero().tolist():
        at, without = z.clone(), z.clone()
        at[index[0], index[1], index[2] + 1 :] = 0
        without[index[0], index[1], index[2] :] = 0
        added = expected_bops(layout, at, g).adapted.item() + expected_bops(layout, at, g).model.item()
        added -= expected_bops(layout, without, g).adapted.item() + expected_bops(layout, without, g).model.item()
        if not layout.projections[index[0]].adapted:
            added *= 2  # it is in `model` only
        constants.append(-prior.z.log_probs[tuple(index)].item() / added)
    for row, rank in masks(layout).g.nonzero().tolist():
        at, without = g.clone(), g.clone()
        at[row, rank + 1 :] = 0
        without[row, rank:] = 0
        added = expected_bops(layout, z, at).adapted.item() - expected_bops(layout, z, without).adapted.item()
        constants.append(-prior.g.log_probs[row, rank].item() / (2 * added))
    assert constants == pytest.approx([constants[0]] * len(constants), rel=1e-5)
    assert len(constants) == int(masks(layout).z.sum() + masks(layout).g.sum())


def test_fixed_pins_the_named_width_and_rank(layout):
    for bits in LADDER:
        for rank in range(1, layout.rank + 1):
            prior = build_prior("fixed", layout, {"bits": bits, "rank": rank})
            for distribution in (prior(), build_guide("mean_field", layout, prior).posterior()):
                assert bool((expected_bits(layout, distribution.z.mean)[layout.z_mask] == bits).all())
                assert bool((expected_rank(distribution.g.mean)[layout.g_mask] == rank).all())
                assert distribution.z.entropy().sum() == 0
            assert torch.equal(expected_bits(layout, prior().z.mean), torch.full(layout.z_shape[:2], float(bits)))
            assert torch.equal(expected_rank(prior().g.mean), torch.full(layout.g_shape[:1], float(rank)))


def test_fixed_is_plain_lora_by_default(layout):
    prior = build_prior("fixed", layout)()
    bops = expected_bops(layout, prior.z.mean, prior.g.mean)
    assert bops.adapted_ratio == 1 and bops.model_ratio == 1


@pytest.mark.parametrize("prior", BY_NAME)
@pytest.mark.parametrize("guide", LEARNING)
def test_chains_that_do_not_exist_are_open_whatever_the_prior_says(guide, prior, layout):
    guide = build_guide(guide, layout, build_prior(prior, layout))
    for distribution, mask in zip(guide.posterior(), (layout.z_mask, layout.g_mask), strict=True):
        assert bool((distribution.log_probs[~mask] == 0).all())
    closed = build_guide("mean_field", layout, build_prior("fixed", layout, {"bits": 2, "rank": 1})).posterior()
    for distribution, exists in zip(closed, masks(layout), strict=True):
        assert torch.equal(distribution.mean, (~exists).float())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nested", "bops"])
@pytest.mark.parametrize("setting", ["rate", "rank_rate"])
@pytest.mark.parametrize("value", [-1.0, float("inf")])
def test_a_rate_that_is_no_finite_number_of_nats_is_refused(name, setting, value, layout):
    with pytest.raises(ValueError, match=f"^{setting} must be a finite number >= 0"):
        build_prior(name, layout, {setting: value})


@pytest.mark.parametrize("name", ["nested", "bops"])
def test_a_rate_that_is_nan_is_refused(name, layout):
    with pytest.raises(ValueError, match="rate must be a"):
        build_prior(name, layout, {"rate": float("nan")})
    with pytest.raises(ValueError, match="rate must be a finite number >= 0"):
        PRIORS.resolve(name)(layout, rate=float("nan"))


@pytest.mark.parametrize("bits", [0, 1, 3, 64])
def test_a_width_off_the_ladder_is_refused(bits, layout):
    with pytest.raises(ValueError, match=f"bits must be one of 2, 4, 8, 16, 32, got {bits}"):
        build_prior("fixed", layout, {"bits": bits})


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_fixed_rank_out_of_range_is_refused(rank, layout):
    with pytest.raises(ValueError, match=f"rank must be from 1 to the adapter's rank {layout.rank}, got {rank}"):
        build_prior("fixed", layout, {"rank": rank})


def test_unknown_names_and_settings_are_answered_with_the_nearest(layout):
    prior = build_prior("nested", layout)
    with pytest.raises(ValueError, match="unknown prior 'bop': did you mean 'bops'"):
        build_prior("bop", layout)
    with pytest.raises(ValueError, match="unknown setting 'rat': did you mean 'rate'"):
        build_prior("bops", layout, {"rat": 1.0})
    with pytest.raises(ValueError, match="unknown guide 'meanfield': did you mean 'mean_field'"):
        build_guide("meanfield", layout, prior)
    with pytest.raises(ValueError, match="unknown setting 'open_logits': did you mean 'open_logit'"):
        build_guide("mean_field", layout, prior, {"open_logits": 1.0})


def wrong_priors():
    def distribution(shape, log_prob=-1.0):
        return NestedBernoulli(torch.full(shape, log_prob), validate_args=False)

    return {
        "must return": lambda layout: distribution(layout.z_shape),
        "z must be a NestedBernoulli, got Bernoulli": lambda layout: Gates(
            torch.distributions.Bernoulli(torch.full(layout.z_shape, 0.5)), distribution(layout.g_shape)
        ),
        "g has shape": lambda layout: Gates(distribution(layout.z_shape), distribution((*layout.g_shape, 1))),
        "z has shape": lambda layout: Gates(distribution(layout.z_shape[1:]), distribution(layout.g_shape)),
        "must be <= 0": lambda layout: Gates(distribution(layout.z_shape, float("nan")), distribution(layout.g_shape)),
    }


@pytest.mark.parametrize("message", wrong_priors())
def test_a_prior_of_the_wrong_kind_is_refused(message, forget, layout):
    register_prior("wrong")(wrong_priors()[message])
    with pytest.raises(ValueError, match=f"prior 'wrong'.*{message}"):
        build_prior("wrong", layout)


def test_a_guide_without_its_methods_is_refused(forget, layout):
    register_guide("wrong")(lambda layout, prior: nn.Identity())
    with pytest.raises(
        ValueError, match=r"guide 'wrong' must return an nn.Module .* missing: \['distributions', 'posterior'\]"
    ):
        build_guide("wrong", layout, build_prior("nested", layout))
