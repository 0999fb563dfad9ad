"""Every architecture of the table goes the whole way, and what is said of its cost and its length is so."""

import dataclasses
import inspect
import warnings

import pytest
import torch
import transformers
from architectures import QKV, ROWS, inputs_of
from models import deberta_v3_base, tiny_bert, tiny_deberta
from torch.utils.flop_counter import FlopCounterMode

from pyro_blora import adapters, attach
from pyro_blora.adapters import calibrate, open_gates
from pyro_blora.adapters.example_axis import without_examples
from pyro_blora.adapters.layers import GatedLinear
from pyro_blora.deploy import require_exportable
from pyro_blora.guides import build_guide
from pyro_blora.layout import AdapterLayout
from pyro_blora.models import macs
from pyro_blora.models.architectures import encoder_linears
from pyro_blora.models.conv1d import sizes
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import get_task

LENGTH = 10
BY_NAME = {row.name: row for row in ROWS}
pytestmark = pytest.mark.usefixtures("eager")
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def rows_for(model, size=4, length=LENGTH):
    rows = inputs_of(size, length)
    return {key: x for key, x in rows.items() if key in inspect.signature(model.forward).parameters}


def quietly(make, *args, **settings):
    """Without the warnings of a layer left out or of sparse attention, which have tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make(*args, **settings)


def program_of(net):
    prior = build_prior("nested", net.layout)
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": 1.0})
    return BayesianLoRA(net, prior, guide, get_task("sst2").likelihood, n_train=100)


# --- the whole way ----------------------------------------------------------------------------------------------------


@each_row
def test_it_starts_as_pretrained_learns_and_is_exported(row, tmp_path):
    backbone = row.build()
    rows = rows_for(backbone)
    with torch.no_grad():
        expected = backbone.eval()(**rows).logits
    settings = {"rank": 4, "target_modules": row.targets, "sequence_length": LENGTH, "scope": "encoder"}
    net = quietly(attach, backbone, **settings).eval()
    calibrate(net, [rows])
    with torch.no_grad(), adapters.gates(net, *open_gates(net.layout)):
        torch.testing.assert_close(net(**rows).logits, expected, atol=2e-5, rtol=1e-4)
    # where examples do not lead: tables of positions, tokens in a row (OPT), the length first (Longformer, XLNet)
    assert bool(without_examples(net, rows)) == (row.name in ("DebertaV2", "Deberta", "Longformer", "XLNet", "OPT"))
    program = program_of(net)
    before = {name: x.clone() for name, x in program.state_dict().items()}
    require_exportable(program, tmp_path / "run" / "tried", rows)
    assert not any(tmp_path.iterdir())
    for name, x in program.state_dict().items():
        assert torch.equal(x, before[name]), name
    learning = [p for p in (*net.adapter_parameters(), *net.head_parameters())]
    optimizer = torch.optim.SGD(learning, lr=1e-3)
    loss, _ = program.train()(rows, torch.tensor([0, 1, 0, 1]), 0.5, 1.0)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learning)
    optimizer.step()
    adapted = [layer for layer in net.layers() if isinstance(layer, GatedLinear)]
    moved = [bool(layer.lora_B["default"].weight.any()) for layer in adapted]
    # Longformer's last layer has maps of their own for the first token, which alone is classified
    idle = 3 if row.name == "Longformer" else 0
    assert len(moved) == len(net.layout.adapted) == sum(moved) + idle


@pytest.mark.parametrize("name", ["Deberta", "BigBirdSparse", "T5", "Canine"])
def test_a_fully_trained_model_is_exported(name, tmp_path):
    row = BY_NAME[name]
    net = quietly(attach, row.build(), rank=4, target_modules=row.targets, sequence_length=LENGTH, adapter="none")
    require_exportable(program_of(net), tmp_path / "tried", rows_for(net.backbone))


# --- lengths ----------------------------------------------------------------------------------------------------------


@each_row
def test_the_longest_input_is_that_of_a_real_forward(row):
    model, longest = row.build().eval(), row.limit or 150
    settings = {"rank": 4, "target_modules": row.targets}
    assert quietly(AdapterLayout.of, model, sequence_length=longest, **settings).sequence_length == longest
    with torch.no_grad():
        model(**rows_for(model, 2, longest))
        if row.limit is None:
            return
        with pytest.raises((IndexError, RuntimeError)):
            model(**rows_for(model, 2, longest + 1))
    for more in (1, 5000):
        with pytest.raises(ValueError, match=rf"at most {longest} tokens, got .* {longest + more}: lower it"):
            quietly(AdapterLayout.of, model, sequence_length=longest + more, **settings)


def test_a_model_that_cannot_be_run_says_why():
    model = BY_NAME["Xmod"].build(default_language=None)
    with pytest.raises(ValueError, match=r"XmodForSequenceClassification cannot be run on 10 tokens \(.*language"):
        AdapterLayout.of(model, sequence_length=LENGTH, target_modules=QKV)


# --- costs ------------------------------------------------------------------------------------------------------------


def counted(model, size, length=LENGTH):
    """MACs of a forward of `size` rows, by the counter alone."""
    model = model.eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rows = rows_for(model, size, length)
        model(input_ids=rows["input_ids"], attention_mask=torch.ones_like(rows["input_ids"]))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("size", [1, 7, 32])
@pytest.mark.parametrize("name", ["Bert", "DebertaV2", "DebertaV3", "Deberta", "ModernBert", "T5", "Llama", "GPT2"])
def test_costs_are_those_of_a_batch_divided_by_its_size(name, size):
    row = BY_NAME[name]
    layout = AdapterLayout.of(
        row.build(), rank=4, target_modules=row.targets, sequence_length=LENGTH, scope="encoder", batch_size=size
    )
    total = counted(row.build(), size)
    assert layout.model_macs * size == pytest.approx(total, rel=1e-12) and layout.batch_size == size
    seen, model = {}, row.build().eval()
    for path, linear in encoder_linears(model).items():
        linear.register_forward_hook(
            lambda m, _, y, path=path: seen.update({path: seen.get(path, 0) + y.numel() // sizes(m)[1]})
        )
    with torch.no_grad():
        model(**rows_for(model, size))
    assert {p.name: p.tokens * size for p in layout.projections} == pytest.approx(seen)


def test_positions_are_shared_by_the_batch():
    """Counted at batch 1, DeBERTaV3-base's positions make query cost five times as much as value."""
    with torch.device("meta"):
        model = deberta_v3_base()
    layout, alone = AdapterLayout.of(model), AdapterLayout.of(model, batch_size=1)
    assert layout.model_macs == pytest.approx(12.6e9, rel=0.01) and alone.model_macs == pytest.approx(19.6e9, rel=0.01)
    query, _, value = layout.macs[:3].tolist()
    assert query / value == 1.125 and layout.macs.sum() / layout.model_macs == pytest.approx(0.234, abs=0.001)
    assert alone.macs[0] / alone.macs[2] == 5.0
    assert layout.batch_size == 32  # whatever a run's own batches are


