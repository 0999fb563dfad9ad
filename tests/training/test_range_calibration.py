"""Ranges that fit the widths in use, against brute force, and what the pass that finds them leaves behind: nothing."""

import pytest
import torch
from models import batch, tiny_bert

from pyro_blora import adapters
from pyro_blora.adapters import Observer, attach, calibrate, observed
from pyro_blora.adapters.gate_context import ADAPTER
from pyro_blora.guides import build_guide
from pyro_blora.layout import BASE, HIDDEN, INPUT, LORA_A, LORA_B
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.quantizer import LADDER, rounded
from pyro_blora.tasks import get_task
from pyro_blora.training import range_calibration
from pyro_blora.training.range_calibration import _CANDIDATES, RangeErrors, range_errors

pytestmark = pytest.mark.usefixtures("eager", "as_shipped")


def program_of(*, trained=True, task="sst2", scope="encoder"):
    task = get_task(task)
    torch.manual_seed(0)  # PEFT draws lora_A
    net = attach(tiny_bert(num_labels=task.num_labels), rank=3, sequence_length=10, scope=scope)
    torch.manual_seed(7)
    for name, parameter in net.named_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    calibrate(net, [batch()[0]])
    prior = build_prior("nested", net.layout)
    return BayesianLoRA(net, prior, build_guide("mean_field", net.layout, prior), task.likelihood, n_train=50)


@pytest.fixture(scope="module")
def program():
    return program_of()


@pytest.fixture(scope="module")
def found(program):
    return range_errors(program, [batch(seed=seed) for seed in range(2)])


class Recorder(Observer):
    """One layer's input, hidden activation and weights, with what the loss says of each element."""

    def __init__(self, projection):
        self.projection, self.seen = projection, {}

    def activation(self, projection, tensor, x):
        if projection == self.projection:
            x = (x + torch.zeros((), requires_grad=True)).clone()
            x.retain_grad()
            self.seen[tensor] = x
        return x

    def product(self, projection, tensor, x, weight, bias):
        return super().product(projection, tensor, x, self.activation(projection, tensor, weight), bias)


# --- the errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 60])
def test_errors_are_weighted_by_the_squared_gradient_of_the_loss(program, monkeypatch, size):
    """Exactly, of a tensor that is taken whole; of a sample with repetition within its own sampling error."""
    if size:
        monkeypatch.setattr(range_calibration, "_SAMPLE", size)
    inputs, labels = batch(size=8)
    found, recorder = range_errors(program, [(inputs, labels)]), Recorder(0)
    with observed(program.net, recorder):
        logits = program.net(**inputs).logits
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    program.zero_grad()
    for tensor in (INPUT, BASE, LORA_A, LORA_B, HIDDEN):
        x = recorder.seen[tensor]
        values, weights = x.detach().flatten(), x.grad.flatten().square()
        torch.testing.assert_close(found.ranges[0, tensor], values.abs().max() * _CANDIDATES)
        for i, bits in enumerate(LADDER[:2]):
            for c in (0, 5, 12):
                each = (rounded(values, found.ranges[0, tensor, c], bits) - values).square() * weights
                error = 5 * each.std().item() / size**0.5 if size and size < len(values) else 0.0
                assert found.errors[0, tensor, c, i].item() == pytest.approx(each.mean().item(), abs=error, rel=1e-5)


def test_nothing_is_lost_at_32_bit_and_less_with_every_rung(found, program):
    exists = program.z_mask
    assert bool((found.errors[..., -1] == 0).all()) and bool((found.errors >= 0).all())
    best = found.errors.amin(-2)[exists]  # (tensors, 5)
    assert bool((best[:, 1:] <= best[:, :-1]).all()) and bool((best[:, 0] > 0).all())


def test_ranges_are_positive_and_one_candidate_covers_the_largest_value(found, program):
    assert found.ranges.shape == (*program.layout.z_shape[:2], len(_CANDIDATES)) and bool((found.ranges > 0).all())
    for layer in program.net.layers():
        if hasattr(layer, "lora_A"):
            largest = layer.lora_A[ADAPTER].weight.abs().max()
            torch.testing.assert_close(found.ranges[layer.index, LORA_A].max(), largest.detach())


