"""Where the gates start: slopes against finite differences, and the distributions from them against brute force."""

import pytest
import torch
from contracts import BY_NAME, LEARNING
from models import batch, tiny_bert, tiny_deberta
from scipy.stats import spearmanr
from torch.nn.functional import linear, one_hot

from pyro_blora import adapters
from pyro_blora.adapters import Observer, attach, calibrate, observed, set_ranges
from pyro_blora.gates import Gates
from pyro_blora.guides import build_guide
from pyro_blora.layout import BASE, HIDDEN, INPUT, LORA_A, LORA_B
from pyro_blora.posterior import bops
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.quantizer import rounded
from pyro_blora.tasks import get_task
from pyro_blora.training.gate_init import Sensitivity, _pooled, _Slopes, log_bayes_factors, sensitivity
from pyro_blora.training.range_calibration import range_errors

N_TRAIN = 500
STEP = 1e-4  # of the finite differences, in float64

pytestmark = pytest.mark.usefixtures("eager", "as_shipped")


def net_of(model, *, scope="encoder", target_modules=None):
    torch.manual_seed(7)
    net = attach(model, rank=3, sequence_length=10, scope=scope, target_modules=target_modules)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    calibrate(net, [batch()[0]])
    return net


def program_of(net, *, prior="nested", guide="mean_field", task="sst2", **settings):
    prior = build_prior(prior, net.layout, settings)
    guide = build_guide(guide, net.layout, prior)
    return BayesianLoRA(net, prior, guide, get_task(task).likelihood, n_train=N_TRAIN)


@pytest.fixture(scope="module")
def bert():
    return net_of(tiny_bert())


@pytest.fixture(scope="module")
def measured(bert):
    """The sensitivity of the small BERT on 24 examples."""
    program, batches = program_of(bert), [batch(8, seed=seed) for seed in range(3)]
    torch.manual_seed(0)
    return sensitivity(program, batches, range_errors(program, batches).best_by_width())


def ranges_of(net):
    """(L, T, 5): what covers each tensor, whatever the width."""
    return net.log_range.exp().detach()[..., None].expand(*net.layout.z_shape[:2], 5)


# --- slopes -----------------------------------------------------------------------------------------------------------


class Moved(Observer):
    """One tensor moved a share of the way to its grid, or ranks above one turned down, for calls with all examples."""

    def __init__(self, batch, projection, place, share, grid=None):
        self.batch, self.at, self.share, self.grid = batch, (projection, place), share, grid

    def _move(self, x):
        return x + self.share * (rounded(x, *self.grid) - x)

    def activation(self, projection, tensor, x):
        return self._move(x) if (projection, tensor) == self.at and len(x) == self.batch else x

    def product(self, projection, tensor, x, weight, bias):
        moved = (projection, tensor) == self.at and len(x) == self.batch
        return linear(x, self._move(weight) if moved else weight, bias)

    def ranks(self, projection, hidden):
        if not isinstance(self.at[1], tuple) or projection != self.at[0] or len(hidden) != self.batch:
            return hidden
        closing = torch.arange(hidden.shape[-1]) > self.at[1][1]
        return hidden * (1 - self.share * closing.to(hidden.dtype))


def difference(net, inputs, projection, place, grid=None):
    """d logits / d share at 0, (B, C), by central differences."""
    ends = []
    for share in (STEP, -STEP):
        with torch.no_grad(), observed(net, Moved(len(inputs["input_ids"]), projection, place, share, grid)):
            ends.append(net(**inputs).logits)
    return (ends[0] - ends[1]) / (2 * STEP)


@pytest.fixture(scope="module", params=[tiny_bert, tiny_deberta], ids=["bert", "deberta"])
def slopes(request):
    """A net in float64, its inputs, an observer that has seen them, and the logits that it saw."""
    net, (inputs, labels) = net_of(request.param()).double(), batch(3)
    observer = _Slopes(net.layout, ranges_of(net), len(labels))
    observer.z, observer.g = (torch.zeros_like(s, dtype=torch.double, requires_grad=True)
                              for s in (observer.z, observer.g))  # fmt: skip
    with observed(net, observer):
        return net, inputs, observer, net(**inputs).logits