@pytest.mark.parametrize("name", ["Bert", "ModernBert", "Llama", "GPT2", "BigBird"])
def test_fused_attention_costs_what_its_products_cost(name):
    found = []
    for attention in ("eager", "sdpa"):
        model = BY_NAME[name].build()
        if model.config._attn_implementation == "sdpa" or attention == "eager":
            model.set_attn_implementation(attention)
        found.append(macs.cost(model, LENGTH, 32))
        assert model.config._attn_implementation in ("eager", attention)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_cost_the_same(dtype):
    layouts = [AdapterLayout.of(tiny_deberta().to(d), rank=4, sequence_length=LENGTH) for d in (torch.float32, dtype)]
    assert layouts[0] == layouts[1]


def test_long_inputs_cost_what_the_parabola_of_shorter_ones_says(monkeypatch):
    for build in (tiny_deberta, BY_NAME["Llama"].build):
        expected = macs.cost(build(), 100, 32)
        with monkeypatch.context() as patch:
            patch.setattr(macs, "_LONGEST", 48)
            patch.setattr(torch.nn.Linear, "forward", _short(torch.nn.Linear.forward, 36 * 2))
            found = macs.cost(build(), 100, 32)
        assert found.model_macs == pytest.approx(expected.model_macs, rel=1e-12)
        assert found.tokens == pytest.approx(expected.tokens) and found.reaching == expected.reaching


def _short(forward, most):
    """A linear map that more than `most` vectors pass through once only, as the length is tried."""

    def limited(self, x):
        assert x.numel() // x.shape[-1] in range(most + 1) or x.shape[-2] == 100
        return forward(self, x)

    return limited


def test_counting_leaves_a_model_as_it_was():
    model = BY_NAME["BigBirdSparse"].build().train()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.requires_grad_(False)
    model.config.pad_token_id = None

    def state():
        flags = [(type(m), m.training, getattr(m, "attention_type", None)) for m in model.modules()]
        return flags, [p.requires_grad for p in model.parameters()], model.config.to_dict(), torch.get_rng_state().sum()

    before, weights = state(), {name: x.clone() for name, x in model.state_dict().items()}
    macs.cost(model, LENGTH, 32)
    assert state() == before and all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match="at most 96 tokens"):
        macs.cost(model, 97, 32)
    assert state() == before


