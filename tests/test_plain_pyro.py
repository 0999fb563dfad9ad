"""The program under Pyro's own inference: SVI, its ELBOs, Predictive, traces, relations; and the page that shows it."""

import copy
import re
from pathlib import Path

import pyro
import pytest
import torch
from models import batch, tiny_bert
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.inspect import get_model_relations
from tiny import save_tiny_backbone
from torch.distributions import kl_divergence

from pyro_blora.adapters import attach, calibrate
from pyro_blora.gates import Gates
from pyro_blora.guides import build_guide
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import get_task
from pyro_blora.training.gradients import Gradients
from pyro_blora.weights import build_weights

N_TRAIN = 64  # a power of two: multiplying by it is exact
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "plain-pyro.md").read_text(encoding="utf-8")
PROGRAMS = {
    "relaxed": {},
    "straight-through": {"estimator": "straight_through"},
    "DisARM": {"estimator": "score_function"},
    "mixture": {"guide": "mixture"},
    "point": {"guide": "point", "estimator": "straight_through"},
    "random rates": {"prior": "hierarchical"},
    "random rates of each site": {"prior_settings": {"z": "hierarchical", "g": "hierarchical"}},
    "random weights": {"weights": "gaussian"},
    "random weights of low rank": {"weights": "low_rank"},
    "cold": {"kl_weight": 0.25, "weights": "gaussian"},
}

pytestmark = pytest.mark.usefixtures("eager", "param_store_stays_empty")


def program_of(
    *, prior="nested", prior_settings=None, guide="mean_field", weights="point", estimator="relaxed", kl_weight=1.0
):
    """A small program with dropout, its adapter away from its start and its gates undecided."""
    torch.manual_seed(0)
    net = attach(tiny_bert(), rank=3, sequence_length=10)
    for parameter in net.adapter_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    calibrate(net, [batch()[0]])
    prior = build_prior(prior, net.layout, prior_settings)
    guide = build_guide(guide, net.layout, prior, {"open_logit": 1.0})
    distribution = build_weights(weights, net.random_weights(), dict(enumerate(net.head_parameters())))
    likelihood = get_task("sst2").likelihood
    program = BayesianLoRA(net, prior, guide, likelihood, n_train=N_TRAIN, estimator=estimator, weights=distribution)
    program.kl_weight = kl_weight
    return program.train()


EPS = 1e-4  # of AdamW: far above what slopes that are 0 have from rounding


def learning(program):
    return {name: p for name, p in program.named_parameters() if p.requires_grad}


def svi_of(program, elbo, lr=0.02):
    return SVI(program.model, program.guide, pyro.optim.AdamW({"lr": lr, "eps": EPS * N_TRAIN}), elbo)


# --- SVI --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_ten_steps_of_svi_are_ten_of_training(name):
    """The same draws and AdamW: all that learns moves, to where the loop's gradients take it."""
    program = program_of(**PROGRAMS[name])
    twin, start = copy.deepcopy(program), copy.deepcopy(learning(program))
    svi, gradients = svi_of(program, program.elbo), Gradients(twin, learning(twin).values())
    optimizer = torch.optim.AdamW(learning(twin).values(), lr=0.02, eps=EPS)
    program.temperature = 0.5
    for step in range(10):
        inputs, labels = batch(size=8, seed=step)
        torch.manual_seed(step)
        loss = svi.step(inputs, labels)
        torch.manual_seed(step)
        optimizer.zero_grad()
        parts = gradients(inputs, labels, 0.5, program.kl_weight)
        optimizer.step()
        assert loss / N_TRAIN == pytest.approx(parts[0].item(), rel=1e-5)
    still = [name for name, p in learning(program).items() if torch.equal(p, start[name])]
    assert still == ["log_scale"]  # a classifier has none
    for mine, theirs in zip(learning(program).values(), learning(twin).values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ("DisARM", "mixture")])
