"""Predictions averaged over draws, and what is said about them, against numbers computed by hand."""

import math

import pytest
import torch
from models import batch, tiny_bert

from pyro_blora import attach, draw, predict
from pyro_blora.adapters import clipped, gate_context
from pyro_blora.gates import Gates
from pyro_blora.guides import build_guide
from pyro_blora.posterior import Prediction, deployed, divergences, marginals, mean_kl
from pyro_blora.posterior.draws import draws_vary, seeded
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import get_task
from pyro_blora.tasks.categorical import Categorical


def program(prior="nested", task="sst2", guide="mean_field", scope="adapted", **settings):
    torch.manual_seed(0)
    net = attach(tiny_bert(num_labels=get_task(task).num_labels), rank=4, scope=scope, sequence_length=16)
    distribution = build_prior(prior, net.layout, settings)
    guide = build_guide(guide, net.layout, distribution, {} if guide == "uniform_rank" else {"open_logit": 0.5})
    return BayesianLoRA(net, distribution, guide, get_task(task).likelihood, n_train=100).eval()


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
def test_draws_have_the_exact_marginals_and_leave_the_generator_alone(guide):
    built = program(guide=guide)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gates = draw(built, 4000, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(gates.z, draw(built, 4000, seed=1).z) and not torch.equal(gates.z, draw(built, 4000, seed=2).z)
    for sampled, exact in zip(gates, marginals(built), strict=True):
        error = (sampled.mean(0) - exact).abs()
        assert error.max() < 5 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("guide", "prior", "vary"),
    [("mean_field", "nested", True), ("mixture", "nested", True), ("uniform_rank", "depth", True),
     ("point", "nested", False), ("mean_field", "fixed", False)],
)  # fmt: skip
def test_draws_vary_where_the_guide_is_random(guide, prior, vary):
    built = program(prior, guide=guide)
    gates = draw(built, 50)
    assert draws_vary(built) == vary == any(bool((x != x[:1]).any()) for x in gates)


def test_draws_of_the_prior_do_not_know_what_was_learned():
    built = program("hierarchical")  # rates are Gamma(1, 1): a first gate is open with E exp(-rate) = 1/2
    with torch.no_grad():
        built.prior.loc.fill_(3.0)
    z, g = draw(built, 4000, distribution="prior")
    assert z.shape == (4000, *built.layout.z_shape) and g.shape == (4000, *built.layout.g_shape)
    assert z[:, 0, 0, 0].mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / 4000))


def test_deployed_gates_are_open_where_the_marginal_exceeds_one_half():
    built = program()
    for open_gates, exact in zip(deployed(built), marginals(built), strict=True):
        assert torch.equal(open_gates, (exact > 0.5).float())
    assert 0 < deployed(built).z.mean() < 1


def test_the_prediction_is_the_mean_of_probabilities_over_draws():
    built = program()
    batches, gates = [batch(4, seed=1), batch(3, seed=2)], draw(built, 3)
    together = predict(built, batches, gates=gates)
    assert together.outputs.shape == (3, 7, 2) and together.log_likelihood.shape == (3, 7)
    for s in range(3):
        alone = predict(built, batches, gates=Gates(gates.z[s : s + 1], gates.g[s : s + 1]))
        torch.testing.assert_close(alone.outputs[0], together.outputs[s])
    torch.testing.assert_close(together.mean, together.outputs.mean(0))
    picked = together.mean.gather(1, together.labels[:, None])
    assert together.nll == pytest.approx(-picked.log().mean().item(), rel=1e-5)


def test_identical_allocations_share_one_forward():
    built, calls = program("fixed", bits=8), []
    built.net.register_forward_hook(lambda *_: calls.append(1))
    result = predict(built, [batch(4)], gates=draw(built, 10))
    assert len(calls) == 1 and result.outputs.shape[0] == 10


def test_calibration_of_known_probabilities():
    """Ten examples at confidence 0.8 of which six are right: ECE 0.2; Brier (6 * 0.08 + 4 * 1.28) / 10."""
    outputs = torch.tensor([[0.2, 0.8]]).expand(1, 10, 2)
    labels = torch.tensor([1] * 6 + [0] * 4)
    prediction = Prediction(outputs, torch.zeros(1, 10), labels, Categorical(("a", "b")))
    assert prediction.calibration()["ece"] == pytest.approx(0.2, abs=1e-6)
    assert prediction.calibration()["brier"] == pytest.approx((6 * 0.08 + 4 * 1.28) / 10, rel=1e-5)


def test_restored_undoes_an_order():
    labels = torch.arange(5)
    prediction = Prediction(torch.rand(2, 5, 3), torch.rand(2, 5), labels, Categorical(("a", "b", "c")))
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = Prediction(
        prediction.outputs[:, order], prediction.log_likelihood[:, order], labels[order], prediction.likelihood
    )
    restored = shuffled.restored(order)
    assert torch.equal(restored.labels, labels) and torch.equal(restored.outputs, prediction.outputs)


