"""Initialize the gate guide from per-example Fisher sensitivities, found in one pass of gradients with all gates open.

Putting tensor c on the grid of b bits changes its value by a known amount, and the loss of example i changes by D_icb =
<gradient_i, Q_b(x) - x>, to first order. With gradient_i that of the log-likelihood in a random direction of its Fisher
metric, the mean of D^2 is the Fisher information along that change, its curvature; so an allocation a raises the NLL of
N examples by

    rise(a) = N / 2 * mean_i (sum_c D_ic,a_c)^2  ~  N / 2 * [sum_c m_c^2 + (sum_c u_c)^2 - sum_c u_c^2]      nats

with m_c the root mean square of D_ic,a_c and u_c = sqrt(rho) m_c its part in common with the others. The square of the
sum is what makes errors add up, and lets the gates see each other. Its many correlations are known too badly from a few
hundred examples (a search over allocations finds those that cancel in the sample only), so all ladders at one depth
share one, rho, and other pairs have its geometric mean. The log Bayes factor of a depth of a ladder against the open
one is minus its contribution to the rise, at the mean of the other ladders' distributions; mean-field updates find all
distributions together. Each m^2 is shrunk towards that of its role (tensor and type of projection), the more the larger
its sampling error is. The first-order term, N mean D, is left out: over M examples its standard error is N sd(D) /
sqrt(M), which exceeds every rise below 2 N / M nats; it would close gates on noise.

Slopes are taken per example, so that M is the number of examples, not of batches: for an activation the sums run over
its example, for a weight W the change of the output is x (Q_b(W) - W)', which has an example dimension. A further call
without one (DeBERTa's positions) is not counted; where a layer has no call that leads with the example (a network that
flattens tokens), examples are passed one by one. Ranks are closed in the same way.
Source: Optimal Brain Damage (1990) with the Fisher for the Hessian; the constant correlation of Ledoit and Wolf (2004).
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.example_axis import without_examples
from ..adapters.gate_context import Observer, watched
from ..adapters.gated_model import GatedModel, observed
from ..gates import Gates
from ..layout import AdapterLayout
from ..program import BayesianLoRA
from ..quantizer.grid import rounded

_FINE = 8  # bits above which rounding is taken to cost nothing: at 8 bits it was measured as about 0 nats everywhere
_UPDATES = 200  # of all distributions together, each a tenth of the way: the remaining error is 1e-9 of the first
_STEP = 0.1
log = logging.getLogger(__name__)


class _Slopes(Observer):
    """Slopes of moving every tensor by s (Q_b(x) - x) at s = 0, one s for each example, tensor and width; of each rank.

    z (B, L, T, widths), g (B, L, R - 1): zeros, whose gradients the slopes are.
    """

    def __init__(self, layout: AdapterLayout, ranges: Tensor, batch: int):
        self.layout, self.ranges, self.batch = layout, ranges, batch
        self.widths = [i for i, bits in enumerate(layout.ladder) if bits <= _FINE]
        self.bits, device = layout.ladder, ranges.device
        self.z = torch.zeros(batch, *layout.z_shape[:2], len(self.widths), device=device, requires_grad=True)
        self.g = torch.zeros(batch, *layout.g_shape, device=device, requires_grad=True)

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        if not self._has_examples(x):
            return x

        def slopes(grad: Tensor, x: Tensor) -> Tensor:
            changes = self._changes(projection, tensor, x)
            return torch.stack([self._by_example(grad, change) for change in changes], -1)

        return watched(x, self.z[:, projection, tensor], slopes, x)

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        if not self._has_examples(x):
            return y

        def slopes(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
            x, changes = x.to(self.z.dtype), self._changes(projection, tensor, weight)
            return torch.stack([self._by_example(grad, F.linear(x, change)) for change in changes], -1)

        return watched(y, self.z[:, projection, tensor], slopes, x, weight)

    def ranks(self, projection: int, hidden: Tensor) -> Tensor:
        if not self._has_examples(hidden):
            return hidden

        def slopes(grad: Tensor, hidden: Tensor) -> Tensor:
            each = grad.to(self.g.dtype) * hidden  # (B, ..., R)
            return each.reshape(self.batch, -1, each.shape[-1]).sum(1)[:, 1:]

        return watched(hidden, self.g[:, projection], slopes, hidden)

    def _has_examples(self, x: Tensor) -> bool:
        """Of a batch of one, everything is that example's."""
        return self.batch == 1 or len(x) == self.batch

    def _changes(self, projection: int, tensor: int, x: Tensor) -> Iterable[Tensor]:
        x, ranges = x.to(self.z.dtype), self.layout.ranges_of(self.ranges, projection, tensor)
        for i in self.widths:
            yield rounded(x, ranges[..., i], self.bits[i]) - x

    def _by_example(self, grad: Tensor, change: Tensor) -> Tensor:
        """<grad, change> of each example, (B,)."""
        return (grad.to(change.dtype) * change).reshape(self.batch, -1).sum(1)


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Change of an example's NLL at each depth of each ladder: root mean square, and the part that all ladders share.

    alone, common: z (L, T, K + 1), g (L, R), nats; 0 at the open depth. curvature: mean products of the changes at two
    depths, z (L, T, K + 1, K + 1), g (L, R, R); on its diagonal the squares of `alone`.
    """

    alone: Gates
    common: Gates
    curvature: Gates

    @classmethod
    def of(cls, z: Tensor, g: Tensor, kinds: Tensor) -> "Sensitivity":
        """From the changes of M examples, z (M, L, T, K + 1) and g (M, L, R); kinds (L,) numbers the projections'."""
        alone = Gates(*(_pooled(x.square(), kinds).sqrt() for x in (z, g)))
        products = Gates(*(torch.einsum("m...d,m...e->...de", x, x) / len(x) for x in (z, g)))
        curvature = Gates(*(_rescaled(x, to) for x, to in zip(products, alone, strict=True)))
        shared = (_correlation(x.flatten(1, -2)).sqrt() for x in (z, g))  # (K + 1,), (R,)
        return cls(alone, Gates(*(root * rho for root, rho in zip(alone, shared, strict=True))), curvature)

    def rise(self, depth_probs: Gates, n_train: float) -> Tensor:
        """Expected rise of the NLL of `n_train` examples, nats.  depth_probs: z (L, T, K + 1), g (L, R)"""
        squares = sum((m.square() * q).sum() for m, q in zip(self.alone, depth_probs, strict=True))
        common = torch.cat([(u * q).sum(-1).flatten() for u, q in zip(self.common, depth_probs, strict=True)])
        return n_train / 2 * (squares + common.sum().square() - common.square().sum())

    def log_bayes_factors(self, log_prior: Callable[[Gates], Gates], n_train: float) -> Gates:
        """Log Bayes factors of each ladder's depths, mean field, up to a constant, nats.  z (L, T, K + 1), g (L, R).

        log_prior: maps the current probabilities of the depths to the prior's log-probabilities, both Gates in these
        shapes; called at every update, for priors that adapt to the marginals.
        """
        log_factors = Gates(*(-n_train / 2 * m.square() for m in self.alone))
        distributions = Gates(
            *(F.one_hot(torch.tensor(x.shape[-1] - 1), x.shape[-1]).to(x).expand_as(x) for x in self.alone)
        )
        for _ in range(_UPDATES):
            prior = log_prior(distributions)
            distributions = Gates(*((p + e).softmax(-1) for p, e in zip(prior, log_factors, strict=True)))
            means = Gates(*((u * q).sum(-1, keepdim=True) for u, q in zip(self.common, distributions, strict=True)))
            total = means.z.sum() + means.g.sum()
            for factor, m, u, mean in zip(log_factors, self.alone, self.common, means, strict=True):
                factor.lerp_(-n_train / 2 * (m.square() + 2 * u * (total - mean)), _STEP)
        return log_factors


