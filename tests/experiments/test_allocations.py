"""Allocations of peers have the answers that are known: traces, the best widths, budgets, the end of a bisection."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import batch, tiny_bert
from torch.autograd.functional import hessian, jacobian
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.studies import bisection, fewest_page, greedy, peers
from experiments.studies.allocations import mixed_widths, uniform_budget
from experiments.studies.hessian import gauss_newton_traces, hessian_traces, mean_squared_errors
from experiments.studies.integer_program import cheapest
from pyro_blora import attach
from pyro_blora.adapters import calibrate
from pyro_blora.adapters.gate_context import Observer
from pyro_blora.adapters.gated_model import observed
from pyro_blora.bops import expected_bops
from pyro_blora.config import RunConfig
from pyro_blora.guides import build_guide
from pyro_blora.layout import AdapterLayout
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.quantizer.grid import rounded
from pyro_blora.tasks import get_task

TENSOR = {"lora_A": 2, "hidden": 4}


@pytest.fixture(scope="module")
def program():
    """A small program, its adapter away from its start."""
    torch.manual_seed(0)
    net = attach(tiny_bert(), rank=2, sequence_length=10)
    for p in net.adapter_parameters():
        torch.nn.init.normal_(p, std=0.3)
    calibrate(net, [batch()[0]])
    prior = build_prior("fixed", net.layout)
    guide = build_guide("mean_field", net.layout, prior)
    return BayesianLoRA(net, prior, guide, get_task("sst2").likelihood, n_train=100).eval()


@pytest.fixture(scope="module")
def layout():
    return AdapterLayout.of(tiny_bert(), rank=4, sequence_length=10)


class _Moved(Observer):
    """One tensor of projection 0, moved by `shift`."""

    def __init__(self, tensor, shift):
        self.tensor, self.shift = tensor, shift

    def activation(self, projection, tensor, x):
        return x + self.shift if (projection, tensor) == (0, self.tensor) else x

    def product(self, projection, tensor, x, weight, bias):
        moved = weight + self.shift if (projection, tensor) == (0, self.tensor) else weight
        return torch.nn.functional.linear(x, moved, bias)


@pytest.mark.parametrize("tensor", TENSOR)
def test_traces_are_those_of_the_exact_hessian(program, tensor):
    """Of a weight, and of an activation: each example's, averaged; the estimate is within four standard errors."""
    inputs, labels = batch(size=2)
    at = TENSOR[tensor]
    shape = program.net.low_rank(program.layout.projections[0].name)[0].shape
    if tensor == "hidden":
        shape = (2, inputs["input_ids"].shape[1], program.layout.rank)

    def nll(shift):
        with observed(program.net, _Moved(at, shift)), sdpa_kernel(SDPBackend.MATH):
            logits = program.net.logits(**inputs)
        return -program.likelihood(logits, scale=program.log_scale.exp()).log_prob(labels).sum()

    exact = hessian(nll, torch.zeros(shape)).flatten(len(shape)).flatten(0, len(shape) - 1)
    expected = exact.trace().item() / len(labels)
    estimates = torch.stack(
        [hessian_traces(program, [(inputs, labels)], probes=4, seed=seed)[0, at] for seed in range(8)]
    )
    error = estimates.std().item() / len(estimates) ** 0.5
    assert abs(estimates.mean().item() - expected) < 4 * error + 1e-9
    assert error < 0.5 * abs(expected)  # so that a wrong scale is seen


@pytest.mark.parametrize("tensor", TENSOR)
def test_gauss_newton_traces_are_those_of_the_exact_matrix(program, tensor):
    """Sum over logits of |J' F^(1/2)|^2, with F = diag(p) - p p' of two classes."""
    inputs, labels = batch(size=2)
    at = TENSOR[tensor]
    shape = program.net.low_rank(program.layout.projections[0].name)[0].shape
    if tensor == "hidden":
        shape = (2, inputs["input_ids"].shape[1], program.layout.rank)

    def logits(shift):
        with observed(program.net, _Moved(at, shift)):
            return program.net.logits(**inputs)

    J = jacobian(logits, torch.zeros(shape)).flatten(2)  # (B, C, n)
    p = logits(torch.zeros(shape)).softmax(-1).detach()
    F = p.diag_embed() - p[:, :, None] * p[:, None]
    exact = torch.einsum("bcn,bcd,bdn->", J, F, J).item() / len(labels)
    found = gauss_newton_traces(program, [(inputs, labels)], probes=400)[0, at].item()
    assert found == pytest.approx(exact, rel=1e-4 if tensor == "hidden" else 0.15)  # of weights, examples share noise


