"""The program is the ELBO that Pyro computes from it."""

import copy
import dataclasses

import pyro.distributions as dist
import pytest
import torch
from contracts import BY_NAME, LEARNING
from models import batch, tiny_bert
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from pyro_blora import adapters
from pyro_blora.adapters import attach, calibrate
from pyro_blora.elbos import Terms
from pyro_blora.elbos.divergences import closed_form_kl
from pyro_blora.gates import Gates, NestedBernoulli
from pyro_blora.guides import build_guide
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import get_task

N_TRAIN = 50
SUMS = [name for name in LEARNING if name != "mixture"]  # guides whose KL is a sum over chains

pytestmark = pytest.mark.usefixtures("eager", "param_store_stays_empty")


def program_of(
    *, prior="nested", guide="mean_field", task="sst2", scope="encoder", logit=1.0, rank=3, estimator="straight_through"
):
    """A small program in evaluation mode, its lora_B away from zero and its gates undecided."""
    task = get_task(task)
    net = attach(tiny_bert(num_labels=task.num_labels), rank=rank, sequence_length=10, scope=scope)
    torch.manual_seed(7)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    calibrate(net, [batch()[0]])
    prior = build_prior(prior, net.layout)
    guide = build_guide(guide, net.layout, prior, {"open_logit": logit})
    return BayesianLoRA(net, prior, guide, task.likelihood, n_train=N_TRAIN, estimator=estimator).eval()


def pyro_loss(program, inputs, labels):
    return TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, inputs, labels) / program.n_train


def learning(program):
    return [p for p in program.parameters() if p.requires_grad]