def test_slopes_are_the_finite_differences_of_each_examples_own_logits(slopes):
    net, inputs, observer, logits = slopes
    layout = net.layout
    unadapted = [i for i, p in enumerate(layout.projections) if not p.adapted]
    adapted = [i for i, p in enumerate(layout.projections) if p.adapted]
    (of_z, of_g) = torch.autograd.grad(logits[:, 0].sum(), (observer.z, observer.g), retain_graph=True)
    moves = [(adapted[i], tensor) for i in (0, 1, -1) for tensor in (INPUT, BASE, LORA_A, LORA_B, HIDDEN)]
    for projection, tensor in [*moves, *((i, t) for i in (unadapted[0], unadapted[-1]) for t in (INPUT, BASE))]:
        for column, bits in enumerate(layout.ladder[:2]):
            grid = (observer.ranges[projection, tensor, column], bits)
            expected = difference(net, inputs, projection, tensor, grid)[:, 0]
            torch.testing.assert_close(of_z[:, projection, tensor, column], expected, rtol=1e-4, atol=1e-7)
            assert bool((expected != 0).all())
    for projection in (adapted[0], adapted[-1]):
        for above in range(layout.rank - 1):
            expected = difference(net, inputs, projection, ("ranks above", above))[:, 0]
            torch.testing.assert_close(-of_g[:, projection, above:].sum(-1), expected, rtol=1e-4, atol=1e-7)


def test_examples_do_not_leak_into_each_other(slopes):
    _, _, observer, logits = slopes
    for i in range(len(logits)):
        for slope in torch.autograd.grad(logits[i].sum(), (observer.z, observer.g), retain_graph=True):
            others = torch.arange(len(slope)) != i
            assert bool((slope[others] == 0).all()) and bool((slope[i] != 0).any())


def test_looking_at_the_slopes_changes_no_logit(slopes):
    net, inputs, _, logits = slopes
    with torch.no_grad(), adapters.gates(net, *adapters.open_gates(net.layout)):
        torch.testing.assert_close(logits.detach(), net.eval()(**inputs).logits)


def test_a_chain_changes_by_its_slope_in_the_fisher_metric():
    """alone^2 = mean_i d_i' F_i d_i with d_i the change of the logits of example i, F_i = diag(p) - p p'."""
    net, (inputs, labels) = net_of(tiny_bert(), scope="adapted", target_modules=r".*layer\.1\..*value"), batch()
    found, layout = sensitivity(program_of(net), [(inputs, labels)], ranges_of(net)), net.layout
    assert layout.z_shape[0] == 1  # a projection without others of its kind is pooled with none
    assert bool((found.alone.z[..., 3:] == 0).all()) and bool((found.alone.g[..., -1] == 0).all())
    net.double()
    with torch.no_grad(), observed(net, Observer()):
        p = net(**inputs).logits.softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None]

    def alone(change):
        return torch.einsum("bc,bcd,bd->b", change, fisher, change).mean().sqrt().item()

    for tensor in (INPUT, BASE, LORA_A, LORA_B, HIDDEN):
        for depth, bits in enumerate(layout.ladder[:3]):
            grid = (ranges_of(net)[0, tensor, depth].double(), bits)
            expected = alone(difference(net, inputs, 0, tensor, grid))
            assert found.alone.z[0, tensor, depth].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for depth in range(layout.rank - 1):
        expected = alone(difference(net, inputs, 0, ("ranks above", depth)))
        assert found.alone.g[0, depth].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


# --- the Fisher information -------------------------------------------------------------------------------------------


def directions(program, logits):
    return program.likelihood.fisher_directions(logits, torch.zeros(len(logits)), program.log_scale.exp().detach())


