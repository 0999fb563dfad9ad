"""Each preset of target modules is trained, exported, loaded and run by plain PEFT; the page of architectures is true.

The backbones are small, with random weights, and saved as their pretraining leaves them, with another head.
"""

import dataclasses
import json
import re

import peft
import pytest
import torch
import transformers
from architectures import EOS, ROWS, inputs_of
from models import tiny_bert
from pages import blocks, read
from tiny import save_tiny_backbone
from transformers.models.auto import modeling_auto

from pyro_blora import RunConfig, attach, draw, export, fit, load, use_gates
from pyro_blora.adapters import open_gates
from pyro_blora.bops import at_full_width, expected_bops
from pyro_blora.evaluation.evaluating import evaluate
from pyro_blora.evaluation.summary import summarize
from pyro_blora.layout import BASE, HIDDEN, INPUT, AdapterLayout
from pyro_blora.models import TARGETS
from pyro_blora.models.targets import attention_maps, type_of
from pyro_blora.posterior import deployed, predict
from pyro_blora.registries import TASKS
from pyro_blora.report.terminal import result_sentences
from pyro_blora.report.warnings import in_words
from pyro_blora.tasks import get_task, register_task
from pyro_blora.tasks.batching import loader, on_device
from pyro_blora.training import range_calibration