def test_a_tensor_of_zeros_keeps_the_range_of_the_net():
    program = program_of(trained=False)
    found, own = range_errors(program, [batch()]), program.net.log_range.exp().detach()
    adapted = program.g_mask
    assert bool((found.errors[adapted][:, LORA_B] == 0).all())
    widths = torch.full((*program.layout.z_shape[:2], 5), 0.2)
    torch.testing.assert_close(found.best(widths)[adapted][:, LORA_B], own[adapted][:, LORA_B])
    missing = ~program.z_mask
    torch.testing.assert_close(found.best(widths)[missing], own[missing])


def test_a_regression_weighs_by_the_slopes_of_its_own_likelihood():
    program, (inputs, labels) = program_of(task="stsb"), batch(num_labels=1)
    wide = range_errors(program, [(inputs, labels)])
    with torch.no_grad():
        program.log_scale.fill_(1.0)
    narrow = range_errors(program, [(inputs, labels)])
    torch.testing.assert_close(narrow.errors, wide.errors * torch.tensor(-4.0).exp(), rtol=1e-3, atol=0)


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_best_range_has_the_least_expected_error():
    generator = torch.Generator().manual_seed(0)
    ranges, errors = torch.rand(3, 2, 6, generator=generator), torch.rand(3, 2, 6, 5, generator=generator)
    widths = torch.rand(3, 2, 5, generator=generator).softmax(-1)
    best = RangeErrors(ranges, errors).best(widths)
    assert best.shape == (3, 2)
    for row in range(3):
        for tensor in range(2):
            expected = [sum(widths[row, tensor] * errors[row, tensor, c]).item() for c in range(6)]
            assert best[row, tensor] == ranges[row, tensor, expected.index(min(expected))]


def test_best_by_width_is_the_best_of_each_width_alone(found, program):
    each = found.best_by_width()
    assert each.shape == (*program.layout.z_shape[:2], len(LADDER)) and bool((each > 0).all())
    for i in range(len(LADDER)):
        sure = torch.eye(len(LADDER))[i].expand_as(each)
        assert torch.equal(each[..., i], found.best(sure))
    assert bool((each[..., 0] <= each[..., 3])[program.z_mask].all())  # a coarse grid clips, a fine one covers


def test_a_fitted_range_loses_no_more_than_covering_the_largest_value(found, program):
    for i in range(len(LADDER) - 1):
        covering, fitted = found.errors[..., 0, i], found.errors[..., i].amin(-1)
        assert bool((fitted <= covering).all())
    ratio = found.errors[..., 0].amin(-1)[program.z_mask] / found.errors[..., 0, 0][program.z_mask]
    assert ratio.log().mean().exp() < 0.6  # at 2 bits: 0.50 to 0.55 over twelve seeds of the adapter


# --- what is left behind ----------------------------------------------------------------------------------------------


def assert_as_before(program, training):
    assert program.net.training is training
    assert program.net.gate_context.observer is None and program.net.gate_context.gates is None
    assert all(parameter.grad is None for parameter in program.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_no_gradient_observer_or_mode_is_left_behind(training):
    program = program_of(scope="adapted").train(training)
    state = {name: value.clone() for name, value in program.state_dict().items()}
    range_errors(program, [batch()])
    assert_as_before(program, training)
    assert all(torch.equal(value, state[name]) for name, value in program.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_fails_leaves_nothing_behind_either(training):
    program, (inputs, labels) = program_of(scope="adapted").train(training), batch()
    with pytest.raises(IndexError):
        range_errors(program, [({**inputs, "input_ids": inputs["input_ids"] + 1000}, labels)])
    assert_as_before(program, training)


def test_an_observer_that_only_looks_on_changes_nothing(program):
    inputs, _ = batch()
    program.eval()
    with torch.no_grad():
        with observed(program.net, Observer()):
            seen = program.net(**inputs).logits
        with adapters.gates(program.net, *adapters.open_gates(program.layout)):
            opened = program.net(**inputs).logits
    torch.testing.assert_close(seen, opened, rtol=0, atol=1e-6)