def test_two_classes_have_their_fisher_information_without_noise(bert):
    logits = 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    v, p = directions(program_of(bert), logits), logits.softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(v[:, :, None] * v[:, None], expected, rtol=1e-3, atol=3e-4)  # roots of 1e-8, which is 0


def test_three_classes_have_it_on_average():
    program, draws = program_of(net_of(tiny_bert(num_labels=3), scope="adapted"), task="mnli"), 20000
    logits = torch.tensor([0.5, -1.0, 1.2])
    v, p = directions(program, logits.expand(draws, 3)), logits.softmax(-1)
    outer = v[:, :, None] * v[:, None]
    error = outer.std(0) / draws**0.5
    assert bool(((outer.mean(0) - (p.diag() - p[:, None] * p)).abs() <= 4 * error + 1e-6).all())


def test_a_normal_has_that_of_its_mean():
    program = program_of(net_of(tiny_bert(num_labels=1), scope="adapted"), task="stsb")
    with torch.no_grad():
        program.log_scale.fill_(0.4)
    scale = torch.tensor(0.4).exp()
    v = directions(program, torch.randn(20, 1))
    torch.testing.assert_close(v.square(), (2.5 / scale).square().expand(20, 1))  # mean = 2.5 + 2.5 logit


def test_labels_are_not_looked_at(bert, measured):
    program, batches = program_of(bert), [batch(8, seed=seed) for seed in range(3)]
    ranges = range_errors(program, batches).best_by_width()
    torch.manual_seed(0)
    again = sensitivity(program, [(inputs, 1 - labels) for inputs, labels in batches], ranges)
    for ours, theirs in zip(again.alone, measured.alone, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- the rise of an allocation ----------------------------------------------------------------------------------------

L, T, DEPTHS, R = 3, 2, 4, 3


def equicorrelated(z_rho, g_rho, *, examples=32):
    """Changes of which every two chains have the correlation sqrt(rho rho') exactly, by depth; 0 at the open depth."""
    generator = torch.Generator().manual_seed(0)
    chains = L * T + L
    basis, _ = torch.linalg.qr(torch.randn(examples, chains + 1, generator=generator, dtype=torch.double))
    size = torch.rand(2, chains, max(DEPTHS, R), generator=generator, dtype=torch.double)[0] + 0.2

    def changes(first, count, rho):
        rho = torch.tensor(rho, dtype=torch.double)
        own = basis[:, 1 + first : 1 + first + count, None] * (1 - rho).sqrt()
        return examples**0.5 * size[first : first + count, : len(rho)] * (basis[:, :1, None] * rho.sqrt() + own)

    z = changes(0, L * T, [*z_rho, 0.0]).view(examples, L, T, DEPTHS).clone()
    g = changes(L * T, L, [*g_rho, 0.0]).clone()
    z[..., -1], g[..., -1] = 0.0, 0.0
    return z, g


@pytest.mark.parametrize("z_rho", [(0.0, 0.0, 0.0), (0.3, 0.3, 0.3), (1.0, 0.5, 0.1)], ids=str)
def test_the_rise_is_that_of_the_summed_changes(z_rho):
    """N / 2 mean_i (sum_c D_ic)^2, of allocations and, summed over all of them, of distributions."""
    z, g = equicorrelated(z_rho, z_rho[:2])
    found = Sensitivity.of(z, g, torch.arange(L))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        depths = Gates(*(torch.randint(n, shape, generator=generator) for n, shape in ((DEPTHS, (L, T)), (R, (L,)))))
        distributions = Gates(*(one_hot(d, n).double() for d, n in zip(depths, (DEPTHS, R), strict=True)))
        summed = (z * distributions.z).sum((1, 2, 3)) + (g * distributions.g).sum((1, 2))
        assert found.rise(distributions, 70).item() == pytest.approx(35 * summed.square().mean().item(), rel=1e-9)
    distributions = Gates(*(torch.randn(shape, generator=generator, dtype=torch.double).softmax(-1)
                   for shape in ((L, T, DEPTHS), (L, R))))  # fmt: skip
    draws = [torch.distributions.Categorical(distribution).sample((4000,)) for distribution in distributions]
    rises = torch.stack([found.rise(Gates(one_hot(a, DEPTHS).double(), one_hot(b, R).double()), 70)
                         for a, b in zip(*draws, strict=True)])  # fmt: skip
    assert abs(found.rise(distributions, 70) - rises.mean()) < 4 * rises.std() / 4000**0.5


def test_precise_means_are_left_alone_and_zeros_stay_zeros():
    squares = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).expand(50, 4, 3).clone()
    squares[:, :, 2] = 0.0
    torch.testing.assert_close(_pooled(squares, torch.tensor([0, 0, 0, 1])), squares[0])