def test_squared_errors_leave_out_padding(program):
    inputs, labels = batch(size=2)
    inputs["attention_mask"][1, 3:] = 0
    ranges = program.net.log_range.detach().exp()[..., None].expand(*program.layout.z_shape[:2], 5)
    errors = mean_squared_errors(program, [(inputs, labels)], ranges)
    seen = {}

    class Keep(Observer):
        def activation(self, projection, tensor, x):
            seen.setdefault((projection, tensor), x)
            return x

    with observed(program.net, Keep()), torch.no_grad():
        program.net.logits(**inputs)
    x = seen[0, 0][inputs["attention_mask"].bool()]
    assert errors[0, 0, 1] == pytest.approx((rounded(x, ranges[0, 0, 1], 4) - x).square().mean().item(), rel=1e-5)
    assert bool((errors[..., -1] == 0).all())


def share(layout, gates):
    return expected_bops(layout, *gates).model_ratio.item()


def test_the_integer_program_finds_the_best_of_all():
    """Of two projections, every allocation by enumeration."""
    layout = AdapterLayout.of(
        tiny_bert(num_hidden_layers=1), rank=2, sequence_length=10, target_modules=("query", "value")
    )
    generator = torch.Generator().manual_seed(1)
    sensitivity = torch.zeros(*layout.z_shape[:2], 5, dtype=torch.float64)
    sensitivity[..., :4] = torch.rand(*layout.z_shape[:2], 4, generator=generator, dtype=torch.float64)
    sensitivity = sensitivity.sort(-1, descending=True).values
    free = [(0, 0), (0, 1), (1, 0), (1, 1)]  # the adapters' widths cost nothing to be closed
    for t in (2, 3, 4):
        sensitivity[:, t] = 0.0
    low, high = uniform_budget("W2A2", layout).share, uniform_budget("W16A16", layout).share
    for part in (0.1, 0.4, 0.8):
        bops = low + part * (high - low)
        found = cheapest(layout, sensitivity, bops)
        assert share(layout, found) <= bops
        best, gate = torch.inf, torch.arange(4)
        for depths in itertools.product(range(5), repeat=4):
            z = torch.zeros(layout.z_shape)
            for at, depth in zip(free, depths, strict=True):
                z[at] = (gate < depth).float()
            if share(layout, (z, torch.ones(layout.g_shape))) <= bops:
                best = min(best, sum(sensitivity[at][d].item() for at, d in zip(free, depths, strict=True)))
        reached = sum(sensitivity[at][int(found.z[at].sum())].item() for at in free)
        assert reached == pytest.approx(best, rel=2e-4)
    with pytest.raises(ValueError, match="bops must be at least"):
        cheapest(layout, sensitivity, 0.5 * low)


def toy_increments(layout):
    """Losses that are known: a rung costs its projection's number, tensors alike; a rank costs nothing."""
    return {m: 0.0 if m.tensor < 0 else (1.0 + m.projection) / (1 + m.depth) for m in greedy.closings(layout)}


def test_the_greedy_path_meets_every_budget_and_leaves_no_room(layout):
    increments = toy_increments(layout)
    path = greedy.closing_path(layout, increments)
    assert len(path) == len(increments) == len(set(path))
    for bops in (0.95, 0.8, 0.65):
        gates = greedy.allocation_at(layout, path, increments, bops)
        assert share(layout, gates) <= bops
        assert bops > 0.8 or bool((gates.g == 0).all())  # what costs nothing goes first
        for i, t in layout.z_mask.nonzero().tolist():
            depth = int(gates.z[i, t].sum())
            if depth < layout.z_shape[-1]:
                more = gates.z.clone()
                more[i, t, depth] = 1.0
                assert share(layout, (more, gates.g)) > bops
    with pytest.raises(ValueError, match="bops must be at least"):
        greedy.allocation_at(layout, path, increments, 0.01)


def test_increments_add_up_to_what_was_measured(layout):
    """Of a loss in which ladders add up, at every depth; ranks in between are shared evenly."""

    def loss(depths):
        missing = (layout.z_shape[-1] - depths.z.clamp(max=3)).square().sum() - depths.z.numel()  # 16 bit costs nothing
        return float(missing + 2.0 * (layout.rank - 1 - depths.g).sum())

    increments = greedy.increments_of(layout, loss)
    for i, t in layout.z_mask.nonzero().tolist():
        found = [increments[greedy.Move(i, t, d)] for d in reversed(range(4))]
        assert found == pytest.approx([0.0, 3.0, 5.0, 7.0])
    assert {increments[m] for m in increments if m.tensor < 0} == {2.0}
    again = dict(increments)
    greedy.closing_path(layout, again, loss)
    assert again == pytest.approx(increments)


