"""Programs whose posterior can be enumerated: Gaussian toys, and the real adapter layers in a tiny BERT.

Shapes: N examples, S states; z (L, T, K), g (L, R - 1).   Units: nats.
"""

import dataclasses
import functools
from collections.abc import Callable

import pyro.distributions as dist
import torch
import transformers
from torch import Tensor, nn

from pyro_blora.adapters import attach, calibrate
from pyro_blora.gates import Gates, NestedBernoulli
from pyro_blora.guides import build_guide
from pyro_blora.layout import AdapterLayout, Projection
from pyro_blora.program import BayesianLoRA, GateProgram
from pyro_blora.tasks import get_task

from .states import States, Table

VOCABULARY, LENGTH = 50, 8
UNDECIDED = 1.0  # log-odds at which gates start, unless a rung says otherwise
OPEN_PRIOR = (-0.4, -0.5)  # log-probability of each free bit gate and rank gate of the network: open at 67 % and 61 %


class FixedPrior(nn.Module):
    """A prior with given conditional log-probabilities.  z (L, T, K), g (L, R - 1)"""

    def __init__(self, z: Tensor, g: Tensor):
        super().__init__()
        self.register_buffer("z", z)
        self.register_buffer("g", g)

    def forward(self) -> Gates:
        return Gates(NestedBernoulli(self.z, validate_args=False), NestedBernoulli(self.g, validate_args=False))


def toy_layout(chains: int, gates: int = 1) -> AdapterLayout:
    """Ladders of at most four gates and nothing else: z (chains, 1, gates), g (chains, 0)."""
    projections = tuple(
        Projection(name=f"chain.{i}", type="chain", layer=0, in_features=1, out_features=1, tokens=1, adapted=True)
        for i in range(chains)
    )
    return AdapterLayout(
        architecture="toy", projections=projections, rank=1, alpha=1.0, scope="adapted", sequence_length=1,
        model_macs=chains, tensors=("base",), ladder=(2, 4, 8, 16, 32)[: gates + 1],
    )  # fmt: skip


class LinearGaussian(GateProgram):
    """y = X (w * gates) + noise of a known standard deviation.  X (N, gates of all ladders), w likewise."""

    def __init__(self, weight: Tensor, noise: float, layout, prior, guide, **settings):
        super().__init__(layout, prior, guide, lambda mean, scale: dist.Normal(mean, noise), **settings)
        self.register_buffer("weight", weight)

    def logits(self, inputs: dict, gates: Gates, theta: Tensor | None = None) -> Tensor:
        return inputs["x"] @ (self.weight * gates.z.flatten())


@dataclasses.dataclass(frozen=True)
class Problem:
    """A program without its guide, its data, and the exact answer.

    make: (prior, guide, n_train, estimator) -> program. names: of the free gates, for figures.
    """

    make: Callable[..., GateProgram]
    layout: AdapterLayout
    prior: nn.Module
    inputs: dict
    labels: Tensor
    table: Table
    names: list[str]

    def program(self, guide: str = "mean_field", estimator: str = "relaxed", **settings) -> GateProgram:
        """The program with a guide of the package. settings: the guide's."""
        distribution = build_guide(guide, self.layout, self.prior, {"open_logit": UNDECIDED, **settings})
        return self.make(prior=self.prior, guide=distribution, n_train=len(self.labels), estimator=estimator).eval()

    def score(self, program: GateProgram, gates: Gates) -> Tensor:
        """Mean NLL of the data at gates in [0, 1], nats an example."""
        return program.nll(self.inputs, self.labels, *gates)

    def looked_up(self, gates: Gates) -> Tensor:
        """The same at a state, from the table."""
        value = self.table.log_likelihood[self.table.states.index(gates)]
        return (-value / len(self.labels)).float()

    def with_labels(self, labels: Tensor, log_likelihood: Tensor) -> "Problem":
        """The same with other labels, whose log-likelihood (S,) in every state is given."""
        return dataclasses.replace(self, labels=labels, table=Table(self.table.states, log_likelihood))


def prior_only(open_probability: tuple[float, ...] = (0.1, 0.25, 0.8)) -> Problem:
    """A flat likelihood: a ladder of one gate for each probability, and one ladder with all of them in a row."""
    gates = len(open_probability)
    z = torch.full((gates + 1, 1, gates), -torch.inf)
    z[:gates, 0, 0] = torch.tensor(open_probability).log()
    z[gates, 0] = torch.tensor(open_probability[::-1]).log()
    layout = toy_layout(gates + 1, gates)
    prior = FixedPrior(z, torch.zeros(layout.g_shape))
    x, labels = torch.zeros(4, z.numel()), torch.zeros(4)
    make = functools.partial(LinearGaussian, torch.ones(z.numel()), 1.0, layout)
    states = States.of(prior())
    return Problem(make, layout, prior, {"x": x}, labels, Table(states, torch.zeros(len(states.depths)).double()), [])


