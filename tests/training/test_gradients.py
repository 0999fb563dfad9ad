"""Gradients of a micro-batch: what a step asks the host, what is checked once; on CUDA, the graph of a step."""

import logging
import traceback

import pytest
import torch
import transformers
from models import batch, tiny_bert, tiny_deberta, tiny_deberta_v2, tiny_gpt2, tiny_language_model, tiny_llama
from tiny import save_tiny_backbone, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_blora import attach, fit
from pyro_blora.adapters import calibrate
from pyro_blora.distillation import Teacher
from pyro_blora.guides import build_guide
from pyro_blora.models.relative_positions import remember_positions
from pyro_blora.posterior import deployed
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import CausalLM, MultipleChoice, Spans, get_task
from pyro_blora.tasks.likelihoods import IGNORED
from pyro_blora.training.gradients import Gradients
from pyro_blora.weights import build_weights


def tied_language_model():
    return tiny_language_model(tie_word_embeddings=True)


def tiny_reader():
    config = tiny_bert().config
    torch.manual_seed(0)
    return transformers.BertForQuestionAnswering(config)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: a CUDA graph needs one")
RECORDED = {
    "adapted": {},
    "encoder": {"scope": "encoder", "build": tiny_deberta},
    "DeBERTaV2, shared inputs": {"build": tiny_deberta_v2, "share_inputs": True},
    "by channel, seven widths": {"granularity": "channel", "ladder": (2, 3, 4, 6, 8, 16, 32)},
    "decoder": {"build": tiny_llama, "target_modules": ["q_proj", "v_proj"]},
    "bf16": {"build": tiny_deberta, "scope": "encoder", "autocast": torch.bfloat16},
    "XS, Gaussian weights": {"adapter": "xs", "weights": "gaussian"},
    "budget": {"prior": "budget", "prior_settings": {"bops": 0.5}},
    "hierarchical": {"prior": "hierarchical"},
    "mixture": {"guide": "mixture"},
    "straight-through": {"estimator": "straight_through"},
    "Gauss-Newton": {"estimator": "gauss_newton", "guide": "mixture"},
    "plain LoRA": {"prior": "fixed", "prior_settings": {"bits": 32}},
    "8 bit": {"prior": "fixed", "prior_settings": {"bits": 8}},
    "distillation, smoothing": {"build": tiny_deberta, "distillation": 0.5, "smoothing": True},
    "GPT-2": {"build": tiny_gpt2, "scope": "encoder"},
    "language model": {"build": tiny_language_model, "kind": CausalLM(), "distillation": 0.5},
    "multiple choice": {"build": tiny_language_model, "kind": MultipleChoice(("A", "B")), "distillation": 0.5},
    "spans": {"build": tiny_reader, "kind": Spans()},
    "spans, distillation": {"build": tiny_reader, "kind": Spans(), "distillation": 0.5},
    "language model's head": {"build": tied_language_model, "kind": CausalLM(), "scope": "encoder+head"},
}


def batch_of(name, **settings):
    """Inputs and labels, as the kind of outcome has them."""
    inputs, labels = batch(**settings)
    if name.startswith("spans"):  # two windows of each text, whose tokens are those of the first
        of_windows = [batch(**{**settings, "seed": seed})[0] for seed in (settings.get("seed", 0), 9)]
        inputs = {key: torch.stack([x[key] for x in of_windows], 1) for key in inputs}
        places = torch.arange(inputs["input_ids"].shape[-1])
        labels = torch.stack([(places == 3).long(), *[places] * 3]).expand(len(labels), -1, -1)  # from token 0 to 1
    if name.startswith("language model"):
        labels = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"].roll(-1, 1), IGNORED)
    if name == "multiple choice":
        labels = torch.stack([labels, torch.full_like(labels, 4), *torch.tensor([[7], [8]]).expand(2, len(labels))], 1)
    return inputs, labels