def test_the_divergence_is_that_of_the_allocation_and_leaves_no_trace(program):
    rows = [batch(size=4), batch(size=2)]
    ranges = program.net.log_range.detach().exp()[..., None].expand(*program.layout.z_shape[:2], 5)
    before = program.net.log_range.detach().clone()
    measure = greedy.divergence_of(program, rows, ranges)
    opened = greedy.Depths.opened(program.layout)
    assert measure(opened) == 0.0
    coarse = opened.after(greedy.Move(0, 0, 0))
    expected = 0.0
    with torch.no_grad():
        for inputs, _ in rows:
            p, q = (program.logits(inputs, x.gates(program.layout)).log_softmax(-1) for x in (opened, coarse))
            expected += (p.exp() * (p - q)).sum().item() / 6
    assert measure(coarse) == pytest.approx(expected, rel=1e-4) and expected > 0
    assert torch.equal(program.net.log_range, before)


def test_a_width_between_two_rungs_is_a_mix_of_layers(layout):
    widths = mixed_widths(layout, 3, 4)
    assert {of["base"] for name, of in widths.items() if name.startswith("0.")} == {4}
    assert {of["base"] for name, of in widths.items() if name.startswith("1.")} == {2}
    below, mixed, above = (uniform_budget(name, layout) for name in ("W2A4", "W3A4", "W4A4"))
    assert below.share < mixed.share < above.share and mixed.prior == "allocation"
    with_3_bit = dataclasses.replace(layout, ladder=(2, 3, 4, 8, 16, 32))
    assert uniform_budget("W3A4", with_3_bit).prior == "fixed" != mixed.prior
    assert uniform_budget("W2A8", layout).share == pytest.approx(above.share)
    build_prior(mixed.prior, layout, mixed.settings)


@pytest.mark.parametrize("answer", [0.031, 0.045, 0.06, 0.08])
def test_bisection_ends_at_the_first_that_is_within(answer):
    tried = []
    end, known = bisection.bisect(0.03, 0.09, 3, lambda share: tried.append(share) or share >= answer)
    assert known and len(tried) == 3
    assert end / (0.09 / 0.03) ** (1 / 8) < answer <= end  # an eighth of the distance, on a log scale, is left
    assert bisection.bisect(0.03, 0.09, 0, lambda share: True) == (0.09, True)


def test_a_bisection_says_what_it_does_not_know():
    assert bisection.bisect(0.04, 0.09, 3, lambda share: None) == (0.09, False)
    assert bisection.bisect(0.04, 0.09, 3, lambda share: True if share > 0.05 else None) == (pytest.approx(0.06), False)


@pytest.mark.parametrize(("answer", "most"), [(0, 6), (2, 5), (4, 3), (5, 2), (6, 3)])
def test_going_down_ends_at_the_last_that_is_within(answer, most):
    tried = []
    assert bisection.descend(7, 4, lambda i: tried.append(i) or i >= answer) == (answer, True)
    assert len(tried) == len(set(tried)) <= most


def test_going_down_stops_at_noise_and_says_what_it_does_not_know():
    within = [True, False, False, True, True, True]
    assert bisection.descend(6, 4, lambda i: within[i]) == (3, True)  # what is below 2 was not tried
    assert bisection.descend(6, 4, lambda i: False) == (None, True)
    assert bisection.descend(6, 4, lambda i: None) == (None, False)
    assert bisection.descend(6, 4, lambda i: True if i == 4 else None) == (4, False)


def test_a_budget_is_within_half_a_point_or_is_not():
    at = [bisection.Tried(bisection.Budget("b", 0.1), 0.1, tuple(np.array([x, -1.0, 1.0]))) for x in (-0.005, -0.0051)]
    assert [x.is_within for x in at] == [True, False] and all(type(x.is_within) is bool for x in at)


class _Scored:
    """Cells whose score rises with the budget: a hundred examples, of which all but some are right."""

    def __init__(self, finished):
        self.options, self.finished, self.asked = SimpleNamespace(seeds=[0, 1]), finished, []
        self.loras = {"lora": 10, "no_dropout": 12}

    def cell(self, task, seed, method, budget=None):
        if budget is None and method not in self.loras:
            return None
        wrong = self.loras[method] if budget is None else round(0.6 / budget.share)  # 10 at 6 %, 11 at 5.7 %
        if budget:
            self.asked.append(budget.name)
            if budget.name not in self.finished:
                return None
        label, decision = [0.0] * 100, [1.0] * wrong + [0.0] * (100 - wrong)
        return {
            "summary": {
                "metric": {"name": "accuracy"},
                "deployed": {"metric": {"value": 1 - wrong / 100}},
                "bops": {"deployed": {"model_ratio": budget and budget.share}},
            },
            "examples": {"label": label, "deployed_decision": decision, "deployed_log_likelihood": label},
        }


