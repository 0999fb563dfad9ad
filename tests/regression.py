"""Bayesian linear regression on frozen features, of known posterior, as a program with any weights' distribution."""

import math

import torch
from models import toy_layout
from torch import nn

from pyro_blora.guides import build_guide
from pyro_blora.priors import build_prior
from pyro_blora.program import GateProgram
from pyro_blora.tasks.normal import Normal
from pyro_blora.weights import build_weights

N, D, NOISE, PRIOR, SLOPE = 60, 4, 0.7, 1.3, 2.5  # a label is SLOPE times its logit, as of STS-B


class LinearRegression(GateProgram):
    """label ~ Normal(features theta, NOISE): the posterior of theta is Gaussian, and known."""

    dropout = 0.0  # of the features

    def __init__(self, name, **settings):
        layout = toy_layout()
        prior = build_prior("fixed", layout, {"bits": 32})
        self_weights = {(0, "core"): nn.Parameter(torch.zeros(2, 2))}
        distribution = build_weights(name, self_weights, {}, settings)
        super().__init__(
            layout,
            prior,
            build_guide("mean_field", layout, prior),
            Normal(-SLOPE, SLOPE),
            n_train=N,
            weights=distribution,
        )
        self.core = self_weights[0, "core"]
        self.log_scale.data.fill_(math.log(NOISE)).requires_grad_(False)

    def logits(self, inputs, gates, theta=None):
        theta = self.core.flatten() if theta is None else theta
        features = nn.functional.dropout(inputs["features"], self.dropout, self.training)
        return (features * theta).sum(-1, keepdim=True) / SLOPE


def regression_data():
    """Correlated features, labels, and the posterior's mean and covariance under Normal(0, PRIOR^2)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(D) + 0.8 * torch.randn(D, D, generator=generator).triu(1)
    features = torch.randn(N, D, generator=generator) @ mixing
    labels = features @ torch.tensor([0.5, -1.0, 0.3, 0.8]) + NOISE * torch.randn(N, generator=generator)
    precision = features.T @ features / NOISE**2 + torch.eye(D) / PRIOR**2
    covariance = torch.linalg.inv(precision)
    return {"features": features}, labels, covariance @ features.T @ labels / NOISE**2, covariance


def fitted(name, data, *, steps, start=None, dropout=0.0, **settings):
    """The program after so many steps of Adam on -ELBO / N, from `start` (D,) or 0."""
    torch.manual_seed(0)
    program = LinearRegression(name, **settings)
    program.dropout = dropout
    if start is not None:
        program.core.data.copy_(start.view_as(program.core))
    inputs, labels, *_ = data
    rates = [(program.core, 0.02), *((p, 0.02) for p in program.weights.parameters())]
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in rates])
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.002, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        program.terms(inputs, labels).loss.backward()
        optimizer.step()
        falling.step()
    return program