def test_the_elbo_is_the_mean_field_one_of_pyro(name, validated):
    """Loss and gradients: with Pyro's validation and without."""
    program, (inputs, labels) = program_of(**PROGRAMS[name]), batch()
    found = []
    for elbo in (program.elbo, TraceMeanField_ELBO()):
        torch.manual_seed(3)
        with pyro.validation_enabled(validated):
            loss = elbo.differentiable_loss(program.model, program.guide, inputs, labels) / N_TRAIN
        slopes = torch.autograd.grad(loss, [*learning(program).values()], allow_unused=True, materialize_grads=True)
        found.append([loss.float(), *slopes])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, RenyiELBO])
def test_an_elbo_that_differentiates_the_density_of_a_soft_draw_is_refused(elbo, validated):
    program, (inputs, labels) = program_of(), batch()
    before = copy.deepcopy(learning(program))
    remedy = r"Use program\.elbo or pyro\.infer\.TraceMeanField_ELBO\(\).*or hard draws: --estimator straight_through"
    with pyro.validation_enabled(validated), pytest.raises(ValueError, match=remedy):
        svi_of(program, elbo()).step(inputs, labels)
    assert all(torch.equal(before[name], p) for name, p in learning(program).items())


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, RenyiELBO])
@pytest.mark.parametrize("estimator", ["straight_through", "score_function"])
def test_elbos_of_pyro_train_all_that_learns_with_hard_draws(elbo, estimator):
    program, (inputs, labels) = program_of(estimator=estimator, prior="hierarchical", weights="gaussian"), batch()
    before, svi = copy.deepcopy(learning(program)), svi_of(program, elbo())
    for seed in range(4):
        torch.manual_seed(seed)
        svi.step(inputs, labels)
    still = [name for name, p in learning(program).items() if torch.equal(before[name], p)]
    assert still == ["log_scale"]


def test_a_guide_whose_ranks_are_allocated_is_refused():
    net = attach(tiny_bert(), rank=3, sequence_length=10)
    prior = build_prior("depth", net.layout, {"z": "off"})
    guide = build_guide("allocated", net.layout, prior)
    program = BayesianLoRA(net, prior, guide, get_task("sst2").likelihood, n_train=N_TRAIN)
    with pytest.raises(ValueError, match=r"the guide Allocated cannot be trained by pyro.infer.SVI.* Use pyro_blora.f"):
        svi_of(program, program.elbo).step(*batch())


def test_svi_says_that_a_budget_does_not_follow_by_itself():
    program = program_of(prior="budget", prior_settings={"bops": 0.3})
    with pytest.warns(UserWarning, match=r"call program\.prior\.adapt"):
        svi_of(program, program.elbo).step(*batch())


# --- traces, predictions, relations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_traces_show_every_latent_site_and_no_parameters(name):
    program, (inputs, labels) = program_of(**PROGRAMS[name]), batch()
    guide = poutine.trace(program.guide).get_trace(inputs, labels)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(inputs, labels)
    found = {site for site in guide.stochastic_nodes if site not in ("z_projection", "z_tensor", "g_projection")}
    more = {"random rates": {"rates", "rate"}, "random rates of each site": {"z_rates", "z_rate", "g_rates", "g_rate"}}
    theta = {"theta"} if program.weights.in_training else set()
    assert found == {"z", "g"} | more.get(name, set()) | theta
    assert {"z", "g", *theta, "label"} <= set(model.nodes) and not guide.param_nodes and not model.param_nodes
    for trace in (guide, model):
        assert bool(torch.isfinite(trace.log_prob_sum()))
    assert ("joint" in guide.nodes) == (name == "mixture")