def test_what_does_not_exist_draws_nothing_to_itself():
    """As the adapters of a type that is adapted in some layers only."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(256, 6, 3, generator=generator).square() * torch.tensor([0.5, 1, 1, 1, 2, 1])[:, None]
    more = torch.cat([squares, torch.zeros(256, 9, 3)], 1)
    pooled = _pooled(more, torch.zeros(15))
    torch.testing.assert_close(pooled[:6], _pooled(squares, torch.zeros(6)))
    assert not pooled[6:].any()
    alone = torch.cat([squares[:, :1], torch.zeros(256, 9, 3)], 1)
    torch.testing.assert_close(_pooled(alone, torch.zeros(10))[0], squares[:, 0].mean(0))


def test_noisy_means_are_drawn_to_those_of_their_kind():
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(20, 8, 1, generator=generator).square()
    squares[:, 4:] *= 100.0  # another kind
    kinds = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    own, pooled = squares.mean(0).log(), _pooled(squares, kinds).log()
    for kind in (0, 1):
        mine = kinds == kind
        assert bool((pooled[mine] >= own[mine].min()).all()) and bool((pooled[mine] <= own[mine].max()).all())
        assert pooled[mine].std() < 0.5 * own[mine].std()


def test_more_examples_leave_more_of_each_mean():
    squares = torch.randn(30, 6, 1, generator=torch.Generator().manual_seed(1)).square()
    squares *= torch.tensor([1.0, 1.3, 1.7, 2.2, 2.8, 3.6])[:, None]
    own, kinds = squares.mean(0).log(), torch.zeros(6)
    few, many = ((_pooled(squares.repeat(times, 1, 1), kinds).log() - own).abs().max() for times in (1, 50))
    assert few > 0.1 and many < 0.1 * few  # the shrinkage falls as one over the examples


def test_one_noisy_mean_does_not_draw_precise_ones():
    generator = torch.Generator().manual_seed(0)
    level = torch.tensor([1.0, 3.0, 10.0, 30.0])
    squares = level * (1 + 0.05 * torch.randn(100, 4, generator=generator))  # (M, L), known to half a percent
    squares[:, 3] = 0.0
    squares[0, 3] = 100.0 * level[3]  # one example says it all
    pooled = _pooled(squares[..., None], torch.zeros(4))[:, 0]
    torch.testing.assert_close(pooled[:3], level[:3], rtol=0.02, atol=0.0)
    assert pooled[3] < 0.9 * squares[:, 3].mean()


# --- log Bayes factors ------------------------------------------------------------------------------------------------


def distributions_of(prior, said):
    return Gates(*((distribution.depth_log_probs + e).softmax(-1) for distribution, e in zip(prior, said, strict=True)))


def mean_field(data, distributions, n_train):
    """Minus what each depth of each chain adds to the rise, at the means of the others' distributions."""
    at = Gates(*(distribution.double().requires_grad_() for distribution in distributions))
    parts = data.alone, data.common, data.curvature
    rise = Sensitivity(*(Gates(*(x.double() for x in part)) for part in parts)).rise(at, n_train)
    return Gates(*(-slope for slope in torch.autograd.grad(rise, at)))


