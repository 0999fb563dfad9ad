"""What an ELBO must keep, tried where the exact expectation is known: on a program with three free gates."""

from collections.abc import Callable, Sequence

import torch
from pyro import poutine
from torch import Tensor, nn

from ..elbos import Elbo
from ..gates import Gates, NestedBernoulli
from ..guides.base import build_guide
from ..priors.base import Constant
from ..program import GateProgram
from ..registries import ELBOS
from ..tasks import get_task
from .promises import Refuse, example_layout, refusing, tried

_N, _B = 40, 8  # training examples, and those of the batch
_DRAWS, _ERRORS = 400, 5.0  # estimates, and the standard errors that their mean may be off
_SAME = 1e-5  # relative
Batch = tuple[dict[str, Tensor], Tensor]  # inputs and labels


def check_elbo(elbo: str | Callable, settings: dict | None = None) -> Elbo:
    """Refuse an ELBO that breaks a promise, with a sentence that names it; returns the ELBO.

    elbo: a registered name, `file.py:function`, or the class or function itself.
    Errors: ValueError naming the ELBO, what is wrong and the remedy.
    """
    refuse = refusing(ELBOS, elbo)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = _program(elbo, settings)  # refuses what is no Elbo
        batch: Batch = {"x": torch.randn(_B, 3)}, torch.arange(_B) % 2
        _check_losses(program, batch, refuse)
        _check_gradients(program, batch, refuse)
        _check_held(program, batch, refuse)
        if program.hard:  # a soft draw's value is biased by its temperature
            _check_value(program, _program("enumerate").terms(*batch).nll, batch, refuse)
    return program.elbo


class _ThreeGates(GateProgram):
    """Logits that depend on three gates, not in proportion to them."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.weight = nn.Parameter(torch.tensor([[1.0, -1.0], [0.5, 0.0], [-1.0, 2.0]]))

    def logits(self, inputs: dict, gates: Gates, theta: Tensor | None = None) -> Tensor:
        moved = 1.0 + gates.z[0, 0, :2].sum() * (2.0 - gates.g[0, 0])
        return moved * inputs["x"] @ self.weight


def _program(elbo: str | Callable, settings: dict | None = None) -> _ThreeGates:
    layout = example_layout(layers=1)
    z, g = torch.zeros(layout.z_shape), torch.zeros(layout.g_shape)  # log p: open for sure
    z[0, 0, :2], z[0, 0, 2:], g[0, 0], g[0, 1:] = -0.7, -torch.inf, -0.4, -torch.inf
    prior = Constant(Gates(NestedBernoulli(z), NestedBernoulli(g)))
    guide = build_guide("mean_field", layout, prior, {"open_logit": 0.3})
    kind = get_task("sst2").likelihood
    return _ThreeGates(layout, prior, guide, kind, n_train=_N, estimator=elbo, estimator_settings=settings)


def _check_losses(program: GateProgram, batch: Batch, refuse: Refuse) -> None:
    """All ways to ask are the same loss, and its KL is exact."""
    elbo, pair = program.elbo, (program.model, program.guide)
    ways = {
        "terms().loss times N": lambda: _N * program.terms(*batch).loss,
        "differentiable_loss": lambda: elbo.differentiable_loss(*pair, *batch),
        "loss": lambda: elbo.loss(*pair, *batch),
        "loss_and_grads": lambda: elbo.loss_and_grads(*pair, *batch),
    }
    found = {}
    for name, way in ways.items():
        torch.manual_seed(1)
        found[name] = torch.as_tensor(tried(way, name, refuse)).item()
    if not all(abs(value - found["loss"]) <= _SAME * abs(found["loss"]) for value in found.values()):
        refuse(f"the same draws give different losses, {found}: each is -ELBO in nats, N times that of terms()")
    with torch.no_grad():
        terms, kl = program.terms(*batch), program.kl()
    if not (torch.allclose(terms.kl_z, kl.z) and torch.allclose(terms.kl_g, kl.g)):
        refuse(
            f"kl_z, kl_g are {float(terms.kl_z):g}, {float(terms.kl_g):g}, in closed form they are {float(kl.z):g}, "
            f"{float(kl.g):g}: leave them to GateELBO.terms, and do not estimate them"
        )


def _check_gradients(program: _ThreeGates, batch: Batch, refuse: Refuse) -> None:
    """The gradient of the NLL reaches the guide and the network."""
    nll = program.terms(*batch).nll
    learning = {"network's weight": program.weight, **dict(program.gate_guide.named_parameters())}
    slopes: Sequence[Tensor | None] = [None] * len(learning)
    if nll.requires_grad:
        slopes = torch.autograd.grad(nll, [*learning.values()], allow_unused=True)
    for name, slope in zip(learning, slopes, strict=True):
        if slope is None or not bool(slope.isfinite().all()):
            refuse(
                f"the gradient of the expected NLL does not reach the {name!r}, or is not finite: nothing is learned"
            )


def _check_held(program: GateProgram, batch: Batch, refuse: Refuse) -> None:
    """Before the gates start they are given, and nothing is drawn."""
    inputs, labels = batch
    opened = Gates(torch.ones(program.layout.z_shape), torch.ones(program.layout.g_shape))
    pair = [poutine.condition(part, data=opened._asdict()) for part in (program.model, program.guide)]
    terms = tried(lambda: program.elbo.terms(*pair, *batch), "terms() with given gates", refuse)
    if not torch.allclose(terms.nll, program.nll(inputs, labels, *opened)) or terms.gate_weight != 0:
        refuse("where the gates are given, terms() must be their NLL and KLs of weight 0: leave that to GateELBO.terms")


@torch.no_grad()
def _check_value(program: GateProgram, exact: Tensor, batch: Batch, refuse: Refuse) -> None:
    each = torch.stack([program.terms(*batch).nll for _ in range(_DRAWS)]).double()
    error = each.std() / _DRAWS**0.5
    if float((each.mean() - exact).abs()) > _ERRORS * float(error) + _SAME * float(exact):
        refuse(
            f"its estimates of the expected NLL have mean {float(each.mean()):.4f} ± {float(error):.4f}, exact is "
            f"{float(exact):.4f} nats per example: draw from the guide's distributions, and weigh draws by 1"
        )