def _pooled(squares: Tensor, kinds: Tensor) -> Tensor:
    """Means over M, shrunk on the log scale towards their mean over projections of a kind: random effects.

    squares (M, L, ...) >= 0 -> (L, ...); a mean of zero, as of what does not exist, stays zero and draws no other one.
    Source: DerSimonian and Laird (1986).
    """
    mean = squares.mean(0)
    variance = squares.var(0) if len(squares) > 1 else mean.square()  # of one example: as of an exponential
    noise = variance / len(squares) / mean.square().clamp(min=1e-30)  # variance of log(mean), (L, ...)
    log_mean, noise, pooled = mean.clamp(min=1e-30).log(), noise.clamp(min=1e-6), mean.clone()
    for kind in kinds.unique():
        own, error, exists = log_mean[kinds == kind], noise[kinds == kind], mean[kinds == kind] > 0
        weight, count = exists / error, exists.sum(0)
        centre = (weight * own).sum(0) / weight.sum(0).clamp(min=1e-30)
        excess = (weight * (own - centre).square()).sum(0) - (count - 1)
        spread = excess / (weight.sum(0) - weight.square().sum(0) / weight.sum(0).clamp(min=1e-30)).clamp(min=1e-30)
        spread = torch.where(count > 1, spread.clamp(min=0.0), torch.inf)  # alone: nothing to pool
        weight = exists / (spread + error)
        centre = (weight * own).sum(0) / weight.sum(0).clamp(min=1e-30)
        keep = 1 / (1 + error / spread)
        pooled[kinds == kind] = torch.exp(keep * own + (1 - keep) * centre)
    return torch.where(mean > 0, pooled, 0.0)