@pytest.mark.parametrize(
    ("halvings", "missing", "fewest", "finished"),
    [
        (0, "", "W4A8", True),
        (2, "", "B0639", True),
        (2, "B0571", "B0639", False),
        (2, "B0639", "W4A8", False),
        (2, "W3A8", "W4A8", False),
        (2, "W4A8", None, False),
    ],
)
def test_a_search_goes_down_and_then_between(halvings, missing, fewest, finished):
    budgets = [bisection.Budget("W4A4", 0.042), bisection.Budget("W3A8", 0.051), bisection.Budget("W4A8", 0.08)]
    cells = _Scored({"W4A4", "W3A8", "W4A8", "B0639", "B0571"} - {missing})
    found = bisection.search(cells, "sst2", "start", [[budget] for budget in budgets], 2, halvings)
    assert (found.fewest and found.fewest.budget.name, found.is_finished) == (fewest, finished)
    assert "W4A4" not in cells.asked and ("W3A8" in cells.asked) == (missing != "W4A8")
    assert [each.share for each in found.tried] == sorted(each.share for each in found.tried)
    assert all(each.other[0] == pytest.approx(each.difference[0] + 0.02) for each in found.tried)  # two more are wrong


@pytest.mark.parametrize(("wrong", "better"), [((10, 12), "lora"), ((12, 10), "no_dropout"), ((10, None), "lora")])
def test_a_search_compares_with_the_better_of_the_two_loras_that_are_finished(wrong, better):
    cells = _Scored({"W4A8", "W3A8"})
    cells.loras = {name: x for name, x in zip(("lora", "no_dropout"), wrong, strict=True) if x is not None}
    budgets = [bisection.Budget("W3A8", 0.051), bisection.Budget("W4A8", 0.08)]
    found = bisection.search(cells, "sst2", "start", [[budget] for budget in budgets], 1)
    assert found.fewest.budget.name == "W4A8" and found.fewest.difference[0] == pytest.approx(0.02)
    assert next(iter(found.loras)) == better and found.loras[better] == [0.9, 0.9]
    assert (found.fewest.other is None) == (wrong[1] is None)


def test_the_headline_says_what_is_known():
    at = [
        bisection.Tried(bisection.Budget("b", x), x, (y, y - 0.01, y + 0.01), (y + 0.1, y, y + 0.2))
        for x, y in ((0.04, -0.02), (0.06, -0.001))
    ]
    fewer, enough = at

    def found(method, fewest, *, finished, tried=at):
        loras = {"no_dropout": [0.8, 0.9], "lora": [0.7, 0.8]}
        return bisection.Found("sst2", method, tried, fewest, finished, [], loras)

    each = [
        found("uniform", enough, finished=True),
        found("start", enough, finished=False),
        found("hessian", None, finished=False, tried=[fewer, enough._replace(difference=(-0.01, -0.02, 0.0))]),
    ]
    assert fewest_page.headlines(each) == (
        "- **sst2: LoRA's score at no more than 6.00% of its bit operations** (`start`, score minus LoRA's -0.0010 "
        "[-0.0110, +0.0090]); `uniform` 6.00%, `hessian` more than 6.00%"
    )
    (row,) = [line for line in fewest_page.table(each).splitlines() if "`uniform`" in line]
    assert "| +0.0990 [-0.0010, +0.1990] | 4.00% | -0.0200 [-0.0300, -0.0100] | 4.00% | no budget | 2 |" in row
    assert fewest_page.table_of_loras(each).endswith("| sst2 | 0.750 ± 0.071 | 0.850 ± 0.071 | `no_dropout` |")


def test_what_was_measured_of_another_configuration_is_refused(tmp_path):
    lora = RunConfig(task="sst2", prior="fixed")
    other = {"lora": peers.settings_of(RunConfig(task="sst2", prior="fixed", seed=1))}
    (tmp_path / "a-hessian.measured.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"another configuration \(seed differ\)"):
        peers.allocation("hessian", tmp_path, "a", "W4A4", lora, SimpleNamespace(), 0.1)
