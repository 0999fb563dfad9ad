"""--rest and --settle: weights train at what is deployed, and the gates rest, before they learn and after."""

from fractions import Fraction

import pytest
import torch
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.checkpoint import NEWEST, read_tensors, trainable
from pyro_blora.config import RunConfig
from pyro_blora.evaluation.summary import _rests_at_its_start
from pyro_blora.posterior import bops, deployed
from pyro_blora.training import Schedule, fit, natural_gradient
from pyro_blora.training.gradients import Gradients
from pyro_blora.training.settling import hold

pytestmark = pytest.mark.usefixtures("eager")
CHOICES = ({}, {"estimator": "relaxed"}, {"prior": "hierarchical"}, {"guide": "mixture"}, {"distillation": 0.3})


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def state(trained):
    return {name: x.detach().clone() for name, x in trainable(trained.program).items()}


def test_phases_are_functions_of_the_step():
    schedule = Schedule.of(RunConfig(epochs=4, batch_size=10, kl_warmup=0.25, settle=0.25), 100)
    assert [schedule.held(step) for step in (0, 9, 10, 29, 30, 39)] == ["open", "open", None, None, *["deployed"] * 2]
    assert [schedule.gates_move(step) for step in (19, 20, 24, 29, 30)] == [0.0, 0.1, 0.5, 1.0, 1.0]
    rates = [schedule.learning_rate("gates", step) for step in (9, 10, 29, 30, 39)]
    assert rates == [0.0, 0.1, pytest.approx(0.1 * 0.01**0.95), 0.0, 0.0]
    assert schedule.learning_rate("ranges", 39) == 1e-3
    rested = Schedule.of(RunConfig(epochs=4, batch_size=10, kl_warmup=0.25, rest=0.25, settle=0.25), 100)
    assert [rested.held(step) for step in (9, 10, 19, 20, 29, 30)] == [
        "open",
        *["deployed"] * 2,
        None,
        None,
        "deployed",
    ]
    assert [rested.gates_move(step) for step in (20, 24, 25, 29)] == [0.0, 0.0, 0.2, 1.0]
    rates = [rested.learning_rate("gates", step) for step in (10, 19, 20, 29, 30)]
    assert rates == [0.0, 0.0, 0.1, pytest.approx(0.1 * 0.01**0.9), 0.0]
    assert rested.learning_rate("ranges", 10) == 1e-3
    at_once = Schedule.of(RunConfig(epochs=4, batch_size=10, kl_warmup=0.7, settle=0.3), 100)
    assert {at_once.held(step) for step in range(28, 40)} == {"deployed"}
    for rows in range(30, 130):  # fractions that sum to 1 leave no step between
        odd = Schedule.of(RunConfig(epochs=1, batch_size=10, kl_warmup=0.4, settle=0.6), rows)
        assert odd.settling == odd.opening == int(0.4 * odd.steps)


@pytest.mark.parametrize("warmup", [0.29, 0.35, 0.41, 0.57, 0.58, 0.69, 0.7, 0.82, 1 / 3, 2 / 3])
def test_a_budget_rests_from_the_opening_on_whatever_the_fraction(warmup):
    config = RunConfig(prior="budget", kl_warmup=warmup, epochs=1, batch_size=10)
    assert _rests_at_its_start(config)
    for steps in range(3, 200):
        schedule = Schedule.of(config, 10 * steps)
        assert schedule.settling == schedule.learning == schedule.opening
        assert (steps * Fraction(warmup).limit_denominator(100)) // 1 == schedule.opening