@pytest.mark.parametrize(
    ("prior", "settings", "kl_weight"),
    [("nested", {"rate": 0.5}, 1.0), ("nested", {"rate": 20.0}, 0.5), ("bops", {}, 1.0), ("budget", {"bops": 0.05}, 1)],
)
def test_log_bayes_factors_are_the_fixed_point_of_mean_field(bert, measured, prior, settings, kl_weight):
    program = program_of(bert, prior=prior, **settings)
    found = log_bayes_factors(program, measured, kl_weight)
    expected = mean_field(measured, distributions_of(program.prior(), found), N_TRAIN / kl_weight)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-2)
        assert bool((ours[..., -1] == 0).all())  # an open chain changes nothing
        assert bool((ours <= 0).all())
    assert min(x.min() for x in found) < -1.0  # nats: the data have an influence


def test_a_smaller_weight_of_the_kl_is_as_more_examples(bert, measured):
    program = program_of(bert, prior="nested", rate=0.5)
    half = log_bayes_factors(program, measured, 0.5)
    double = measured.log_bayes_factors(
        lambda _: Gates(*(distribution.depth_log_probs for distribution in program.prior())), 2 * N_TRAIN
    )
    for ours, theirs in zip(half, double, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_budget_is_met_where_the_gates_start(bert, measured):
    program = program_of(bert, prior="budget", bops=0.05)
    program.gate_guide.start(log_bayes_factors(program, measured))
    assert bops(program).adapted_ratio.item() == pytest.approx(0.05, rel=0.01)


def test_the_estimate_orders_tensors_as_their_true_rise(bert, measured):
    """Of the NLL on the examples when one tensor alone is put on 4 bits: N times the mean KL of the predictions."""
    batches = [batch(8, seed=seed) for seed in range(3)]
    program, start = program_of(bert).eval(), bert.log_range.detach().clone()
    set_ranges(bert, range_errors(program, batches).best_by_width()[..., 1])
    z, g = adapters.open_gates(bert.layout)

    def log_probs():
        with torch.no_grad(), adapters.gates(bert, z, g):
            return torch.cat([bert(**inputs).logits.log_softmax(-1) for inputs, _ in batches])

    opened, predicted, true = log_probs(), [], []
    for projection, tensor in program.z_mask.nonzero().tolist():
        z[projection, tensor, 1:] = 0.0
        true.append((opened.exp() * (opened - log_probs())).sum(-1).mean().item())
        predicted.append(measured.alone.z[projection, tensor, 1].item() ** 2 / 2)
        z[projection, tensor] = 1.0
    with torch.no_grad():
        bert.log_range.copy_(start)
    assert spearmanr(predicted, true).statistic > 0.5


# --- a start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", BY_NAME)
@pytest.mark.parametrize("guide", LEARNING)
def test_a_started_guide_is_finite(bert, measured, guide, prior):
    program = program_of(bert, guide=guide, prior=prior)
    program.gate_guide.start(log_bayes_factors(program, measured))
    assert all(bool(p.isfinite().all()) for p in program.gate_guide.parameters())
    assert bool(program.terms(*batch()).loss.isfinite())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was_and_no_gradient_behind(bert, training):
    program = program_of(bert).train(training)
    sensitivity(program, [batch()], ranges_of(bert))
    assert program.training is program.net.training is training
    assert program.net.gate_context.gates is None and program.net.gate_context.observer is None
    assert all(p.grad is None for p in program.parameters())


def test_no_batch_at_all_is_refused(bert):
    with pytest.raises(ValueError, match="at least one batch of training examples, got none"):
        sensitivity(program_of(bert), [], ranges_of(bert))


def test_one_example_gives_finite_means_near_those_of_their_kind():
    squares = torch.tensor([1.0, 4.0, 16.0, 0.0])[None, :, None]
    pooled = _pooled(squares, torch.zeros(4))[:, 0]
    assert bool(pooled.isfinite().all()) and pooled[3] == 0
    assert pooled[0] >= 1.0 and pooled[2] <= 16.0 and bool((pooled[:3].diff() >= 0).all())
    assert pooled[2] / pooled[0] < 16.0 / 1.0