def program_of(
    build=tiny_bert, prior="bops", prior_settings=None, guide="mean_field", weights="point", estimator="relaxed",
    autocast=None, device="cpu", distillation=0.0, kind=None, **attached,
):  # fmt: skip
    torch.manual_seed(0)
    likelihood = kind or get_task("sst2").likelihood
    net = attach(build(), rank=4, sequence_length=10, head=likelihood.head, **attached)
    for p in net.adapter_parameters():
        torch.nn.init.normal_(p, std=0.2)
    net.autocast = autocast
    calibrate(net, [batch()[0]])
    prior = build_prior(prior, net.layout, prior_settings or {})
    guide = build_guide(guide, net.layout, prior, {"open_logit": 1.0})
    distribution = build_weights(weights, net.random_weights(), dict(enumerate(net.head_parameters())), {})
    program = BayesianLoRA(net, prior, guide, likelihood, n_train=100, weights=distribution, estimator=estimator)
    if distillation:
        program.teacher = Teacher(net, program.log_scale, distillation, gates_close=True)
    return program.to(device).train()


def learning(program):
    return [p for p in program.parameters() if p.requires_grad]


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


class Transfers(TorchDispatchMode):
    """On the meta device, in the place of a GPU: what comes from the host. Numbers that kernels take do not."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        of_host = any(x.device.type == "cpu" and (x.dim() or "copy" in str(function)) for x in tensors)
        if of_host and any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves(out)):
            frames = [f for f in traceback.extract_stack() if "torch/" not in f.filename]
            self.found.append(f"{function} at {frames[-2].filename}:{frames[-2].lineno}")
        return out


# bf16: the meta device has no autocast; Gaussian weights: their distribution has parameters, which a move replaces
@pytest.mark.parametrize("name", [name for name in RECORDED if name not in ("bf16", "XS, Gaussian weights")])
def test_a_step_asks_the_host_for_nothing(name, monkeypatch, eager):
    """The meta device has no values: reading one raises. After the first step, which makes DeBERTa's positions."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": False)  # it does not know the device
    program, (inputs, labels) = program_of(**RECORDED[name]), batch_of(name)
    gradients = Gradients(program, learning(program))
    gradients(inputs, labels, 0.5, 1.0)
    # while a graph is recorded, transformers does not read its masks
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    program.settle(deployed(program))
    for held in (None, "deployed"):
        with HostReads() as reads:
            gradients._eager(inputs, labels, torch.tensor(0.5), 1.0, held, 1)
        assert reads.count == 0
    program.to("meta")
    for module in program.modules():
        if positions := module.__dict__.get("get_rel_pos"):
            positions.tables = {(torch.device("meta"), n): x.to("meta") for (_, n), x in positions.tables.items()}
    inputs = {key: x.to("meta") for key, x in inputs.items()}
    labels, temperature = labels.to("meta"), torch.ones((), device="meta")
    with Transfers() as transfers:
        gradients._eager(inputs, labels, temperature, 1.0, None, 1)
    assert transfers.found == []


@pytest.mark.parametrize("build", [tiny_deberta, tiny_deberta_v2])
def test_positions_are_those_of_transformers(build):
    plain, remembered = build().eval(), build().eval()
    remember_positions(remembered)
    with torch.no_grad():
        for length in (10, 3, 64):
            inputs, _ = batch(length=length)
            assert torch.equal(plain(**inputs).logits, remembered(**inputs).logits), length
    encoder = remembered.deberta.encoder
    assert [size for _, size in encoder.get_rel_pos.tables] == [128]
    hidden = torch.zeros(1, 200, 32)
    there = type(encoder).get_rel_pos(encoder, hidden)
    assert torch.equal(encoder.get_rel_pos(hidden), there) and len(encoder.get_rel_pos.tables) == 2


