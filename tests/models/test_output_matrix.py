"""Scope `encoder+head`: a language model's output matrix is one more quantized map, tied to an embedding or not."""

import itertools
import json

import peft
import pytest
import torch
import transformers
from models import batch, random_chains, tiny_bert, tiny_language_model
from packed_models import allocated
from safetensors.torch import load_file
from tiny import save_tiny_backbone, save_tiny_decoder
from torch.nn.functional import linear, pad

from pyro_blora import attach, export, load, use_gates
from pyro_blora.__main__ import main
from pyro_blora.adapters import calibrate
from pyro_blora.bops import expected_bops
from pyro_blora.cost_table import Times
from pyro_blora.costs import latency
from pyro_blora.deploy import merge, pack
from pyro_blora.deploy.packed import MANIFEST, WEIGHTS
from pyro_blora.gates import NestedBernoulli
from pyro_blora.layout import BASE, INPUT, TENSORS, AdapterLayout
from pyro_blora.models.embeddings import round_tables
from pyro_blora.posterior import deployed
from pyro_blora.quantizer import quantize, rounded
from pyro_blora.tasks import CausalLM
from pyro_blora.tasks.causal_lm import LANGUAGE_MODEL
from pyro_blora.tasks.likelihoods import IGNORED
from pyro_blora.training.gate_init import sensitivity

pytestmark = pytest.mark.usefixtures("eager")
SCOPE, T, H, V = "encoder+head", 10, 32, 100
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def layout_of(model, **settings):
    return AdapterLayout.of(model, sequence_length=T, rank=4, **{"scope": SCOPE, "head": LANGUAGE_MODEL, **settings})


def program_of(tied, layers=1):
    def build(dropout):
        return tiny_language_model(num_hidden_layers=layers, tie_word_embeddings=tied)

    return allocated(build, kind=CausalLM(), scope=SCOPE)


@pytest.fixture(scope="module")
def programs():
    return {tied: program_of(tied) for tied in (True, False)}


@torch.no_grad()
def answers(program, inputs):
    with use_gates(program.net, *deployed(program), exact=True):
        return program.net.logits(**inputs)


# --- layout, costs ----------------------------------------------------------------------------------------------------


@TIED
def test_the_head_has_two_ladders_and_the_macs_that_scope_encoder_leaves(tied):
    model = tiny_language_model(tie_word_embeddings=tied)
    with_head, without = layout_of(model), layout_of(model, scope="encoder")
    *others, head = with_head.projections
    assert tuple(others) == without.projections and with_head.model_macs == without.model_macs
    assert (head.name, head.type, head.in_features, head.out_features) == ("lm_head", "lm_head", H, V)
    assert head.tokens == T and head.macs == T * H * V and not head.adapted and with_head.names[-1] == "0.lm_head"
    assert [t for t, exists in zip(TENSORS, with_head.z_mask[-1], strict=True) if exists] == ["input", "base"]
    assert AdapterLayout.from_dict(json.loads(json.dumps(with_head.to_dict()))) == with_head


def test_bops_equal_the_average_over_all_widths_of_the_head():
    model = tiny_language_model()
    with_head, without = layout_of(model), layout_of(model, scope="encoder")
    torch.manual_seed(0)
    z, g = (NestedBernoulli.from_rate(torch.rand(shape)) for shape in (with_head.z_shape, with_head.g_shape))
    rest = expected_bops(without, z.mean[:-1], g.mean[:-1])
    widths = z.depth_probs[-1].double()
    mean = sum(
        widths[INPUT, i] * widths[BASE, j] * x * w
        for (i, x), (j, w) in itertools.product(enumerate(with_head.ladder), repeat=2)
    )
    found = expected_bops(with_head, z.mean, g.mean)
    assert found.model.item() == pytest.approx(float(rest.model - T * H * V * (32 * 32 - mean)), rel=1e-6)
    assert found.adapted == rest.adapted and found.adapted_ratio == rest.adapted_ratio