# --- what is left out or refused --------------------------------------------------------------------------------------


def test_a_layer_that_no_logit_depends_on_is_left_out_and_named():
    with pytest.warns(UserWarning, match=r"do not depend on canine\.final_char_encoder.*: left out"):
        net = attach(BY_NAME["Canine"].build(), rank=4, target_modules=QKV, sequence_length=LENGTH)
    assert len(net.layout.adapted) == 9 and not any("final" in p.name for p in net.layout.projections)
    with pytest.raises(ValueError, match=r"do not depend on canine\.final_char_encoder.*choose other targets"):
        AdapterLayout.of(
            BY_NAME["Canine"].build(), rank=4, target_modules=r".*final_char.*\.query", sequence_length=LENGTH
        )


def test_attention_that_does_nothing_without_its_kernel_is_refused():
    config = transformers.MraConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, block_per_row=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"do not depend on mra\..*query"):
        AdapterLayout.of(
            transformers.MraForSequenceClassification(config), rank=4, target_modules=QKV, sequence_length=LENGTH
        )


def test_sparse_attention_that_would_end_within_a_training_ends_before_it():
    backbone = BY_NAME["BigBirdSparse"].build().eval()
    long = rows_for(backbone, 2, 96)
    with torch.no_grad():
        sparse = backbone(**long).logits
    with pytest.warns(UserWarning, match="leaves its sparse attention at the first short input"):
        net = attach(backbone, rank=4, target_modules=QKV, sequence_length=96).eval()
    with torch.no_grad(), adapters.gates(net, *open_gates(net.layout)):
        first = net(**long).logits
        net(**rows_for(backbone, 2, LENGTH))
        assert torch.equal(net(**long).logits, first) and not torch.allclose(first, sparse, atol=1e-3)


def test_layers_that_are_no_linear_maps_are_listed():
    config = transformers.IBertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.IBertForSequenceClassification(config)
    for targets in (None, ["query"]):
        with pytest.raises(
            ValueError, match=r"no torch\.nn\.Linear.*adapted: .*QuantLinear \(dense, key, query, value\)\. Choose"
        ):
            AdapterLayout.of(model, sequence_length=LENGTH, target_modules=targets)


@pytest.mark.parametrize("targets", [["value"], ["intermediate.dense"], None])
def test_sharing_inputs_that_nobody_shares_is_refused(targets):
    def layout():
        return AdapterLayout.of(
            tiny_bert(), rank=4, sequence_length=LENGTH, target_modules=targets, share_inputs=True
        )  # fmt: skip

    if targets is None:
        assert len(layout().input_owner.unique()) == 2
    else:
        with pytest.raises(ValueError, match=r"share_inputs shares nothing here.*drop --share_inputs"):
            layout()


def test_layouts_that_do_not_say_their_batch_size_were_counted_at_one():
    layout = AdapterLayout.of(tiny_deberta(), rank=4, sequence_length=LENGTH, batch_size=1)
    stored = layout.to_dict()
    del stored["batch_size"]
    assert AdapterLayout.from_dict(stored) == layout != dataclasses.replace(layout, batch_size=32)


def mixtral():
    sizes = {
        "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 64, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "pad_token_id": 1, "num_labels": 2,
    }  # fmt: skip
    return transformers.MixtralForSequenceClassification(transformers.MixtralConfig(**sizes))


def test_the_experts_of_a_mixture_count_as_often_as_a_token_meets_one():
    """By grouped products, the default, as one by one."""
    found = []
    for implementation in ("grouped_mm", "eager"):
        model = mixtral()
        model.set_experts_implementation(implementation)
        found.append(macs.cost(model.eval(), 24, 2).model_macs)
    attention = 32 * 32 * 2 + 32 * 16 * 2 + 2 * 24 * 32  # query and output, key and value, the two products
    experts = 32 * 4 + 2 * 3 * 32 * 64  # the router, then two experts of three products each
    assert found[0] == found[1] == 24 * 2 * (attention + experts) + 24 * 32 * 2


def test_a_scope_of_the_whole_encoder_names_what_it_cannot_quantize(caplog):
    attach(mixtral(), target_modules=("q_proj",), scope="encoder", sequence_length=8)
    (said,) = caplog.messages
    assert said.endswith("others stay at 32 bit, MixtralExperts (experts); MixtralTopKRouter (gate)")
    attach(mixtral(), target_modules=("q_proj",), sequence_length=8)
    attach(tiny_deberta(), scope="encoder", sequence_length=8)
    assert len(caplog.messages) == 1
