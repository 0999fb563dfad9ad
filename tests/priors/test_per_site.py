"""Priors of one site each: what is named for z says z, what is named for g says g, and each still adapts or learns."""

import copy

import pytest
import torch
from pyro import poutine
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.bops import expected_bops
from pyro_blora.build import check_names
from pyro_blora.gates import Gates
from pyro_blora.posterior import bops, draw
from pyro_blora.priors import build_prior
from pyro_blora.testing import check_prior, example_layout
from pyro_blora.training import fit

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def layout():
    return example_layout()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def same(distribution, other):
    return torch.equal(distribution.log_probs, other.log_probs)


def test_each_site_has_the_law_that_is_named_for_it(layout):
    mixed = build_prior("nested", layout, {"z": "bops", "z.rate": 3, "g": "depth"})()
    assert same(mixed.z, build_prior("bops", layout, {"rate": 3})().z)
    assert same(mixed.g, build_prior("depth", layout)().g)


def test_a_site_that_is_not_named_keeps_the_prior_and_its_settings(layout):
    mixed = build_prior("nested", layout, {"rate": 2.0, "g": "depth"})()
    assert same(mixed.z, build_prior("nested", layout, {"rate": 2.0})().z)
    assert same(mixed.g, build_prior("depth", layout)().g)


@pytest.mark.parametrize(("site", "other"), [("z", "g"), ("g", "z")])
def test_off_opens_every_gate_of_a_site_for_good(layout, site, other):
    distributions = build_prior("nested", layout, {site: "off"})()
    assert bool((getattr(distributions, site).log_probs == 0).all())
    assert same(getattr(distributions, other), getattr(build_prior("nested", layout)(), other))


@pytest.mark.parametrize(
    "settings",
    [
        {"z": "budget", "z.bops": 0.4, "g": "off"},
        {"z": "off", "g": "hierarchical"},
        {"z": "hierarchical", "g": "eva"},
        {"z": "budget", "z.bops": 0.4, "g": "hierarchical"},
        {"z": "depth", "g": "fixed", "g.rank": 2},
    ],
)
def test_every_pair_keeps_the_contract(layout, settings):
    check_prior("nested", layout, settings)


def test_a_budget_of_the_bits_is_followed_with_the_ranks_as_they_are(layout):
    prior = build_prior("nested", layout, {"z": "budget", "z.bops": 0.4, "g": "fixed", "g.rank": 2})
    for _ in range(200):
        distributions = prior()
        prior.adapt(Gates(*(distribution.mean[None] for distribution in distributions)))
    ratio = expected_bops(layout, *(distribution.mean for distribution in prior())).adapted_ratio
    assert ratio.item() == pytest.approx(0.4, rel=1e-3)
    assert set(prior.report()) == {"z_rate"}