def test_what_has_no_such_head_is_refused(tmp_path, capsys):
    backbone = save_tiny_backbone(tmp_path / "bert")
    line = ["train", "--backbone", str(backbone), "--scope", SCOPE, "--output_dir", str(tmp_path / "runs")]
    assert main(line) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "this task has a head of its own, which is learned at 32 bit: --scope encoder" in told
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match="a head of its own"):
        attach(tiny_bert(), scope=SCOPE)
    model = tiny_language_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no linear map to its vocabulary"):
        layout_of(model)
    table = {"schema": "costs", "version": 1, "machine": {"processor": "x", "threads": 1}, "rows": 1,
             "widths": [2, 4, 8, 16, 32], "rounding": [],
             "products": [{"out": 1, "in": 1, "seconds": [[1.0] * 5] * 5}]}  # fmt: skip
    with pytest.raises(ValueError, match="no times of an output matrix"):
        latency(layout_of(tiny_language_model()), Times(table))


# --- the network ------------------------------------------------------------------------------------------------------


@TIED
@torch.no_grad()
def test_logits_are_the_rounded_matrix_times_the_rounded_state_and_an_embedding_stays_as_it_is(tied):
    inputs, model = batch(3, 9)[0], tiny_language_model(tie_word_embeddings=tied)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    net = attach(model, rank=4, sequence_length=T, scope=SCOPE, head=LANGUAGE_MODEL).eval()
    calibrate(net, [inputs])
    states = {}
    net.backbone.lm_head.register_forward_pre_hook(lambda _, args: states.update(x=args[0]))
    z, g = (random_chains(shape, seed=3) for shape in (net.layout.z_shape, net.layout.g_shape))
    z[-1, INPUT], z[-1, BASE] = torch.tensor([1.0, 1, 0, 0]), torch.tensor([1.0, 0, 0, 0])  # 8 bit, 4 bit
    with use_gates(net, z, g):
        found = net.logits(**inputs)
    x, weight = (
        quantize(tensor, net.value_range(len(z) - 1, t), pad(z[-1, t], (1, 0), value=1.0))
        for tensor, t in ((states["x"], INPUT), (net.backbone.lm_head.weight, BASE))
    )
    torch.testing.assert_close(found, linear(x, weight), rtol=1e-5, atol=1e-5)
    assert len(weight.unique()) <= 16 and not torch.allclose(found, linear(states["x"], net.backbone.lm_head.weight))
    embedding = net.backbone.get_input_embeddings().weight
    assert (embedding is net.backbone.lm_head.weight) == tied and torch.equal(
        embedding, before["model.embed_tokens.weight"]
    )
    assert torch.equal(net.backbone.lm_head.weight, before["lm_head.weight"])
    assert not any(p.requires_grad for p in (embedding, net.backbone.lm_head.weight)) and not net.head_parameters()


def test_gates_of_the_head_start_from_what_its_rounding_changes(programs):
    """The root mean square over examples of <direction, (Q(W) - W) x> at the logits, at every width of a few bits."""
    net, inputs = programs[True].net, batch(4, 9)[0]
    labels = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"].roll(-1, 1), IGNORED)
    ranges = net.log_range.exp().detach()[..., None].expand(*net.layout.z_shape[:2], 5)
    states, weight = [], net.backbone.lm_head.weight
    hook = net.backbone.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
    torch.manual_seed(1)
    found = sensitivity(programs[True], [(inputs, labels)], ranges).alone.z[-1, BASE]
    hook.remove()
    torch.manual_seed(1)
    directions = CausalLM().fisher_directions(linear(states[-1], weight), labels, torch.ones(()))
    for place, bits in enumerate((2, 4, 8)):
        change = rounded(weight, ranges[-1, BASE, place], bits) - weight
        each = (directions * linear(states[-1], change)).sum((1, 2))
        assert found[place].item() == pytest.approx(each.square().mean().sqrt().item(), rel=1e-3)


