"""Slopes example by example, in networks that keep the examples apart and in those that do not, at a step's memory."""

import pytest
import torch
import transformers
from models import VOCABULARY, _built, batch, tiny_bert, tiny_deberta, tiny_llama

from pyro_blora.adapters import Observer, attach, calibrate, observed
from pyro_blora.adapters.example_axis import without_examples
from pyro_blora.guides import build_guide
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import get_task
from pyro_blora.training.gate_init import _Slopes, sensitivity
from pyro_blora.training.range_calibration import _Sample, range_errors

pytestmark = pytest.mark.usefixtures("eager")


def tiny_opt():
    """Its feed-forward maps see (examples x tokens, n)."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2, dropout=0.0, pad_token_id=1,
    )  # fmt: skip
    return _built(transformers.OPTForSequenceClassification, config)


def tiny_xlnet():
    """Its maps see (tokens, examples, n)."""
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64, initializer_range=0.2, dropout=0.0,
    )  # fmt: skip
    return _built(transformers.XLNetForSequenceClassification, config)


def program_of(model, *, target_modules=None, checkpointed=False):
    torch.manual_seed(7)
    net = attach(model, rank=3, sequence_length=10, scope="encoder", target_modules=target_modules)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    calibrate(net, [batch()[0]])
    if checkpointed:
        net.gradient_checkpointing_enable()
    prior = build_prior("nested", net.layout, {})
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": 1.0})
    return BayesianLoRA(net, prior, guide, get_task("sst2").likelihood, n_train=500)


ATTENTION = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("build", "targets", "every", "some"),
    [
        (tiny_bert, None, 0, 0),
        (tiny_llama, ATTENTION, 0, 0),
        (tiny_deberta, None, 4, 0),  # two layers' query and key see positions as well
        (tiny_opt, ATTENTION, 4, 4),  # two layers' fc1 and fc2
        (tiny_xlnet, ("layer_1",), 4, 4),
    ],
)
def test_layers_whose_input_does_not_lead_with_the_example_are_found(build, targets, every, some):
    program = program_of(build(), target_modules=targets)
    inputs = batch(size=4)[0]
    assert len(without_examples(program.net, inputs, every_call=True)) == every
    assert len(without_examples(program.net, inputs)) == some


def test_as_many_tokens_as_examples_are_not_mistaken_for_examples():
    program = program_of(tiny_xlnet(), target_modules=("layer_1",))
    for size in (2, 3, 4):
        assert without_examples(program.net, batch(size=size, length=size)[0]), size


@pytest.mark.parametrize("build", [tiny_opt, tiny_xlnet])
def test_no_gate_of_a_network_that_mixes_examples_is_without_a_slope(build):
    program = program_of(build(), target_modules=ATTENTION if build is tiny_opt else ("layer_1",))
    batches = [batch(4, seed=seed) for seed in range(2)]
    alone = sensitivity(program, batches, range_errors(program, batches).best_by_width()).alone
    exists = program.z_mask
    assert bool((alone.z[exists][..., 0] > 0).all()), "the coarsest rung of a tensor is said to cost nothing"


@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta, tiny_llama])
def test_a_batch_gives_the_slopes_of_its_examples_one_by_one(build):
    """Of DeBERTa up to what positions add, which no example has alone."""
    program = program_of(build(), target_modules=ATTENTION if build is tiny_llama else None)
    inputs, labels = batch(3)
    ranges = range_errors(program, [(inputs, labels)]).best_by_width()

    def slopes(rows):
        observer = _Slopes(program.layout, ranges, len(labels[rows]))
        with observed(program.net, observer):
            logits = program.net(**{key: x[rows] for key, x in inputs.items()}).logits
            return torch.autograd.grad(logits[:, 0].sum(), (observer.z, observer.g))

    together, apart = slopes(slice(None)), [slopes(slice(i, i + 1)) for i in range(3)]
    for site, (whole, parts) in enumerate(zip(together, zip(*apart, strict=True), strict=True)):
        parts = torch.cat(parts)
        if build is tiny_deberta and site == 0:  # a base weight and its input also turn positions
            kept = [i for i, p in enumerate(program.layout.projections) if p.type not in ("query", "key")]
            whole, parts = whole[:, kept], parts[:, kept]
        if not (build is tiny_deberta and site == 1):
            assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-4)


class Saved:
    """Bytes that a forward keeps for its backward pass, each storage once; parameters are there anyway."""

    def __init__(self, net):
        self.known = {p.untyped_storage().data_ptr() for p in net.parameters()}
        self.storages = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage  # kept, so that no other takes its place
        return x

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta])
def test_the_start_of_the_gates_keeps_no_more_than_a_training_step(build, checkpointed):
    program = program_of(build(), checkpointed=checkpointed)
    inputs, labels = batch(8, 32)
    ranges = range_errors(program, [(inputs, labels)]).best_by_width()
    program.train()
    with Saved(program) as step:
        loss, _ = program(inputs, labels, 0.3)
    loss.backward()
    with Saved(program) as start:
        observer = _Slopes(program.layout, ranges, len(labels))
        with observed(program.net, observer):
            logits = program.net(**inputs).logits.float()
            kind, scale = program.likelihood, program.log_scale.exp().detach()
            (logits * kind.fisher_directions(logits.detach(), labels, scale)).sum()
    assert start.bytes <= step.bytes
    with Saved(program) as fitted, observed(program.net, _Sample(program.layout, 1, torch.device("cpu"))):
        program.net(**inputs).logits.sum()
    assert fitted.bytes <= step.bytes


def test_observers_see_no_dropout_where_blocks_drop_by_their_own_flag():
    """BART's blocks hand their own flag to dropout, and checkpointing asks it too."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.5,
        eos_token_id=2, num_labels=2, pad_token_id=1,
    )  # fmt: skip
    net = attach(_built(transformers.BartForSequenceClassification, config), rank=2, sequence_length=10,
                 target_modules=ATTENTION)  # fmt: skip
    net.gradient_checkpointing_enable()
    net.train()
    inputs, _ = batch()
    inputs["input_ids"][:, -1] = 2  # the end of the sequence, which is classified
    inputs["attention_mask"][:] = 1
    with torch.no_grad(), observed(net, Observer()):
        assert torch.equal(net(**inputs).logits, net(**inputs).logits)
