"""Distillation: the divergence of every kind of outcome, what replaces the NLL, and a teacher that stays as it was."""

import dataclasses

import pyro.distributions as dist
import pytest
import torch
from models import batch, tiny_bert
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import attach
from pyro_blora.__main__ import main
from pyro_blora.adapters import calibrate
from pyro_blora.build import build
from pyro_blora.checkpoint import trainable
from pyro_blora.distillation import Distilled, Teacher
from pyro_blora.guides import build_guide
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import MultiLabel, TokenLabels, get_task
from pyro_blora.tasks.categorical import Categorical
from pyro_blora.tasks.likelihoods import IGNORED
from pyro_blora.tasks.normal import Normal
from pyro_blora.training import Schedule, fit

pytestmark = pytest.mark.usefixtures("eager")
KINDS = [Categorical(("a", "b", "c")), MultiLabel(("a", "b")), TokenLabels(("a", "b", "c")), Normal(0.0, 5.0)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_the_divergence_is_the_mean_of_the_log_ratio_over_the_teachers_answers(kind):
    torch.manual_seed(0)
    of_words = isinstance(kind, TokenLabels)
    shape = (3, 4, kind.outputs) if of_words else (3, kind.outputs)
    teacher, student = (kind(torch.randn(shape), scale=torch.tensor(s)) for s in (0.5, 0.8))
    labels = torch.zeros(shape[:-1], dtype=torch.long)
    drawn = teacher.sample((40_000,))
    if of_words:
        labels[0, 2:] = IGNORED
        drawn = torch.where(labels == IGNORED, IGNORED, drawn)
    ratio = teacher.log_prob(drawn) - student.log_prob(drawn)
    found = kind.divergence(teacher, student, labels)
    assert found.shape == (3,) and bool((found > 0).all())
    assert torch.allclose(found, ratio.mean(0), atol=0.03)


def taught(estimator="straight_through"):
    """(a program with a teacher whose adapter then moved on, the teacher's answers to a batch, the batch)."""
    torch.manual_seed(0)
    net, (inputs, labels) = attach(tiny_bert(), rank=4, sequence_length=10), batch()
    for p in net.adapter_parameters():
        torch.nn.init.normal_(p, std=0.2)
    calibrate(net, [inputs])
    prior = build_prior("bops", net.layout)
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": 1.0})
    program = BayesianLoRA(net, prior, guide, get_task("sst2").likelihood, n_train=100, estimator=estimator)
    program.teacher = Teacher(net, program.log_scale, 0.25, gates_close=program.gates_close)
    with torch.no_grad():
        before = program.eval().logits(inputs, program.opened).softmax(-1)
        for p in net.adapter_parameters():
            p.add_(0.1 * torch.randn_like(p))
    return program.train(), before, inputs, labels


@pytest.mark.parametrize("estimator", ["straight_through", "score_function"])
def test_the_nll_is_mixed_with_the_divergence_from_the_frozen_open_network(estimator):
    program, before, inputs, labels = taught(estimator)
    modes = [module.training for module in program.modules()]
    torch.manual_seed(1)
    loss, terms = program(inputs, labels, 0.5)
    assert modes == [module.training for module in program.modules()] and any(modes)
    kl = (terms.kl_z + terms.kl_g) / program.n_train
    torch.testing.assert_close(loss, 0.75 * terms.nll + 0.25 * terms.teacher_kl + kl)
    answers = program.teacher.answers(program.net, program.likelihood, program.opened, inputs)
    torch.testing.assert_close(answers.probs, before)  # not the adapter of this step, and without dropout
    program.teacher.weight = 0.0
    torch.manual_seed(1)
    torch.testing.assert_close(program(inputs, labels, 0.5)[0], terms.nll + kl)


def test_its_gradient_is_that_of_both_parts():
    """Per logit: (1 - W) (p - y) + W (p - teacher), over the batch."""
    kind, (teacher, logits) = KINDS[0], torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels, logits = torch.tensor([0, 1, 2, 0]), logits.requires_grad_()
    of_teacher = kind(teacher)
    minus = Distilled(kind, of_teacher, 0.25).mixed(kind(logits), labels)
    (slope,) = torch.autograd.grad(-minus.sum(), logits)
    p, y = logits.softmax(-1), torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(slope, 0.75 * (p - y) + 0.25 * (p - of_teacher.probs))


def test_the_teacher_is_the_network_where_the_gates_start_and_no_part_of_what_is_exported(backbone, tmp_path):
    config = tiny_config(backbone, distillation=0.5)
    opening = Schedule.of(config, 64).opening
    left = fit(config, folder=tmp_path, quiet=True, until=opening).program
    there = {name: p.detach().clone() for name, p in left.net.named_parameters() if p.requires_grad}
    whole = fit(config, folder=tmp_path, quiet=True)
    copies = whole.program.teacher
    for name in copies.names:
        assert torch.equal(copies.get_buffer(name.replace(".", "/")), there[name]), name
    assert any(not torch.equal(there[name], p) for name, p in whole.program.net.named_parameters() if name in there)
    assert not any("teacher" in name for name in trainable(whole.program))
    assert ["teacher_kl" in line for line in whole.metrics] == [True] * 8
    assert [line["teacher_kl"] > 0 for line in whole.metrics] == [step >= opening for step in range(8)]
    plain = fit(dataclasses.replace(config, distillation=0.0), quiet=True)
    assert "teacher_kl" not in plain.metrics[-1] and plain.metrics[0]["loss"] == whole.metrics[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": "fixed"}, "nothing is to be distilled, as every gate stays open"),
        ({"kl_warmup": 0.0}, "give a --kl_warmup between 0 and 1"),
        ({"kl_warmup": 1.0}, "give a --kl_warmup between 0 and 1"),
    ],
    ids=str,
)
def test_what_cannot_be_distilled_is_refused_before_anything_is_written(backbone, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(tiny_config(backbone, distillation=0.5, **changes), folder=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_weight_that_is_no_share_is_one_sentence(capsys):
    assert main(["train", "--distillation", "1.5"]) == 2
    assert "distillation must be between 0 and 1, got 1.5" in capsys.readouterr().err


def test_a_kind_without_a_divergence_is_refused():
    program, _, inputs, labels = taught()
    program.likelihood = type("Own", (Categorical,), {"__call__": lambda self, x, scale=None: _Own(logits=x)})(
        ("no", "yes")
    )
    with pytest.raises(ValueError, match="define `divergence` of the Likelihood, or drop --distillation"):
        program(inputs, labels, 0.5)


class _Own(dist.TorchDistribution):
    """No subclass of a distribution of torch's."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, logits):
        self.inner = dist.Categorical(logits=logits)
        super().__init__(self.inner.batch_shape, validate_args=False)

    def log_prob(self, value):
        return self.inner.log_prob(value)


def test_it_is_built_for_a_training_and_not_to_be_loaded(backbone):
    assert build(tiny_config(backbone)).program.teacher is None