# --- exports ----------------------------------------------------------------------------------------------------------


@TIED
def test_a_packed_model_is_the_deployed_one_to_the_bit_with_two_matrices(programs, tied, tmp_path):
    program, inputs = programs[tied], batch(3, 9)[0]
    folder = pack(program, tmp_path / "packed")
    model, stored = load(folder), load_file(folder / WEIGHTS)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, answers(program, inputs))
    bits = json.loads((folder / MANIFEST).read_text())["projections"]["lm_head"]["bits"]
    assert bits["base"] < 32 and stored["lm_head.base"].numel() == V * H * bits["base"] // 8  # bytes
    embedding = program.net.backbone.get_input_embeddings().weight
    assert torch.equal(stored["model.embed_tokens.weight"], embedding) and "lm_head.weight" not in stored
    assert torch.equal(model.get_input_embeddings().weight, embedding) and not model.config.tie_word_embeddings
    assert program.net.backbone.config.tie_word_embeddings == tied and "lm_head" in program.net.layout.names[-1]
    card = (folder / "README.md").read_text()
    assert ("`lm_head` and its input embedding are one matrix. Here they are two" in card) == tied
    ratio = expected_bops(program.layout, *deployed(program)).model_ratio
    assert f"{100 * ratio:.1f} % of those of the model" in card and "| lm_head | 1 |" in card
    small = load(pack(program, tmp_path / "small", embeddings=8))
    assert torch.equal(small.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(small.get_input_embeddings().weight, embedding)


def test_embeddings_of_few_bits_are_packed_beside_the_codes_of_the_matrix(tmp_path):
    def build(dropout):
        model = tiny_language_model(num_hidden_layers=1, tie_word_embeddings=True)
        round_tables(model, 8)
        return model

    program, inputs = allocated(build, kind=CausalLM(), scope=SCOPE), batch(3, 9)[0]
    folder = pack(program, tmp_path / "packed")
    stored = load_file(folder / WEIGHTS)
    assert {"lm_head.base", "model.embed_tokens.weight.codes"} <= {*stored} and "lm_head.weight" not in stored
    with torch.no_grad():
        assert torch.equal(load(folder)(**inputs).logits, answers(program, inputs))
    assert "the embedding at 8 bit, and `lm_head` at its own" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_folder_that_refers_to_its_base_has_the_codes_that_this_lacks(kind, tmp_path):
    """GPT-2's matrix is its embedding; Llama's is in its files here, and is rounded when it is read."""
    backbone, inputs = save_tiny_decoder(tmp_path / "base", kind), batch(3, 9)[0]
    program = allocated(
        lambda dropout: transformers.AutoModelForCausalLM.from_pretrained(backbone), kind=CausalLM(), scope=SCOPE
    )
    folder = pack(program, tmp_path / "packed", reference=True)
    assert ("lm_head.base" in load_file(folder / WEIGHTS)) == (kind == "gpt2")
    with torch.no_grad():
        found = load(folder, backbone=backbone)(**inputs).logits
    assert torch.equal(found, answers(program, inputs))


@torch.no_grad()
def test_adapters_and_merged_models_have_the_matrix_as_it_was(programs, tmp_path):
    program, inputs = programs[True], batch(3, 9)[0]
    base = tiny_language_model(num_hidden_layers=1, tie_word_embeddings=True).eval()
    adapter, merged = export(program, tmp_path / "adapter"), merge(program, tmp_path / "merged")
    assert all("lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight and whole.config.tie_word_embeddings
    assert torch.equal(whole.lm_head.weight, base.lm_head.weight)
    found = peft.PeftModel.from_pretrained(base, str(adapter)).eval()(**inputs).logits
    torch.testing.assert_close(found, whole(**inputs).logits, rtol=1e-4, atol=1e-4)
