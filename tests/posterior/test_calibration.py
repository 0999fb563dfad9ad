"""Calibration scores against hand computation, closed forms and their own invariances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from pyro_blora.posterior import calibration
from pyro_blora.posterior.calibration import (
    adaptive_ece,
    at_temperature,
    aurc,
    auroc,
    brier,
    ece,
    fit_temperature,
    nll,
    scores,
)


def predicted(S=3, E=400, C=3, seed=0, sharpness=1.0):
    """Probabilities of S draws and labels that follow their mean: calibrated in expectation."""
    generator = torch.Generator().manual_seed(seed)
    outputs = (sharpness * torch.randn(S, E, C, generator=generator)).softmax(-1)
    return outputs, torch.multinomial(outputs.mean(0), 1, generator=generator).squeeze(-1)


def test_three_examples_by_hand():
    mean, labels = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1, 1])
    assert nll(mean, labels) == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.8)) / 3)
    assert brier(mean, labels) == pytest.approx((2 * 0.01 + 2 * 0.36 + 2 * 0.04) / 3)
    # bins of a fifteenth: 0.6 alone and wrong, 0.8 alone and right, 0.9 alone and right
    assert ece(mean, labels, 15) == pytest.approx((0.6 + 0.2 + 0.1) / 3, abs=1e-6)
    assert ece(mean, labels, 1) == pytest.approx(abs((0.9 + 0.6 + 0.8) / 3 - 2 / 3), abs=1e-6)
    assert adaptive_ece(mean, labels, bins=3) == pytest.approx((0.6 + 0.2 + 0.1) / 3)
    assert adaptive_ece(mean, labels, bins=2) == pytest.approx((abs(0.6 + 0.8 - 1) + abs(0.9 - 1)) / 3)
    assert adaptive_ece(mean, labels, bins=1) == pytest.approx(abs((0.9 + 0.6 + 0.8) / 3 - 2 / 3))
    assert calibration.selective_accuracy(mean, labels) == {"0.5": 1.0, "0.8": 1.0, "0.9": 2 / 3, "0.95": 2 / 3}


def test_the_area_of_risk_and_coverage_by_hand():
    confidence, right = torch.tensor([0.2, 0.9, 0.6, 0.4]), torch.tensor([False, True, False, True])
    assert aurc(confidence, right) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)  # risks of 1, 2, 3, 4 answers
    assert aurc(confidence, torch.ones(4)) == 0 and aurc(confidence, torch.zeros(4)) == 1
    assert aurc(torch.ones(4), right) == pytest.approx(1 / 2)  # of equal ones in any order, in the mean
    assert aurc(torch.tensor([0.9, 0.5, 0.5]), torch.tensor([True, False, True])) == pytest.approx(
        (0 + 1 / 4 + 1 / 3) / 3
    )


def test_what_is_impossible_stays_so_at_every_temperature():
    """As a letter that a question lacks: of others the odds alone count."""
    mean = torch.tensor([[0.999, 0.001, 0.0], [0.2, 0.3, 0.5]])
    found = at_temperature(mean, 5.0)
    odds = (0.999 / 0.001) ** 0.2
    assert found[0].tolist() == pytest.approx([odds / (1 + odds), 1 / (1 + odds), 0.0], rel=1e-5)
    torch.testing.assert_close(found[1], mean[1].double() ** 0.2 / (mean[1].double() ** 0.2).sum())
    torch.testing.assert_close(at_temperature(mean, 1.0), mean.double())


def test_shares_of_equal_confidences_do_not_depend_on_the_order_of_rows():
    mean = torch.tensor([[1.0, 0.0]] * 4 + [[0.6, 0.4]] * 6)
    labels = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0, 1, 0])
    back = torch.arange(9, -1, -1)
    shares = calibration.selective_accuracy
    assert shares(mean, labels) == pytest.approx(shares(mean[back], labels[back]))


def test_the_best_and_the_worst_order_bound_the_area():
    right = torch.rand(500, generator=torch.Generator().manual_seed(0)) < 0.8
    noise = torch.rand(500, generator=torch.Generator().manual_seed(1))
    best, by_chance, worst = (aurc(x, right) for x in (right + noise, noise, noise - right.float()))
    assert best < by_chance < worst and by_chance == pytest.approx(1 - right.float().mean().item(), abs=0.05)


def test_uncertainty_has_two_parts():
    sure = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two draws, each sure of another class
    entropy, information = calibration.uncertainty(sure)
    assert entropy.item() == pytest.approx(math.log(2)) and information.item() == pytest.approx(math.log(2))
    unsure = torch.full((2, 1, 2), 0.5)
    entropy, information = calibration.uncertainty(unsure)
    assert entropy.item() == pytest.approx(math.log(2)) and information.item() == 0.0


@given(seed=st.integers(0, 1000), draws=st.integers(1, 5))
def test_what_draws_add_is_within_the_entropy(seed, draws):
    outputs, labels = predicted(draws, 50, seed=seed)
    entropy, information = calibration.uncertainty(outputs)
    assert bool((information <= entropy + 1e-9).all()) and bool((entropy <= math.log(3) + 1e-9).all())
    assert (draws > 1) == bool((information > 1e-9).any())
    found = scores(outputs, labels)
    assert found["mutual_information"] == pytest.approx(information.mean().item())
    assert set(found) >= {"nll", "brier", "ece_15", "ece_20", "ece_adaptive", "entropy", "selective_accuracy"}


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(true):
    """Labels follow the probabilities; sharpened to the power of `true`, they are undone by that temperature."""
    outputs, labels = predicted(1, 40_000)
    mean = at_temperature(outputs[0], 1 / true)
    assert fit_temperature(mean, labels) == pytest.approx(true, rel=0.05)
    found = at_temperature(mean, true)
    torch.testing.assert_close(found.float(), outputs[0], atol=1e-5, rtol=1e-4)


def test_a_temperature_changes_no_decision_and_never_raises_the_nll_it_was_fitted_to():
    outputs, labels = predicted(1, 500, sharpness=6.0, seed=3)
    labels = torch.where(torch.arange(500) % 3 == 0, (labels + 1) % 3, labels)  # a third is wrong: too sure
    T = fit_temperature(outputs[0], labels)
    scaled = at_temperature(outputs[0], T)
    assert T > 1.5 and bool((scaled.argmax(-1) == outputs[0].argmax(-1)).all())
    assert nll(scaled, labels) < nll(outputs[0], labels) and ece(scaled.float(), labels, 15) < ece(
        outputs[0], labels, 15
    )


def test_auroc_is_the_share_of_ordered_pairs():
    positive, negative = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([0.1, 0.5])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert auroc(positive, negative) == pytest.approx(np.mean(pairs))
    assert auroc(positive, negative[:0]) is None


def test_foreign_examples_are_told_by_their_uncertainty():
    inside, outside = predicted(4, 300, sharpness=8.0)[0], predicted(4, 300, sharpness=0.1, seed=1)[0]
    found = calibration.out_of_distribution(inside, outside)
    assert found["entropy"] > 0.95
    assert calibration.out_of_distribution(inside, inside)["entropy"] == pytest.approx(0.5)


def test_calibrated_predictions_have_a_small_ece_and_surer_ones_a_large_one():
    outputs, labels = predicted(1, 20_000)
    assert ece(outputs[0], labels, 15) < 0.02 and adaptive_ece(outputs[0], labels) < 0.02
    surer = at_temperature(outputs[0], 0.3).float()
    assert ece(surer, labels, 15) > 0.1 and adaptive_ece(surer, labels) == pytest.approx(
        ece(surer, labels, 15), abs=0.02
    )


@pytest.mark.parametrize("E", [500, 1_000_000])
def test_the_ece_is_that_of_torchmetrics_without_its_rounding(E):
    """Of confidences that end near 1, as a million rows have."""
    rng = np.random.default_rng(0)
    confidence = torch.tensor(rng.uniform(0.98, 0.999, E))
    mean = torch.stack([confidence, 1 - confidence], -1).float()
    labels = torch.tensor((rng.random(E) > confidence.numpy()).astype(int))
    expected = abs(float((mean[:, 0].double() - (labels == 0).double()).mean()))  # all are in one bin
    assert ece(mean, labels, 15) == pytest.approx(expected, abs=1e-9)
    if E < 1000:
        theirs = multiclass_calibration_error(mean, labels, num_classes=2, n_bins=15).item()
        assert ece(mean, labels, 15) == pytest.approx(theirs, abs=1e-5)


def test_the_ece_of_many_bins_is_that_of_torchmetrics():
    outputs, labels = predicted(1, 2000)
    theirs = multiclass_calibration_error(outputs[0], labels, num_classes=3, n_bins=20).item()
    assert ece(outputs[0], labels, 20) == pytest.approx(theirs, abs=1e-6)