def test_regression_predicts_the_mean_over_draws():
    built = program(task="stsb")
    result = predict(built, [batch(4, num_labels=1)], gates=draw(built, 3))
    assert result.likelihood.problem_type == "regression" and result.decision.shape == (4,)
    torch.testing.assert_close(result.decision, result.outputs.squeeze(-1).mean(0))
    assert result.calibration() == {"ece": None, "brier": None}


def test_divergences_are_zero_where_guide_and_prior_agree():
    pinned = divergences(program("fixed", bits=8, rank=2))
    assert float(pinned.z.abs().sum()) == 0 and float(pinned.g.abs().sum()) == 0
    rate = -math.log(torch.sigmoid(torch.tensor(0.5)).item())
    same = divergences(program("nested", rate=rate, rank_rate=rate))
    assert same.z.abs().max() < 1e-6 and same.g.abs().max() < 1e-6
    assert divergences(program("nested", rate=3.0)).z.min() > 0.1


@pytest.mark.parametrize("guide", ["mean_field", "mixture"])
def test_the_mean_kl_is_that_of_the_program_and_leaves_the_generator_alone(guide):
    built = program(guide=guide)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    kl = mean_kl(built)
    assert torch.equal(torch.rand(3), expected)
    assert kl == mean_kl(built) and (kl == mean_kl(built, seed=1)) == (guide == "mean_field")
    with torch.no_grad(), seeded(built, 0):  # of all 100 estimates, whether or not they differ
        assert kl == tuple(torch.stack([torch.stack(built.kl()) for _ in range(100)]).double().mean(0).tolist())
    draws = torch.stack([torch.stack(built.kl()) for _ in range(400)]).detach()
    error = draws.std(0) * (1 / 100 + 1 / 400) ** 0.5
    assert bool(((draws.mean(0) - torch.tensor(kl)).abs() <= 4 * error + 1e-3).all())


def test_no_draws_and_no_examples_are_refused():
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        draw(program(), 0)
    with pytest.raises(ValueError, match="unknown distribution 'posteriour': did you mean 'posterior'"):
        draw(program(), 1, distribution="posteriour")
    with pytest.raises(ValueError, match="no examples"):
        predict(program(), [])


@pytest.mark.parametrize("scope", ["adapted", "encoder"])
def test_clipped_values_are_those_beyond_the_range(scope):
    """Of weights as they are stored, and of the inputs of two layers as a hook sees them, over two batches."""
    built = program(scope=scope)
    layout, net = built.layout, built.net
    with torch.no_grad():
        net.log_range.copy_(torch.linspace(-5.0, 0.5, net.log_range.numel()).view_as(net.log_range))
    seen = {i: [] for i in (0, 3)}
    modules = dict(net.named_modules())
    layers = [next(m for n, m in modules.items() if n.endswith(p.name)) for p in layout.projections]
    hooks = [layers[i].register_forward_pre_hook(lambda _, args, i=i: seen[i].append(args[0].detach())) for i in seen]
    batches = [batch(4, seed=1), batch(3, seed=2)]
    found = clipped(built.net, batches)
    for hook in hooks:
        hook.remove()
    assert torch.equal(found.isnan(), ~built.z_mask)
    weights = {name: w for name, w in net.named_parameters() if name.endswith("weight")}
    for i, (projection, row) in enumerate(zip(layout.projections, net.log_range.exp(), strict=True)):
        of = {n: w for n, w in weights.items() if f"{projection.name}." in n and "lora" not in n}
        assert len(of) == 1
        expected = (next(iter(of.values())).abs() > row[1]).double().mean()
        assert float(found[i, 1]) == pytest.approx(float(expected))
    for i, inputs in seen.items():
        values = torch.cat([x.flatten() for x in inputs])
        share = float((values.abs() > net.log_range[i, 0].exp()).double().mean())
        assert float(found[i, 0]) == pytest.approx(share)
    assert 0 < float(found[0, 0]) <= 1 and float(found.nan_to_num().max()) > float(found.nan_to_num().min())


def test_weights_are_rounded_once_for_several_batches_and_anew_for_every_draw(monkeypatch):
    built, rounded = program(scope="encoder"), []
    inner = gate_context.quantize_on
    monkeypatch.setattr(gate_context, "quantize_on", lambda x, grid: rounded.append(x.data_ptr()) or inner(x, grid))
    gates = draw(built, 3)
    batches = [batch(4, seed=i) for i in range(5)]
    together = predict(built, batches, gates=gates)
    weights = {p.data_ptr() for p in built.net.parameters() if p.dim() == 2}
    counts = [rounded.count(weight) for weight in weights]
    assert max(counts) == 3 and sum(counts) > 0  # once a draw at most, not once a batch; 32 bit is left alone
    for i in range(3):
        one = Gates(gates.z[i : i + 1], gates.g[i : i + 1])
        alone = torch.cat([predict(built, [each], gates=one).outputs for each in batches], 1)
        torch.testing.assert_close(together.outputs[i : i + 1], alone)