def test_only_what_a_part_can_do_is_offered(layout):
    plain = build_prior("nested", layout, {"g": "depth"})
    assert not (plain.adapts or plain.explains or plain.pyro_guide() or plain.rate_parts() or plain.report())
    learned = copy.deepcopy(build_prior("nested", layout, {"g": "hierarchical"}))
    assert not learned.adapts and set(learned.pyro_guide()) == {"g_rates"} and list(learned.rate_parts()) == ["g"]
    torch.manual_seed(0)
    first, second = (poutine.condition(learned.pyro_model, data=learned.pyro_guide())() for _ in range(2))
    assert same(first.z, second.z) and not same(first.g, second.g)
    many = learned.sample_prior(7)
    assert many.z.sample().shape == (7, *layout.z_shape) and many.g.sample().shape == (7, *layout.g_shape)
    whole = build_prior("hierarchical", layout)
    tensors = len(layout.tensors)
    assert learned.pyro_guide()["g_rates"].shape == (len(whole.rate_names) - tensors,)  # of the ranks' rates only
    both = build_prior("nested", layout, {"z": "hierarchical", "g": "hierarchical"}).pyro_guide()
    ranks = len(whole.rate_names) - tensors
    assert {name: len(rates) for name, rates in both.items()} == {"z_rates": tensors, "g_rates": ranks}
    assert learned.report() and all(name.startswith("g_rate_rank_") for name in learned.report())
    assert not build_prior("nested", layout, {"z": "eva"}).report()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"g": "dept"}, "unknown prior 'dept': did you mean 'depth'"),
        ({"g": "depth", "g.rate": 1}, "prior 'depth': unknown setting 'rate'"),
        ({"g.rate": 1}, "'g.rate' belongs to no prior here: name one with --prior.g NAME"),
        ({"z": "bops", "g": "depth", "rate": 1}, "'rate' belongs to no prior here: z and g have priors of their own"),
        ({"z": "off", "z.bits": 8}, "'z.bits' belongs to no prior here"),
    ],
)
def test_a_wrong_pair_is_refused_before_anything_is_loaded(layout, backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        build_prior("nested", layout, settings)
    with pytest.raises(ValueError, match=message):
        check_names(tiny_config(backbone, prior="nested", prior_settings=settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"z": "budget", "g": "budget"}, "cannot both have prior 'budget'"),
        ({"z": "off", "g": "budget", "g.bops": 0.3}, "bops must be between"),
    ],
)
def test_a_budget_that_the_site_cannot_reach_is_refused(layout, settings, message):
    with pytest.raises(ValueError, match=message):
        build_prior("nested", layout, settings)


def test_a_run_without_rank_gates_keeps_every_rank_and_closes_bits(backbone):
    config = tiny_config(backbone, prior="bops", prior_settings={"rate": 50.0, "g": "off"})
    program = fit(config, quiet=True).program
    z, g = draw(program, 4)
    assert bool((g == 1).all()) and bool((z == 0).any())
    assert bops(program).adapted_ratio < 0.5


# --- eva --------------------------------------------------------------------------------------------------------------


def test_eva_gives_even_odds_at_the_cut_and_their_ratio_elsewhere(layout):
    prior = build_prior("eva", layout, {"strength": 2.0, "share": 0.25})
    assert bool((prior.log_odds == 0).all())
    L, ranks = len(layout.projections), layout.rank
    ratios = torch.rand(L, ranks).sort(-1, descending=True).values / ranks
    prior.explain(ratios)
    rows = layout.g_mask.nonzero().flatten()
    kept = sorted(ratios[rows].flatten().tolist(), reverse=True)[: int(0.25 * len(rows) * ranks)]
    p = prior().g.log_probs.exp()[rows]
    opened = (p >= 0.5 - 1e-6) == (ratios[rows, 1:] >= kept[-1] - 1e-6)
    assert opened.float().mean() > 0.9  # the quantile lies between two components
    odds = torch.logit(p)
    torch.testing.assert_close(odds[:, 0] - odds[:, 1], 2 * (ratios[rows, 1] / ratios[rows, 2]).log(), atol=1e-4,
                               rtol=1e-4)  # fmt: skip


def test_eva_is_the_variance_of_the_training_inputs_and_is_found_again(backbone, tmp_path):
    config = tiny_config(backbone, prior="eva", checkpoint_steps=2)
    whole = fit(config, quiet=True)
    assert whole.program.prior.log_odds.std() > 0.1
    fit(config, quiet=True, folder=tmp_path, until=5)
    resumed = fit(config, quiet=True, folder=tmp_path)
    for key, value in whole.program.state_dict().items():
        assert torch.equal(value, resumed.program.state_dict()[key]), key


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"strength": -1.0}, {"share": 0.0}, {"share": 1.5}])
def test_eva_refuses_settings_that_mean_nothing(layout, settings):
    with pytest.raises(ValueError, match="strength must be > 0 and share in"):
        build_prior("eva", layout, settings)


def test_depth_gives_every_width_and_every_rank_the_same_probability(layout):
    for distribution in build_prior("depth", layout)():
        torch.testing.assert_close(
            distribution.depth_probs, torch.full_like(distribution.depth_probs, 1 / distribution.depth_probs.shape[-1])
        )