@pytest.mark.parametrize("changes", [{"estimator": "relaxed"}, {"prior": "hierarchical"}], ids=str)
def test_what_rested_begins_to_learn_with_fresh_moments(backbone, tmp_path, changes):
    """Zeros of the rest would count as steps of Adam, whose next ones were up to four times the learning rate."""
    config = tiny_config(backbone, epochs=4, kl_warmup=0.25, rest=0.5, **changes)
    learning = Schedule.of(config, 64).learning
    assert learning == 12
    fit(config, folder=tmp_path, quiet=True, until=learning + 1)
    state = read_tensors(tmp_path / "checkpoints" / NEWEST)[0]
    found = {key: x for key, x in state.items() if key.startswith("step/")}
    of_gates = [float(x) for key, x in found.items() if key.startswith(("step/gate_guide.", "step/prior."))]
    assert of_gates and set(of_gates) == {1.0}
    assert max(map(float, found.values())) == learning + 1  # adapters went on


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_gates_rest_and_weights_go_on(backbone, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(natural_gradient, "_FIRST", 2)
    config = tiny_config(backbone, epochs=3, settle=0.25, kl_weight=0.5, **{"prior": "budget", **changes})
    schedule = Schedule.of(config, 64)
    assert 0 < schedule.opening < schedule.settling == 9 < schedule.steps == 12
    at = fit(config, folder=tmp_path, quiet=True, until=9)
    hold(at.program, schedule, 9)
    before, allocation = state(at), deployed(at.program)
    end = fit(config, folder=tmp_path, quiet=True)
    rest = {name for name, x in state(end).items() if torch.equal(x, before[name])}
    assert rest == {name for name in before if name.startswith(("gate_guide.", "prior.")) or name == "log_scale"}
    for one, other in zip(deployed(end.program), allocation, strict=True):
        assert torch.equal(one, other)
    if config.prior == "budget":
        assert bops(end.program).adapted_ratio.item() == pytest.approx(0.1, rel=0.01)
    weight = config.distillation
    for line in end.metrics[9:]:
        expected = line["nll"] if not weight else (1 - weight) * line["nll"] + weight * line["teacher_kl"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_gates_rest_at_their_start_then_learn_and_rest_at_what_they_learned(backbone, monkeypatch):
    monkeypatch.setattr(natural_gradient, "_FIRST", 2)
    seen, dropped, inner = [], [], Gradients.__call__

    def watched(gradients, *arguments, **named):
        found = inner(gradients, *arguments, **named)
        program = gradients.program
        seen.append((program.settled, [x.clone() for x in deployed(program)], program.gate_guide.z_evidence.clone()))
        return found

    monkeypatch.setattr(Gradients, "__call__", watched)
    monkeypatch.setattr(Gradients, "forget", lambda gradients: dropped.append(len(seen)))
    config = tiny_config(
        backbone, epochs=6, kl_warmup=0.25, rest=0.25, settle=0.25, kl_weight=0.01, prior="budget", lr_ranges=0.1
    )
    fit(config, quiet=True)
    assert len(seen) == 24
    assert dropped == [6, 6, 18]  # what was recorded, where gates start and at every other allocation
    rested, learned, settled = seen[6:12], seen[12:18], seen[18:]
    assert all(held is None for held, *_ in seen[:6] + learned)
    for phase in (rested, settled):
        allocation = phase[0][0]
        assert all(held is allocation and torch.equal(held.z, at[0]) for held, at, _ in phase)
        assert all(torch.equal(e, phase[0][2]) for *_, e in phase)
    assert not torch.equal(rested[0][0].z, settled[0][0].z) and not torch.equal(rested[0][2], settled[0][2])


def test_the_loss_is_that_of_the_deployed_allocation(backbone, monkeypatch):
    seen, inner = [], Gradients.__call__

    def watched(gradients, inputs, labels, *arguments):
        program, held = gradients.program, arguments[2]
        found = inner(gradients, inputs, labels, *arguments)
        with torch.no_grad():
            at = {"open": program.opened, "deployed": deployed(program), None: None}[held]
            seen.append(None if at is None else (held, float(found[0]), float(program.nll(inputs, labels, *at))))
        return found

    monkeypatch.setattr(Gradients, "__call__", watched)
    fit(tiny_config(backbone, epochs=3, settle=0.25, gated_dropout=False), quiet=True)
    of = [each for each in seen if each and each[0] == "deployed"]
    assert len(of) == 3
    for _, loss, nll in of:
        assert loss == pytest.approx(nll, abs=1e-6)


@pytest.mark.parametrize("until", [3, 4, 6, 7, 9, 11])  # gates start at step 3, learn from 6 on, settle at 9
def test_a_training_cut_off_in_any_phase_goes_on_to_the_same_bits(backbone, tmp_path, until):
    config = tiny_config(backbone, epochs=3, kl_warmup=0.25, rest=0.25, settle=0.25, prior="budget")
    whole = fit(config, folder=tmp_path / "whole", quiet=True)
    fit(config, folder=tmp_path / "cut", quiet=True, until=until)
    resumed = fit(config, folder=tmp_path / "cut", quiet=True)
    for (name, a), b in zip(state(whole).items(), state(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def test_fractions_that_do_not_fit_and_gates_that_are_not_random_are_refused(backbone):
    with pytest.raises(ValueError, match="more than all of the steps"):
        RunConfig(kl_warmup=0.8, settle=0.3)
    with pytest.raises(ValueError, match="settle must be"):
        RunConfig(settle=1.5)
    with pytest.raises(ValueError, match="this run has none: give --rest 0 --settle 0"):
        fit(tiny_config(backbone, prior="fixed", prior_settings={"bits": 4}, settle=0.25), quiet=True)
    everything = {"kl_warmup": 0.4, "settle": 0.6, "guide_settings": {"open_logit": 3.0}}
    for shares in ({}, {"rest": 0.3, "settle": 0.0}):
        with pytest.raises(ValueError, match="do not start from the data: give --rest 0, and a smaller --settle"):
            fit(tiny_config(backbone, **{**everything, **shares}), quiet=True)