def _rescaled(products: Tensor, to: Tensor) -> Tensor:
    """With the same correlations, and `to` squared on the diagonal.  (..., D, D), (..., D)"""
    factor = to / products.diagonal(dim1=-2, dim2=-1).sqrt().clamp(min=1e-30)
    return products * factor[..., :, None] * factor[..., None, :]


def _correlation(D: Tensor) -> Tensor:
    """The correlation of all pairs of ladders, from the mean square of their sum.  (M, C, depths) -> (depths,)"""
    own = D.square().mean(0)  # (C, depths)
    crossed = D.sum(1).square().mean(0) - own.sum(0)
    return (crossed / (own.sqrt().sum(0).square() - own.sum(0)).clamp(min=1e-30)).clamp(0.0, 1.0)


def sensitivity(program: BayesianLoRA, batches: Iterable[tuple[dict, Tensor]], ranges: Tensor) -> Sensitivity:
    """Slopes of the examples in `batches`; the values of their labels are not used.

    ranges (*layout.range_shape, K + 1): of each tensor at each bit width.   Errors: ValueError without any batch.
    """
    z, g = [], []
    for inputs, labels in _with_examples(program.net, batches):
        observer = _Slopes(program.layout, ranges, len(labels))
        with observed(program.net, observer):
            logits = program.net.logits(**inputs)
            directions = program.likelihood.fisher_directions(logits.detach(), labels, program.log_scale.exp().detach())
            slopes = (logits * directions).sum()
            slope_z, slope_g = torch.autograd.grad(slopes, (observer.z, observer.g), materialize_grads=True)
        z.append(F.pad(slope_z, (0, len(program.layout.ladder) - slope_z.shape[-1])))
        g.append(F.pad(-slope_g.flip(-1).cumsum(-1).flip(-1), (0, 1)))
    if not z:
        raise ValueError("the gates start from at least one batch of training examples, got none")
    types = [p.type for p in program.layout.projections]
    kinds = torch.tensor([types.index(kind) for kind in types], device=ranges.device)
    return Sensitivity.of(torch.cat(z), torch.cat(g), kinds)


def _with_examples(net: GatedModel, batches: Iterable[tuple[dict, Tensor]]) -> Iterator[tuple[dict, Tensor]]:
    """The batches, or their examples one by one where a layer sees tensors that do not lead with the example."""
    together: bool | None = None
    for inputs, labels in batches:
        for own, at in net.head.groups(inputs):
            truth = labels[at]
            if together is None and len(truth) > 1:
                together = not (apart := without_examples(net, own))
                if not together:
                    log.info("slopes are taken example by example: %s mix the examples of a batch", ", ".join(apart))
            for one in [slice(None)] if together else (slice(i, i + 1) for i in range(len(truth))):
                yield {key: x[one] for key, x in own.items()}, truth[one]


@torch.no_grad()
def log_bayes_factors(program: BayesianLoRA, data: Sensitivity, kl_weight: float = 1.0) -> Gates:
    """For `guide.start`; a prior that adapts follows the marginals meanwhile.  z (L, T, K + 1), g (L, R), nats.

    kl_weight: of the KL in the loss; below 1 the examples count for more.
    """
    prior = program.prior

    def log_prior(distributions: Gates) -> Gates:
        if prior.adapts:
            prior.adapt(Gates(*(q.flip(-1).cumsum(-1).flip(-1)[None, ..., 1:] for q in distributions)))  # marginals
        return Gates(*(q.depth_log_probs for q in prior()))

    return data.log_bayes_factors(log_prior, program.n_train / kl_weight)