def test_it_is_the_gradient_of_the_loss_and_adds_up(eager):
    program, (inputs, labels) = program_of(), batch()
    gradients = Gradients(program, learning(program))
    torch.manual_seed(1)
    parts = gradients(inputs, labels, 0.5, 1.0)
    found = [p.grad.clone() for p in learning(program) if p.grad is not None]
    torch.manual_seed(1)
    loss, terms = program(inputs, labels, 0.5)
    assert torch.equal(parts[:4], torch.stack([loss, terms.nll, terms.kl_z, terms.kl_g]))
    slopes = torch.autograd.grad(loss, [p for p in learning(program) if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(found, slopes, strict=True))
    torch.manual_seed(1)
    gradients(inputs, labels, 0.5, 1.0, micro_batches=2)
    for p, slope in zip((p for p in learning(program) if p.grad is not None), slopes, strict=True):
        torch.testing.assert_close(p.grad, 1.5 * slope)


def test_distributions_check_once_and_leave_numbers_that_are_not_finite_to_the_step(eager):
    program, (inputs, labels) = program_of(), batch()
    with pytest.raises(ValueError, match="within the support"):
        Gradients(program, learning(program))(inputs, labels + 0.5, 0.5, 1.0)
    gradients = Gradients(program, learning(program))
    gradients(inputs, labels, 0.5, 1.0, "open")
    with pytest.raises(ValueError, match="within the support"):  # the gates start: once more
        gradients(inputs, labels + 0.5, 0.5, 1.0)
    with torch.no_grad():
        program.net.head_parameters()[0].fill_(torch.nan)
    parts = Gradients(program, learning(program))(inputs, labels, 0.5, 1.0)
    assert parts[0].isnan()


# --- on CUDA


def both(program, batches, temperatures, micro_batches=1, held=None):
    """(parts, gradients) of the same steps, recorded and kernel by kernel, with the same seeds."""
    found = []
    for graphs in (True, False):
        gradients, steps = Gradients(program, learning(program), graphs=graphs), []
        for step, temperature in enumerate(temperatures):
            for micro in range(micro_batches):
                torch.manual_seed(100 * step + micro)
                parts = gradients(*batches[step % len(batches)], temperature, 1.0, held, micro_batches)
            steps.append([parts, *(p.grad.clone() for p in learning(program) if p.grad is not None)])
            for p in learning(program):
                p.grad = None
        assert gradients.recording == graphs, "the step was not recorded"
        found.append(steps)
    return found


@CUDA
@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_graph_computes_what_its_kernels_do(name, micro_batches):
    """To the bit where kernels repeat theirs (gathers of DeBERTa's positions add up in any order): other seeds,
    temperatures and shapes."""
    program = program_of(**RECORDED[name], device="cuda")
    batches = [
        ({key: x.cuda() for key, x in inputs.items()}, labels.cuda())
        for inputs, labels in (batch_of(name, **x) for x in ({"seed": 0}, {"seed": 1, "length": 6}, {"seed": 2}))
    ]
    recorded, one_by_one = both(program, batches, (0.5, 0.4, 0.3, 0.2), micro_batches)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if "bf16" not in name else {"rtol": 2e-2, "atol": 2e-3}
    for mine, true in zip(recorded, one_by_one, strict=True):
        assert len(mine) == len(true)
        for a, b in zip(mine, true, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@CUDA
def test_a_graph_of_settled_gates_computes_what_its_kernels_do():
    program = program_of(device="cuda")
    program.settle(deployed(program))
    inputs, labels = batch()
    batches = [({key: x.cuda() for key, x in inputs.items()}, labels.cuda())]
    for mine, true in zip(*both(program, batches, (0.5, 0.4, 0.3), held="deployed"), strict=True):
        for a, b in zip(mine, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@CUDA
def test_what_cannot_be_recorded_goes_on_kernel_by_kernel(caplog):
    program = program_of(estimator="score_function", device="cuda")  # hard draws, which the host reads
    inputs, labels = batch()
    batched = {key: x.cuda() for key, x in inputs.items()}, labels.cuda()
    gradients = Gradients(program, learning(program))
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(3)
        first = gradients(*batched, 0.5, 1.0)
    assert "one by one" in caplog.text and not gradients.recording
    torch.manual_seed(3)
    assert torch.equal(Gradients(program, learning(program), graphs=False)(*batched, 0.5, 1.0), first)
    torch.manual_seed(4)
    other = program_of(device="cuda")  # and another program can be recorded in the same process
    later = Gradients(other, learning(other))
    later(*batched, 0.5, 1.0)
    assert later.recording


@CUDA
@pytest.mark.parametrize(("phases", "until"), [({}, 5), ({"settle": 0.25}, 7), ({"rest": 0.25, "settle": 0.25}, 6)])
def test_a_training_is_recorded_and_resumes_to_the_same_bits(tmp_path, phases, until):
    backbone = save_tiny_backbone(tmp_path / "backbone")
    config = tiny_config(backbone, **phases)
    whole = fit(config, folder=tmp_path / "whole", quiet=True)
    fit(config, folder=tmp_path / "cut", quiet=True, until=until)
    cut = fit(config, folder=tmp_path / "cut", quiet=True)
    for (name, mine), true in zip(cut.program.named_parameters(), whole.program.parameters(), strict=True):
        assert torch.equal(mine, true), name