def _linear_gaussian(x: Tensor, weight: Tensor, y: Tensor, *, noise: float, open_probability: float) -> Problem:
    layout = toy_layout(len(weight))
    prior = FixedPrior(torch.full(layout.z_shape, open_probability).log(), torch.zeros(layout.g_shape))

    def log_likelihood(gates: Gates) -> Tensor:
        mean = x.double() @ (weight.double() * gates.z.flatten().double())
        return dist.Normal(mean, noise).log_prob(y.double()).sum()

    table = Table.of(States.of(prior()), log_likelihood)
    make = functools.partial(LinearGaussian, weight, noise, layout)
    return Problem(make, layout, prior, {"x": x}, y, table, [f"gate {i + 1}" for i in range(len(weight))])


def one_gate(log_likelihood_ratio: float, *, open_probability: float = 0.25) -> Problem:
    """y ~ Normal(z, 1), observed so that the data say `log_likelihood_ratio` nats for z = 1: a closed form.

    P(z = 1 | y) = sigmoid(log prior odds + log_likelihood_ratio), as log N(y; 1) - log N(y; 0) = y - 1/2.
    """
    y = torch.tensor([log_likelihood_ratio + 0.5])
    return _linear_gaussian(torch.ones(1, 1), torch.ones(1), y, noise=1.0, open_probability=open_probability)


def twelve_gates(seed: int = 0, *, correlation: float = 0.6, examples: int = 40) -> Problem:
    """Twelve gates, 4,096 states: weights from clearly needed to useless, the first two features correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 12, generator=generator)
    x[:, 1] = correlation * x[:, 0] + (1 - correlation**2) ** 0.5 * x[:, 1]
    weight = torch.tensor([0.35, 0.35, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8])
    truth = torch.bernoulli(torch.full((12,), 0.6), generator=generator)
    y = x @ (weight * truth) + torch.randn(examples, generator=generator)
    return _linear_gaussian(x, weight, y, noise=1.0, open_probability=0.4)


class Network:
    """Two projections of a tiny BERT with the real adapter layers; ladders of `free` tensors and both ranks random.

    free: names of the tensors whose ladders are free in both projections; `base` leaves 400 states, `input` with it
    10,000. log_probs (S, N, 2): the log-probability of each label for each input in each state.
    """

    def __init__(self, *, examples: int = 128, free: tuple[str, ...] = ("base",), seed: int = 0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = attach(_tiny_bert(), rank=4, alpha=8.0, sequence_length=LENGTH,
                              target_modules=r".*layer\.1\..*(query|value)")  # fmt: skip
            for name, parameter in self.net.named_parameters():
                parameter.requires_grad_(False)
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(2, VOCABULARY, (examples, LENGTH), generator=generator)
        self.inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        calibrate(self.net, [self.inputs])
        self.net.eval()
        layout, task = self.net.layout, get_task("sst2")
        z, g = torch.zeros(layout.z_shape), torch.full(layout.g_shape, OPEN_PRIOR[1])
        for tensor in free:
            z[:, layout.tensors.index(tensor)] = OPEN_PRIOR[0]
        self.prior = FixedPrior(z, g)
        self.states = States.of(self.prior())
        self.make = functools.partial(BayesianLoRA, self.net, likelihood=task.likelihood)
        self.names = self._names(free)

    def program(self) -> GateProgram:
        """With an undecided mean field; no state is enumerated for it."""
        guide = build_guide("mean_field", self.net.layout, self.prior, {"open_logit": UNDECIDED})
        return self.make(prior=self.prior, guide=guide, n_train=len(self.inputs["input_ids"])).eval()

    @functools.cached_property
    @torch.no_grad()
    def log_probs(self) -> Tensor:
        program = self.program()
        rows = [program.logits(self.inputs, Gates(z, g)) for z, g in zip(*self.states.gates, strict=True)]
        return torch.stack(rows).double().log_softmax(-1)

    def _names(self, free: tuple[str, ...]) -> list[str]:
        layout, names = self.net.layout, []
        for p in layout.projections:
            for tensor in sorted(free, key=layout.tensors.index):
                names += [f"{p.type} {tensor} {bits} bit" for bits in layout.ladder[1:]]
        for p in layout.projections:
            names += [f"{p.type} rank {rank}" for rank in range(2, layout.rank + 1)]
        return names

    def drawn(self, states: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Labels from the model at each of D states, and their log-likelihood in all: (D,) -> (D, N), (D, S)."""
        one = self.log_probs[states, :, 1].exp()  # (D, N)
        labels = (torch.rand(one.shape, generator=generator, dtype=one.dtype) < one).long()
        return labels, labels.double() @ self.log_probs[..., 1].T + (1 - labels).double() @ self.log_probs[..., 0].T

    def problem(self, *, depths: tuple[int, ...] | None = None, seed: int = 0) -> Problem:
        """Labels drawn at one known state, given by the depth of each free ladder (default: half open)."""
        depths = tuple(size // 2 for size in self.states.sizes) if depths is None else depths
        state = (self.states.depths == torch.tensor(depths)).all(-1).nonzero()[0]
        labels, rows = self.drawn(state, torch.Generator().manual_seed(seed))
        table = Table(self.states, rows[0])
        return Problem(self.make, self.net.layout, self.prior, self.inputs, labels[0], table, self.names)


def _tiny_bert() -> transformers.BertForSequenceClassification:
    """BERT of 2 layers with weights large enough that a changed layer shows in the labels."""
    return transformers.BertForSequenceClassification(transformers.AutoConfig.for_model(
        "bert", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=LENGTH, initializer_range=0.4, num_labels=2,
    ))  # fmt: skip
