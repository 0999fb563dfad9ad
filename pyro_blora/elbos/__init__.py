"""ELBOs by name: how the gradient of the expected log-likelihood is estimated; the KL is in closed form.

    relaxed            one soft draw, reparametrized: low variance, biased by the temperature
    straight_through   one hard draw with the soft draw's gradient: exact values, biased gradient
    score_function     two antithetic hard draws: unbiased, two forwards, variance grows with the number of gates
    gauss_newton       one hard draw, its slopes and their curvature: a natural gradient, of one forward
    enumerate          the sum over all states: exact, for programs with few free gates

Each is a `pyro.infer` ELBO, which plain SVI accepts:

    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), program.elbo)

Measured bias and variance: benchmarks/posterior.md.
"""

from ..registries import ELBOS, register_elbo
from .base import Elbo, Evaluation, GateELBO, Terms, build_elbo
from .divergences import JOINT, JointDivergence
from .enumeration import Enumerate
from .gauss_newton import GaussNewton
from .relaxed import Relaxed, StraightThrough
from .score_function import ScoreFunction

__all__ = [
    "ELBOS", "JOINT", "Elbo", "Enumerate", "Evaluation", "GateELBO", "GaussNewton", "JointDivergence", "Relaxed",
    "ScoreFunction", "StraightThrough", "Terms", "build_elbo", "register_elbo",
]  # fmt: skip