# --- the ELBO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", SUMS)
@pytest.mark.parametrize("prior", BY_NAME)
@pytest.mark.parametrize("task", ["sst2", "stsb"])
@pytest.mark.parametrize("estimator", ["straight_through", "relaxed"])
def test_elbo_equals_that_of_pyro(task, prior, guide, estimator):
    program = program_of(task=task, prior=prior, guide=guide, estimator=estimator)
    inputs, labels = batch(num_labels=program.net.peft_model.config.num_labels)
    torch.manual_seed(3)
    ours = program.terms(inputs, labels).loss
    torch.manual_seed(3)
    theirs = pyro_loss(program, inputs, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    slopes = [torch.autograd.grad(loss, learning(program), materialize_grads=True, allow_unused=True)
              for loss in (ours, theirs)]  # fmt: skip
    for slope, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(slope, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed"])
def test_the_nll_of_a_mixture_is_the_mean_over_a_draw_of_each_component(estimator):
    """Its KL is that of the joint distribution, which is no sum over sites: test_guides.py."""
    program, (inputs, labels) = program_of(guide="mixture", estimator=estimator), batch()
    torch.manual_seed(3)
    terms = program.terms(inputs, labels)
    torch.manual_seed(3)
    nlls = []
    for distributions in program.gate_guide.each_component(program.temperature, estimator == "straight_through"):
        gates = {site: distribution.rsample() for site, distribution in zip(("z", "g"), distributions, strict=True)}
        model = poutine.trace(poutine.condition(program.model, data=gates)).get_trace(inputs, labels)
        model.compute_log_prob()
        nlls.append(-model.nodes["label"]["log_prob_sum"] / N_TRAIN)
    torch.testing.assert_close(terms.nll, torch.stack(nlls).mean())
    slope = torch.autograd.grad(terms.nll, program.gate_guide.z_evidence)[0]
    assert len(nlls) == 4 and bool(slope.flatten(1).any(-1).all())  # every component learns at every step


def test_sites_and_plates_are_those_of_the_method():
    program, (inputs, labels) = program_of(), batch()
    L, T, K = program.net.layout.z_shape
    guide = poutine.trace(program.guide).get_trace(inputs, labels)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(inputs, labels)
    for trace in (guide, model):
        assert trace.nodes["z"]["value"].shape == (L, T, K) == (12, 5, 4)
        assert trace.nodes["g"]["value"].shape == (L, 2)
        frames = {site: [(f.name, f.size, f.dim) for f in trace.nodes[site]["cond_indep_stack"]] for site in "zg"}
        assert sorted(frames["z"]) == [("z_projection", L, -2), ("z_tensor", T, -1)]
        assert frames["g"] == [("g_projection", L, -1)]
        assert trace.nodes["z"]["scale"] == trace.nodes["g"]["scale"] == 1
        assert torch.equal(trace.nodes["z"]["mask"], program.net.layout.z_mask)
        assert torch.equal(trace.nodes["g"]["mask"], program.net.layout.g_mask)
    assert set(guide.stochastic_nodes) - {"z_projection", "z_tensor", "g_projection"} == {"z", "g"}
    label = model.nodes["label"]
    assert label["is_observed"] and torch.equal(label["value"], labels)
    assert label["scale"] == N_TRAIN / len(labels)
    assert label["fn"].batch_shape == (len(labels),)


def test_the_loss_weighs_the_kl_per_example():
    terms = Terms(torch.tensor(0.5), torch.tensor(20.0), torch.tensor(5.0), 0.0, 100)
    assert terms.loss == 0.75
    cold, held = (dataclasses.replace(terms, gate_weight=weight) for weight in (0.2, 0.0))
    assert cold.loss == pytest.approx(0.55) and held.loss == 0.5


def test_forward_returns_the_loss_at_its_temperature_and_weight():
    program, (inputs, labels) = program_of(), batch()
    torch.manual_seed(0)
    loss, terms = program(inputs, labels, 0.3, 0.25)
    assert program.temperature == 0.3 and program.guide(inputs).z.shape == program.net.layout.z_shape
    torch.testing.assert_close(loss, terms.nll + 0.25 * (terms.kl_z + terms.kl_g) / N_TRAIN)
    torch.manual_seed(0)
    hotter, _ = program(inputs, labels, 3.0, 0.25)
    torch.testing.assert_close(loss, hotter)  # the value of a hard draw does not depend on the temperature
    slopes = [torch.autograd.grad(v, program.gate_guide.z_evidence)[0] for v in (loss, hotter)]
    assert not torch.allclose(*slopes)


def test_the_loss_of_training_is_that_of_its_elbo_over_n():
    program, (inputs, labels) = program_of(estimator="relaxed"), batch()
    torch.manual_seed(0)
    loss, _ = program(inputs, labels, 0.3, 0.25)
    torch.manual_seed(0)
    theirs = program.elbo.differentiable_loss(program.model, program.guide, inputs, labels) / program.n_train
    assert loss == theirs.float()


def test_gates_are_held_open_before_they_start():
    program, (inputs, labels) = program_of(estimator="relaxed"), batch()
    loss, terms = program(inputs, labels, 0.3, held="open")
    opened = Gates(*adapters.open_gates(program.net.layout))
    assert torch.equal(loss, program.nll(inputs, labels, *opened)) and torch.equal(loss, terms.nll)
    assert terms.kl_z == program.kl().z > 0  # for the log
    (slope,) = torch.autograd.grad(loss, program.gate_guide.z_evidence)
    assert not bool(slope.any())


def test_gates_that_do_not_exist_cost_nothing():
    program, (inputs, labels) = program_of(), batch()
    before = program.terms(inputs, labels)
    with torch.no_grad():
        program.gate_guide.z_evidence[:, ~program.z_mask] = -5.0
        program.gate_guide.g_evidence[:, ~program.g_mask] = -5.0
    after = program.terms(inputs, labels)
    assert before.kl_z == after.kl_z > 0 and before.kl_g == after.kl_g > 0
    slopes = torch.autograd.grad(after.loss, [program.gate_guide.z_evidence, program.gate_guide.g_evidence])
    for slope, mask in zip(slopes, (program.z_mask, program.g_mask), strict=True):
        assert bool((slope[:, ~mask] == 0).all()) and bool((slope[:, mask] != 0).any())


def test_nothing_is_random_under_a_fixed_prior():
    program, (inputs, labels) = program_of(prior="fixed"), batch()
    first, second = program.terms(inputs, labels), program.terms(inputs, labels)
    assert first == second and first.kl_z == 0 and first.kl_g == 0
    with torch.no_grad(), adapters.gates(program.net, *adapters.open_gates(program.net.layout)):
        logits = program.net(**inputs).logits
    torch.testing.assert_close(first.nll, torch.nn.functional.cross_entropy(logits, labels))


def test_regression_is_a_normal_with_a_learned_scale():
    program = program_of(task="stsb", prior="fixed")
    inputs, _ = batch(num_labels=1)
    labels = torch.tensor([0.0, 1.5, 5.0, 3.0])
    with torch.no_grad():
        program.log_scale.fill_(0.4)
        with adapters.gates(program.net, *adapters.open_gates(program.net.layout)):
            mean = 2.5 + 2.5 * program.net(**inputs).logits[:, 0]
    nll = program.terms(inputs, labels).nll
    torch.testing.assert_close(nll, -dist.Normal(mean, torch.tensor(0.4).exp()).log_prob(labels).mean())
    (slope,) = torch.autograd.grad(nll, program.log_scale)
    torch.testing.assert_close(slope, 1 - ((labels - mean) ** 2).mean() * torch.tensor(-0.8).exp())


def test_labels_are_drawn_where_none_are_given():
    inputs, _ = batch()
    trace = poutine.trace(program_of().model).get_trace(inputs)
    assert trace.nodes["label"]["value"].shape == (4,) and not trace.nodes["label"]["is_observed"]


def test_a_pair_without_a_closed_form_kl_is_refused():
    program = program_of()
    layout = program.net.layout

    class Naive(torch.nn.Module):
        """Pyro's relaxed Bernoulli against our mass: a density against a probability, not an ELBO."""

        def distributions(self, temperature, hard):
            temperature = torch.tensor(temperature)
            return Gates(*(dist.RelaxedBernoulliStraightThrough(temperature, logits=torch.zeros(shape)).to_event(1)
                           for shape in (layout.z_shape, layout.g_shape)))  # fmt: skip

    with pytest.raises(ValueError, match=r"site 'z': no KL divergence is registered .* NestedBernoulli"):
        BayesianLoRA(program.net, program.prior, Naive(), program.likelihood, n_train=N_TRAIN)
    with pytest.raises(ValueError, match="site 'g': no KL"):
        closed_form_kl("g", Naive().distributions(0.5, True).g, program.prior().g)


def test_deep_copies_learn_apart():
    program, (inputs, labels) = program_of(), batch()
    twin = copy.deepcopy(program)
    with torch.no_grad():
        for parameter in learning(twin):
            parameter.add_(0.1)
    torch.manual_seed(0)
    ours = program.terms(inputs, labels).nll
    torch.manual_seed(0)
    assert twin.terms(inputs, labels).nll != ours


class TwoFreeChains(torch.nn.Module):
    """Only the input and the base weight of one projection are random: 25 states."""

    def __init__(self, layout):
        super().__init__()
        z = torch.zeros(layout.z_shape)
        z[0, :2] = -0.4
        self.register_buffer("z", z)
        self.register_buffer("g", torch.zeros(layout.g_shape))

    def forward(self):
        return Gates(NestedBernoulli(self.z, validate_args=False), NestedBernoulli(self.g, validate_args=False))


def test_the_mean_of_many_estimates_is_the_enumerated_elbo():
    net = attach(tiny_bert(), rank=2, sequence_length=10, target_modules=r".*layer\.1\..*value")
    calibrate(net, [batch()[0]])
    prior, task = TwoFreeChains(net.layout), get_task("sst2")
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": 0.5})
    program = BayesianLoRA(net, prior, guide, task.likelihood, n_train=4, estimator="straight_through").eval()
    inputs, labels = batch()
    q, p = guide.posterior().z, prior().z
    exact, states = 0.0, q.enumerate_support()[:, 0, 0]  # (5, K)
    with torch.no_grad():
        for a in states:
            for b in states:
                z, g = adapters.open_gates(net.layout)
                z[0, 0], z[0, 1] = a, b
                with adapters.gates(net, z, g):
                    nll = torch.nn.functional.cross_entropy(net(**inputs).logits, labels)
                log_q, log_p = q.log_prob(z).sum(), p.log_prob(z).sum()
                exact += (log_q.exp() * (nll + (log_q - log_p) / 4)).item()
        torch.manual_seed(0)
        draws = torch.stack([program.terms(inputs, labels).loss for _ in range(800)])
        enumerated = BayesianLoRA(net, prior, guide, task.likelihood, n_train=4, estimator="enumerate").eval()
        assert enumerated.terms(inputs, labels).loss.item() == pytest.approx(exact, rel=1e-5)
    error = draws.std().item() / 800**0.5
    assert error > 0 and abs(draws.mean().item() - exact) < 4 * error


# --- inference --------------------------------------------------------------------------------------------------------


def trained(program, step):
    """The mean loss of 10 draws before and after 30 steps on one batch."""
    inputs, labels = batch(size=8)

    def mean_loss():
        with torch.no_grad():
            torch.manual_seed(11)
            return sum(program.terms(inputs, labels).loss.item() for _ in range(10)) / 10

    before = mean_loss()
    torch.manual_seed(0)
    for _ in range(30):
        step(inputs, labels)
    return before, mean_loss()


def test_svi_of_pyro_lowers_the_loss():
    program = program_of(scope="adapted")
    optimizer = torch.optim.Adam(learning(program), lr=0.02)

    def step(inputs, labels):
        optimizer.zero_grad()
        pyro_loss(program, inputs, labels).backward()
        optimizer.step()

    before, after = trained(program, step)
    assert after < 0.8 * before


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed", "score_function"])
def test_our_loss_trains_adapters_gates_and_ranges(estimator):
    program = program_of(scope="adapted", estimator=estimator)
    optimizer = torch.optim.Adam(learning(program), lr=0.02)
    start = [p.detach().clone() for p in learning(program)]

    def step(inputs, labels):
        optimizer.zero_grad()
        program(inputs, labels, 0.5)[0].backward()
        optimizer.step()

    before, after = trained(program, step)
    assert after < 0.8 * before
    names = [name for name, p in program.named_parameters() if p.requires_grad]
    unmoved = [name for name, p, old in zip(names, learning(program), start, strict=True) if torch.equal(p, old)]
    assert unmoved == ["log_scale"]  # a classifier has none


def test_without_data_gates_return_to_their_prior():
    program = program_of(prior="bops", scope="encoder", logit=3.0)
    optimizer = torch.optim.Adam(program.gate_guide.parameters(), lr=0.1)
    prior = program.prior()
    for _ in range(500):
        distributions = program.gate_guide.distributions(0.5, True)
        loss = sum(
            torch.where(mask, torch.distributions.kl_divergence(q, p), 0.0).sum()
            for q, p, mask in zip(distributions, prior, (program.z_mask, program.g_mask), strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for q, p, mask in zip(program.gate_guide.posterior(), prior, (program.z_mask, program.g_mask), strict=True):
        assert bool((q.mean - p.mean).abs()[mask].max() < 0.02)