PAGE = "docs/reference/architectures.md"
BY_NAME = {row.name: row for row in ROWS}
VARIANTS = ("BigBirdSparse", "Esm")  # of an architecture that has a row already
TRAINED = [row for row in ROWS if row.targets is None and row.name not in VARIANTS]
QKV = ["query", "key", "value"]
BART = ("q_proj", "k_proj", "v_proj")
FUSED = {name: ["qkv"] for name in ("Deberta", "ModernBert", "GPT2", "GPTNeoX", "Bloom")}
OTHERS = {"OPT": ["key", "value", "query"], "Longformer": [*QKV, *(f"{role}_global" for role in QKV)]}
TWO_SIDES = [f"{side}{role}" for side in ("", "decoder.", "cross.") for role in QKV]
ROLES = FUSED | OTHERS | dict.fromkeys(("T5", "MT5", "UMT5"), TWO_SIDES)
pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return transformers.AutoTokenizer.from_pretrained(save_tiny_backbone(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def few():
    """A task of 16 rows, which are drawn once."""
    task = get_task("acceptability")
    rows = task.load(n_train=16)
    rows["eval"] = rows["eval"].select(range(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TASKS, "_functions", dict(TASKS._functions))
        patch.setattr(TASKS, "_entries", dict(TASKS._entries))
        patch.setattr(range_calibration, "_CANDIDATES", range_calibration._CANDIDATES[::8])  # good ranges are not asked
        register_task(dataclasses.replace(task, name="few", load=lambda **_: rows))
        yield "few"


def pretrained(row, tokenizer, folder):
    """A checkpoint with the head of pretraining, where transformers has a class with one."""
    spare = 8 if row.name == "Qwen2" else 0  # its tokenizer adds the end of a text
    changes = {"vocab_size": len(tokenizer) + spare, "pad_token_id": tokenizer.pad_token_id}
    if EOS in (row.settings.get("eos_token_id"), row.settings.get("decoder_start_token_id")):
        changes |= {"eos_token_id": tokenizer.sep_token_id}
    config = row.config(**changes)
    kinds = (getattr(modeling_auto, f"MODEL{of}_MAPPING") for of in ("_FOR_PRETRAINING", "_FOR_MASKED_LM", ""))
    make = next(kind[type(config)] for kind in kinds if type(config) in kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config_of(backbone, task):
    """Two steps, the second with gates."""
    return RunConfig(
        task=task, backbone=backbone, epochs=1, batch_size=8, rank=2, max_length=32, kl_warmup=0.5, lr=0.01, draws=2
    )


def run_of(backbone, task, folder):
    """(trained program, batches, folder), with what `load` needs in the folder."""
    config = config_of(backbone, task)
    trained = fit(config, quiet=True)
    parts = trained.parts
    batches = [*on_device(loader(parts.tokens["eval"], parts.collate, [[*range(8)]]), torch.device("cpu"))]
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    export(trained.program, folder / "adapter", rows=batches[0][0], tokenizer=parts.tokenizer, config=config)
    return trained.program, batches, folder


def require_the_same(program, again, batches):
    gates = draw(program, 2)
    for chosen in (gates, None):  # averaged, and deployed
        before, after = (predict(each, batches, gates=chosen) for each in (program, again))
        assert torch.equal(before.outputs, after.outputs)
        assert torch.equal(before.log_likelihood, after.log_likelihood)


@torch.no_grad()
def require_plain(program, model, run, inputs):
    """PEFT alone has the logits of the deployed allocation but for inputs and frozen weights, which are at 32 bit."""
    z, g = deployed(program)
    z = z.clone()
    z[:, [INPUT, BASE, HIDDEN]] = 1.0
    with use_gates(program.net, z, g):
        expected = program.net.logits(**inputs)
    plain = peft.PeftModel.from_pretrained(model, str(run / "adapter")).eval()
    torch.testing.assert_close(plain(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    assert (plain(**inputs).logits - expected).abs().max() > 1e-3  # the adapter takes part


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_an_architecture_is_trained_exported_loaded_and_predicts(row, tokenizer, few, tmp_path):
    backbone = pretrained(row, tokenizer, tmp_path / "backbone")
    program, batches, run = run_of(backbone, few, tmp_path / "run")
    layout = program.net.layout
    assert list(dict.fromkeys(p.type for p in layout.projections)) == ROLES.get(row.name, QKV)
    assert len({(p.layer, p.type) for p in layout.projections}) == len(layout.projections)
    require_the_same(program, load(run), batches)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2)
    require_plain(program, model, run, batches[0][0])


def test_the_encoder_of_t5_alone_is_the_function_on_the_page(tokenizer, few, tmp_path):
    backbone = pretrained(BY_NAME["T5"], tokenizer, tmp_path / "backbone")
    (block,) = blocks(PAGE, "python")
    (tmp_path / "t5_encoder.py").write_text(block.replace("google-t5/t5-small", backbone), encoding="utf-8")
    name = f"{tmp_path}/t5_encoder.py:t5_encoder"
    program, batches, run = run_of(name, few, tmp_path / "run")
    assert [p.type for p in program.net.layout.projections] == QKV * 2
    assert all(".encoder." in p.name for p in program.net.layout.projections)
    require_the_same(program, load(run, allow_code=[name]), batches)
    names = {}
    exec(compile((tmp_path / "t5_encoder.py").read_text(), name, "exec"), names)
    require_plain(program, names["t5_encoder"](2)[0], run, batches[0][0])


# --- costs of layers that are used more than once ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Albert", "DebertaV3", "Deberta", "Longformer", "Funnel", "T5"])
def test_bit_operations_are_those_of_every_call(name):
    """Summed over the calls of a forward, each with its own vectors, against the formula on the layout."""
    row, size = BY_NAME[name], 4
    net = attach(row.build(), rank=3, sequence_length=10, batch_size=size).eval()
    generator = torch.Generator().manual_seed(0)
    z, g = ((torch.rand(shape, generator=generator) < 0.6).int().cumprod(-1).float()
            for shape in (net.layout.z_shape, net.layout.g_shape))  # fmt: skip
    bits = net.layout.ladder[0] + z.double() @ net.layout.ladder_steps  # (L, T)
    ranks, found, calls = 1 + g.sum(-1), [], {}

    def count(layer, args):
        n, m = layer.in_features, layer.out_features
        b_in, b_base, b_down, b_up, b_hidden = bits[layer.index].tolist()
        vectors, rank = args[0].numel() / n, float(ranks[layer.index])
        calls[layer.index] = calls.get(layer.index, 0) + 1
        found.append(vectors * (n * m * b_in * b_base + rank * (n * b_in * b_down + m * b_hidden * b_up)))

    for layer in net.layers():
        layer.register_forward_pre_hook(count)
    rows = inputs_of(size, 10)
    rows["attention_mask"] = torch.ones_like(rows["attention_mask"])
    with torch.no_grad(), use_gates(net, z, g):
        net(**rows)
    assert expected_bops(net.layout, z, g).adapted.item() == pytest.approx(sum(found) / size, rel=1e-9)
    opened = expected_bops(net.layout, *open_gates(net.layout))
    assert opened.adapted_ratio == opened.model_ratio == 1.0
    assert {p.uses for p in net.layout.projections} == {2 if name == "Albert" else 1}
    assert name not in ("Albert", "DebertaV3") or set(calls.values()) >= {2}


def test_a_shared_layer_costs_what_copies_of_it_cost_and_says_so():
    """12 layers of one group or of 12, as in ALBERT-base: the same MACs, in one projection or in 12."""
    row, layouts = BY_NAME["Albert"], {}
    for groups in (1, 12):
        model = row.build(num_hidden_layers=12, num_hidden_groups=groups)
        layouts[groups] = AdapterLayout.of(model, rank=4, sequence_length=10)
    shared, apart = layouts[1], layouts[12]
    assert [p.uses for p in shared.projections] == [12] * 3 and len(apart.projections) == 36
    assert shared.model_macs == apart.model_macs
    for ours, theirs in zip(at_full_width(shared), at_full_width(apart), strict=True):
        assert ours == theirs
    assert "used 12 times has one adapter and one set of gates" in shared.sharing and apart.sharing == ""
    assert AdapterLayout.from_dict(json.loads(json.dumps(shared.to_dict()))) == shared


def test_the_uses_are_said_before_training_and_with_the_result(tokenizer, few, tmp_path, capsys):
    trained = fit(config_of(pretrained(BY_NAME["Albert"], tokenizer, tmp_path / "backbone"), few))
    sentence = trained.program.net.layout.sharing
    assert "used 2 times" in sentence and f" {sentence}\n" in capsys.readouterr().err
    summary = summarize(trained.parts, evaluate(trained.parts), trained.seconds)
    assert sentence in result_sentences(summary) and sentence in in_words(summary)[-1]


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("deberta.encoder.layer.3.attention.self.in_proj", "qkv"),
        ("model.layers.0.attn.Wqkv", "qkv"),
        ("model.layers.0.attn.Wo", "attention.output"),
        ("model.layers.0.mlp.Wo", "output"),
        ("mpnet.encoder.layer.1.attention.attn.q", "query"),
        ("funnel.encoder.blocks.1.0.attention.v_head", "value"),
        ("longformer.encoder.layer.0.attention.self.key_global", "key_global"),
        ("bert.encoder.layer.0.attention.output.dense", "attention.output"),
        ("bert.encoder.layer.0.output.dense", "output"),
        ("transformer.attentions.0.out_lin", "attention.output"),
    ],
)
def test_a_projection_has_the_name_of_its_role(path, role):
    assert type_of(path) == role


def test_the_layers_of_blocks_are_numbered_through():
    layout = AdapterLayout.of(BY_NAME["Funnel"].build(block_sizes=[2, 1]), rank=4, sequence_length=10)
    assert [(p.layer, p.type) for p in layout.projections] == [(i, role) for i in range(3) for role in QKV]


def test_a_decoder_that_is_adapted_alone_has_roles_of_its_own():
    layout = AdapterLayout.of(
        BY_NAME["Bart"].build(), rank=4, sequence_length=10, target_modules=r".*\.decoder\..*\.(q|v)_proj"
    )
    assert {p.type for p in layout.projections} == {"decoder.query", "decoder.value", "cross.query", "cross.value"}
    plain = AdapterLayout.of(BY_NAME["OPT"].build(), rank=4, sequence_length=10, target_modules=["q_proj"])
    assert {p.type for p in plain.projections} == {"query"}  # a decoder without an encoder


def test_a_run_with_older_names_of_roles_keeps_them(tokenizer, few, tmp_path):
    """Before there were presets, MPNet's maps were called q, k and v."""
    from pyro_blora.checkpoint import read_tensors, write_tensors

    backbone = pretrained(BY_NAME["MPNet"], tokenizer, tmp_path / "backbone")
    program, batches, run = run_of(backbone, few, tmp_path / "run")
    path = run / "adapter" / "gates.safetensors"
    tensors, notes = read_tensors(path)
    stored = json.loads(notes["layout"])
    for projection in stored["projections"]:
        projection["type"] = projection["name"][-1]
        del projection["uses"]
    write_tensors(path, tensors, notes | {"layout": json.dumps(stored)})
    again = load(run)
    assert [p.type for p in again.net.layout.projections] == ["q", "k", "v"] * 2
    require_the_same(program, again, batches)
    stored["projections"][0]["in_features"] += 1
    write_tensors(path, tensors, notes | {"layout": json.dumps(stored)})
    with pytest.raises(ValueError, match="does not fit the model"):
        load(run)


def test_older_names_of_roles_decide_which_inputs_are_shared():
    """BART's decoder shared its inputs when its roles were named as the encoder's."""
    net = attach(BY_NAME["Bart"].build(), rank=4, sequence_length=10, target_modules=BART, share_inputs=True)
    older = [dataclasses.replace(p, type=p.type.removeprefix("decoder.").removeprefix("cross."))
             for p in net.layout.projections]  # fmt: skip
    stored, owners = dataclasses.replace(net.layout, projections=tuple(older)), net.layout.input_owner.tolist()
    net.name_as(stored)
    assert net.layout == stored and net.gate_context.owners == stored.input_owner.tolist() != owners


# --- an architecture without a preset ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in VARIANTS], ids=lambda row: row.name)
def test_what_is_proposed_is_found_by_looking_at_the_model(row):
    """The preset or the targets of the tests, but for maps of positions and of global attention."""
    model = row.build().train()
    expected = {"FNet": set(), "XLNet": set()}.get(row.name, set(row.targets or TARGETS[model.config.model_type]))
    hooks = hooks_of(model)
    found = set(attention_maps(model))
    assert found - expected <= {"pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj", "conv_out_layer"}
    assert expected - found <= {"query_global"}  # which reads one row of its input
    assert hooks_of(model) == hooks and model.training


def hooks_of(model):
    return [len(hooks) for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]


def unknown(model):
    model.config.model_type = "novel"
    return model


def test_an_unknown_architecture_lists_its_layers_and_proposes_its_own():
    with pytest.raises(ValueError, match="no preset of target modules for the architecture 'novel'") as error:
        AdapterLayout.of(unknown(BY_NAME["T5"].build()), sequence_length=10)
    assert "Its linear layers end in: k (6), o (6), q (6), v (6), wi (4), wo (4)." in str(error.value)
    assert str(error.value).endswith("Those that read the input of its attention: --target_modules q,k,v")
    with torch.device("meta"):
        model = unknown(BY_NAME["ModernBert"].build())
    with pytest.raises(ValueError, match=r"--target_modules Wqkv$"):
        AdapterLayout.of(model, sequence_length=10)


def test_what_is_proposed_is_taken_on_the_line():
    config = RunConfig(target_modules="Wqkv")
    assert config.target_modules == ("Wqkv",)
    layout = AdapterLayout.of(unknown(BY_NAME["ModernBert"].build()), rank=4, target_modules=config.target_modules)
    assert {p.type for p in layout.projections} == {"qkv"}


def test_nothing_is_proposed_without_attention_or_where_the_model_cannot_be_run():
    with pytest.raises(ValueError, match=r"None is proposed, as none reads the input of an attention layer$"):
        AdapterLayout.of(BY_NAME["FNet"].build(), sequence_length=10)
    model = unknown(BY_NAME["Xmod"].build(default_language=None))
    with pytest.raises(ValueError, match=r"None is proposed, as the model cannot be run \(.*language.*\)$"):
        AdapterLayout.of(model, sequence_length=10)


@pytest.mark.parametrize("targets", ["all-linear", ("all-linear",)])
def test_every_linear_map_of_the_encoder_is_adapted_by_its_word_in_peft(targets):
    net = attach(
        tiny_bert(), rank=2, sequence_length=10, target_modules=RunConfig(target_modules=targets).target_modules
    )
    ends = {name.rsplit(".", 1)[-1] for name in (p.name for p in net.layout.projections)}
    assert ends == {"query", "key", "value", "dense"}
    assert all(p.adapted for p in net.layout.projections) and not any(
        "pooler" in p.name for p in net.layout.projections
    )


def test_targets_that_match_nothing_are_answered_with_a_proposal():
    with pytest.raises(ValueError, match=r"'q_proj' match no linear layer .*--target_modules query,key,value$"):
        AdapterLayout.of(tiny_bert(), sequence_length=10, target_modules=["q_proj"])


# --- the page ---------------------------------------------------------------------------------------------------------


def table(heading):
    """Rows of the first table under a heading of the page, as lists of cells."""
    text = read(PAGE).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code(cell):
    return tuple(re.findall(r"`([^`]+)`", cell))


def test_the_page_has_the_presets():
    rows = table("Presets")
    assert {code(kind)[0]: code(targets) for _, kind, _, targets, _ in rows} == TARGETS and len(rows) == len(TARGETS)
    assert [code(kind)[0] for _, kind, *_ in rows] == sorted(TARGETS) == list(TARGETS)
    assert all(re.fullmatch(r"`[\w.-]+/[\w.-]+`", checkpoint) for _, _, checkpoint, *_ in rows)
    assert {row.config().model_type for row in TRAINED} == set(TARGETS)


SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 1}  # fmt: skip
REFUSED = {
    "fnet": ({}, "none reads the input of an attention layer"),
    "ibert": ({}, r"no torch\.nn\.Linear.*QuantLinear \(dense, key, query, value\)"),
    "mra": ({"block_per_row": 1}, r"the logits do not depend on mra\..*query"),
    "squeezebert": ({"embedding_size": 32}, r"no torch\.nn\.Linear.*Conv1d"),
    "xlnet": ({"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64}, "none reads the input of an attention layer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_page_calls_refused_is_refused(kind):
    settings, reason = REFUSED[kind]
    config = transformers.AutoConfig.for_model(kind, **{**(SMALL if "n_layer" not in settings else {}), **settings})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match=reason):
        AdapterLayout.of(model, rank=2, sequence_length=10, target_modules=QKV if kind == "mra" else None)


def test_the_page_has_what_is_refused():
    assert [code(kind)[0] for _, kind, _ in table("Refused")] == list(REFUSED)
    assert not set(REFUSED) & set(TARGETS)