def test_random_rates_are_a_site_with_their_prior_density():
    program, (inputs, labels) = program_of(prior="hierarchical"), batch()
    guide = poutine.trace(program.guide).get_trace(inputs, labels)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(inputs, labels)
    rates, names = model.nodes["rates"]["value"], program.prior.rate_names
    assert rates.shape == (len(names),) and torch.equal(rates, guide.nodes["rates"]["value"])
    gamma = torch.distributions.Gamma(torch.ones(len(names)), torch.ones(len(names)))
    model.compute_log_prob()
    torch.testing.assert_close(model.nodes["rates"]["log_prob"], gamma.log_prob(rates))
    prior = program.prior.gates_at(rates)
    for site, distribution in zip(("z", "g"), prior, strict=True):
        assert torch.equal(model.nodes[site]["fn"].log_probs, distribution.log_probs)
    torch.manual_seed(0)
    terms = program.terms(inputs, labels)
    torch.manual_seed(0)
    drawn = program.prior.pyro_guide()["rates"]  # the first thing that is drawn
    of_gates = kl_divergence(program.gate_guide.distributions(1.0, False).z, program.prior.gates_at(drawn).z)
    of_rates = kl_divergence(
        *(program.prior.distribution_in_use(distribution) for distribution in ("posterior", "prior"))
    ).sum()
    torch.testing.assert_close(terms.kl_z, of_gates.sum() + of_rates)


@pytest.mark.parametrize("name", PROGRAMS)
def test_predictive_runs_the_network_at_its_draws(name):
    """Whatever singleton dimensions Predictive gives to the sites."""
    program, (inputs, _) = program_of(**PROGRAMS[name]).eval(), batch()
    for guide in (None, program.guide):
        draws = Predictive(program.model, guide=guide, num_samples=3, return_sites=("z", "g", "theta", "label"))(inputs)
        assert draws["label"].numel() == 3 * 4 and draws["z"].numel() == 3 * program.net.layout.z_mask.numel() * 4
    again = Predictive(program.model, posterior_samples=draws, return_sites=("_RETURN",))(inputs)["_RETURN"]
    z, g = (draws[site].reshape(3, *shape) for site, shape in zip("zg", shapes(program), strict=True))
    theta = draws["theta"].flatten(1) if "theta" in draws else [None] * 3
    with torch.no_grad():
        expected = torch.stack([program.logits(inputs, Gates(z[i], g[i]), theta[i]) for i in range(3)])
    torch.testing.assert_close(again.reshape(3, 4, 2), expected)


def shapes(program):
    return program.net.layout.z_shape, program.net.layout.g_shape


def test_relations_of_the_model_are_those_of_the_method():
    program, (inputs, labels) = program_of(prior="hierarchical", weights="gaussian"), batch()
    found = get_model_relations(program.model, (inputs, labels))
    parents = {"theta": [], "rates": [], "z": ["rates"], "g": ["rates"], "label": ["theta", "z", "g"]}
    assert found["sample_sample"] == parents and found["observed"] == ["label"]
    assert found["sample_dist"]["z"] == "NestedBernoulli" and found["sample_dist"]["rates"] == "Gamma"
    assert found["plate_sample"] == {
        "rate": ["rates"], "z_projection": ["z"], "z_tensor": ["z"], "g_projection": ["g"], "example": ["label"],
    }  # fmt: skip


def test_the_model_is_drawn_as_a_graph():
    pytest.importorskip("graphviz", reason="graphviz is not installed: the relations are tested above")
    graph = pyro.render_model(program_of(prior="hierarchical").model, model_args=batch(), render_distributions=True)
    assert all(f"rates -> {site}" in graph.source and f"{site} -> label" in graph.source for site in "zg")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_lines_of_the_page_train(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip() and "import" not in line]) <= 20
    backbone = save_tiny_backbone(tmp_path)
    for old, new in {'"demo"': repr(str(backbone)), "max_train=256": "max_train=128, max_length=32"}.items():
        assert old in block
        block = block.replace(old, new)
    losses, line = [], "        loss = svi.step(inputs, labels) / program.n_train"
    assert line in block
    seen = {"losses": losses}
    torch.manual_seed(0)
    exec(block.replace(line, f"{line}; losses.append(loss)"), seen)
    assert len(losses) == 3 * 4 and sum(losses[-4:]) < sum(losses[:4])
    assert seen["z"].shape == seen["program"].net.layout.z_shape and seen["answers"].numel() == 10 * 32


def test_the_page_names_every_estimator_and_site():
    for name in ("relaxed", "straight_through", "score_function", "enumerate", "z", "g", "label", "theta", "joint"):
        assert f"`{name}`" in PAGE
