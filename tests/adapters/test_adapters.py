"""Laws of the gated network: it starts as the pretrained model, computes the equation, and leaves plain PEFT behind."""

import copy
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from models import batch, headed, random_chains, tiny_bert, tiny_deberta, tiny_distilbert, tiny_roberta

from pyro_blora import adapters
from pyro_blora.adapters import attach, calibrate, gate_context, open_gates, ranges
from pyro_blora.adapters.gate_context import ADAPTER
from pyro_blora.adapters.layers import GatedLinear, QuantizedLinear
from pyro_blora.adapters.lora import xs
from pyro_blora.adapters.peft_config import lora_config
from pyro_blora.deploy import export
from pyro_blora.guides import build_guide
from pyro_blora.layout import LADDER
from pyro_blora.models import head_modules
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.quantizer import fake_quantize
from pyro_blora.tasks import get_task

SCOPES = ("adapted", "encoder")  # of a network with a new head; test_output_matrix.py has the third
SETTINGS = {"rank": 4, "alpha": 6.0, "sequence_length": 10}
BACKBONES = [tiny_bert, tiny_roberta, tiny_distilbert, tiny_deberta]


pytestmark = pytest.mark.usefixtures("eager")


def gated(build=tiny_bert, *, trained=True, **settings):
    """A gated network in evaluation mode, with lora_B away from zero unless told otherwise."""
    net = attach(build(), **{**SETTINGS, **settings}).eval()
    if trained:
        fill_lora_b(net)
    calibrate(net, [batch()[0]])
    return net


def fill_lora_b(net):
    torch.manual_seed(7)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def logits(net, z, g, inputs=None):
    with adapters.gates(net, z, g):
        return net(**(inputs or batch()[0])).logits


def some_gates(layout, seed=0):
    return random_chains(layout.z_shape, seed=seed), random_chains(layout.g_shape, seed=seed + 1)


def gradients(net, z, g):
    """Gradients of everything that learns, the gates included; the backward pass runs after the gates were cleared."""
    z, g = z.clone().requires_grad_(), g.clone().requires_grad_()
    loss = F.cross_entropy(logits(net, z, g), batch()[1])
    parameters = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, [z, g, *parameters])


# --- step 0 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learning", [False, True], ids=["fixed", "learning"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("build", BACKBONES, ids=lambda build: build.__name__)
def test_with_open_gates_it_starts_as_the_pretrained_model(build, scope, learning):
    inputs, _ = batch()
    with torch.no_grad():
        expected = build().eval()(**inputs).logits
    net = gated(build, trained=False, scope=scope)
    z, g = open_gates(net.layout)
    out = logits(net, z.requires_grad_(learning), g)
    torch.testing.assert_close(out.detach(), expected, atol=1e-6, rtol=0)
    fill_lora_b(net)
    assert (logits(net, z, g) - expected).abs().max() > 1e-3  # the adapters are in the path


def test_with_open_gates_trained_adapters_are_plain_lora():
    net = gated()
    inputs, _ = batch()
    plain = peft.get_peft_model(tiny_bert(), lora_config(tiny_bert(), net.layout)).eval()
    plain.load_state_dict(net.peft_model.state_dict())
    z, g = open_gates(net.layout)
    torch.testing.assert_close(logits(net, z.requires_grad_(), g), plain(**inputs).logits, atol=1e-6, rtol=0)


def test_closing_gates_changes_the_output():
    net = gated()
    z, g = open_gates(net.layout)
    reference = logits(net, z, g)
    assert not torch.allclose(logits(net, torch.zeros_like(z), g), reference, atol=1e-3)
    assert not torch.allclose(logits(net, z, torch.zeros_like(g)), reference, atol=1e-3)


# --- the equation -----------------------------------------------------------------------------------------------------


def on_grid(x, value_range, bits):
    if bits == 32:
        return x
    scale = 2 * value_range / (2**bits - 1)
    edge = (1 - 1e-7) * value_range
    return scale * (x.clamp(-edge, edge) / scale).round()


def mixed(x, value_range, chain):
    """sum_b w_b Q_b(x) for the chain above the 2-bit rung."""
    opened = [1.0, *chain.tolist(), 0.0]
    return sum((opened[i] - opened[i + 1]) * on_grid(x, value_range, bits) for i, bits in enumerate(LADDER))


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
def test_a_layer_computes_the_equation(soft):
    net = gated(scope="encoder").double()  # one rounding step of float32 would be one step of a grid
    layers, layout = net.layers(), net.layout
    z, g = some_gates(layout)
    if soft:
        z, g = ((torch.rand_like(v) * v).cummin(-1).values for v in (z, g))
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda layer, args, out: seen.__setitem__(layer.index, (args[0], out)))
        for layer in layers
    ]
    with torch.no_grad():
        logits(net, z, g)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layout.projections) == 12
    ranges = net.log_range.detach().exp()
    for index, (layer, projection) in enumerate(zip(layers, layout.projections, strict=True)):
        x, out = seen[index]

        def q(tensor, value, index=index):
            value = value.detach().float()  # the grid is computed in float32
            return mixed(value, ranges[index, tensor].float(), z[index, tensor]).double()

        base = layer.get_base_layer() if projection.adapted else layer
        expected = F.linear(q(0, x), q(1, base.weight), base.bias)
        if projection.adapted:
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            hidden = q(4, F.linear(q(0, x), q(2, down)))
            opened = torch.cat([torch.ones(1), g[index]]).double()
            expected = expected + 6.0 / 4 * (hidden * opened) @ q(3, up).t()
        difference = (out - expected).abs()
        assert bool((difference > 1e-5).double().mean() < 0.02)  # a value between two grid points may fall either way
        assert difference.median() < 1e-6


def test_closed_ranks_have_no_influence():
    net = gated()
    z, g = open_gates(net.layout)
    g[:, 1:] = 0  # ranks 1 and 2 of 4
    before = logits(net, z, g)
    for layer in net.layers():
        layer.lora_A[ADAPTER].weight.data[2:] = 100.0
        layer.lora_B[ADAPTER].weight.data[:, 2:] = 100.0
    assert torch.equal(logits(net, z, g), before)


def test_every_gate_and_range_that_matters_receives_a_gradient():
    net = gated(scope="encoder")
    z = (torch.rand(net.layout.z_shape) * 0.5 + 0.5).cumprod(-1)
    g = (torch.rand(net.layout.g_shape) * 0.5 + 0.5).cumprod(-1)
    slope_z, slope_g, *parameters = gradients(net, z, g)
    mask = net.layout.z_mask
    assert bool((slope_z[mask].abs().sum(-1) > 0).all()) and bool((slope_z[~mask] == 0).all())
    assert bool((slope_g[net.layout.g_mask] != 0).all()) and bool((slope_g[~net.layout.g_mask] == 0).all())
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    for name, slope in zip(names, parameters, strict=True):
        assert bool(slope.isfinite().all()) and bool((slope != 0).any()), name
        if name == "log_range":
            assert bool((slope[mask] != 0).all())


# --- gates are handed over for one block ------------------------------------------------------------------------------


def test_a_call_without_gates_says_what_to_do():
    net = gated()
    with pytest.raises(RuntimeError, match=r"with use_gates\(net, z, g\)"):
        net(**batch()[0])


def test_gates_are_cleared_after_the_block_and_after_an_exception():
    net = gated()
    logits(net, *open_gates(net.layout))
    assert net.gate_context.gates is None
    with pytest.raises(KeyError), adapters.gates(net, *open_gates(net.layout)):
        raise KeyError
    with pytest.raises(RuntimeError, match="called without gates"):
        net(**batch()[0])


def test_an_inner_block_gives_the_outer_gates_back():
    net = gated()
    inner, outer = open_gates(net.layout), some_gates(net.layout)
    expected = logits(net, *outer)
    with adapters.gates(net, *outer):
        logits(net, *inner)
        assert torch.equal(net(**batch()[0]).logits, expected)


def test_gates_of_another_shape_are_refused():
    net = gated()
    z, g = open_gates(net.layout)
    for bad in ((z[None], g), (z, g[None]), (z[:1], g), (z, g[:1]), (z[:, :1], g), (z, g[:, :1]), (z[..., :1], g)):
        with pytest.raises(ValueError, match="do not fit: expected z"), adapters.gates(net, *bad):
            pass
    assert net.gate_context.gates is None


def test_a_rank_of_one_has_no_rank_gates():
    net = gated(rank=1)
    z, g = open_gates(net.layout)
    assert g.shape == (6, 0)
    assert bool(logits(net, z.requires_grad_(), g).isfinite().all())


@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta], ids=lambda build: build.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_gives_the_same_gradients(build, when):
    plain, backbone = attach(build(dropout=0.0), **SETTINGS), build(dropout=0.0)
    fill_lora_b(plain)
    if when == "before":
        enable = "activation_checkpointing_enable"  # its name since transformers 5.20
        getattr(backbone, enable if hasattr(backbone, enable) else "gradient_checkpointing_enable")()
    net = attach(backbone, **SETTINGS)
    if when == "after":
        net.gradient_checkpointing_enable()
    net.load_state_dict(plain.state_dict())
    plain.train(), net.train()  # checkpointing is for training only
    assert checkpoints(net) and not checkpoints(plain)
    z, g = some_gates(plain.layout)
    for slope, expected in zip(gradients(net, z, g), gradients(plain, z, g), strict=True):
        torch.testing.assert_close(slope, expected, atol=1e-7, rtol=1e-5)


def checkpoints(net):
    """Whether activations are recomputed: the layers run twice then."""
    calls, layer = [], net.layers()[0]
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    once = 2 if "query_proj" in net.layout.projections[0].name else 1
    gradients(net, *some_gates(net.layout))
    hook.remove()
    assert len(calls) in (once, 2 * once)
    return len(calls) == 2 * once


def test_a_deep_copy_has_a_handover_of_its_own():
    net = gated(scope="encoder")
    net.train().gradient_checkpointing_enable()
    twin = copy.deepcopy(net)
    assert {id(layer.gate_context) for layer in twin.layers()} == {id(twin.gate_context)} != {id(net.gate_context)}
    z, g = open_gates(net.layout)
    assert torch.equal(logits(twin.eval(), z, g), logits(net.eval(), z, g))
    with adapters.gates(net, z, g), pytest.raises(RuntimeError, match="called without gates"):
        twin(**batch()[0])
    assert all(slope is not None for slope in gradients(twin.train(), z, g))  # recomputed with the twin's gates


# --- what is attached -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("build", BACKBONES, ids=lambda build: build.__name__)
def test_every_target_is_a_gated_layer(build, scope):
    """The contract of PEFT's experimental hook for custom modules."""
    net = attach(build(), **SETTINGS, scope=scope)
    modules = dict(net.peft_model.base_model.model.named_modules())
    assert len(net.layers()) == len(net.layout.projections)
    for index, projection in enumerate(net.layout.projections):
        layer = modules[projection.name]
        assert type(layer) is (GatedLinear if projection.adapted else QuantizedLinear)
        assert layer is net.layers()[index] and layer.gate_context is net.gate_context
        if projection.adapted:
            assert layer.lora_A[ADAPTER].weight.shape == (4, projection.in_features)
            assert layer.scaling[ADAPTER] == 6.0 / 4
            assert not layer.lora_B[ADAPTER].weight.any()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("build", BACKBONES, ids=lambda build: build.__name__)
def test_only_adapters_head_and_ranges_are_trained(build, scope):
    backbone = build()
    outside = tuple(head for head in head_modules(backbone) if not head.startswith(backbone.base_model_prefix))
    head = sum(p.numel() for name, p in backbone.named_parameters() if name.startswith(outside))
    net = attach(backbone, **SETTINGS, scope=scope)
    adapted = sum(4 * (p.in_features + p.out_features) for p in net.layout.adapted)
    assert sum(p.numel() for p in net.adapter_parameters()) == adapted == 6 * 4 * 64
    assert sum(p.numel() for p in net.head_parameters()) == head > 0
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == adapted + head + net.log_range.numel()
    assert net.log_range.shape == net.layout.z_shape[:2]


def test_an_adapter_is_a_name_or_a_function():
    by_name, given = (attach(tiny_bert(), **SETTINGS, adapter=adapter) for adapter in ("xs", xs))
    assert [name for name, _ in by_name.named_parameters()] == [name for name, _ in given.named_parameters()]
    for adapter in ("xs", xs):
        with pytest.raises(ValueError, match="'eva' is for LoRA, not for adapter 'xs'"):
            attach(tiny_bert(), **SETTINGS, adapter=adapter, init_lora_weights="eva")


@pytest.mark.parametrize("adapter", ["lora", "xs", "none"])
@pytest.mark.parametrize("head", ["out", "lora_head", "lora_A", "dense", "classifier"])
def test_a_head_is_found_whatever_it_is_called(head, adapter, tmp_path):
    """By its module: `dropout` ends in `out` too, PEFT's own parts begin with `lora_`, layers of BERT are `dense`."""
    backbone = headed(head)
    start = copy.deepcopy(getattr(backbone, head))
    net = attach(backbone, **SETTINGS, adapter=adapter)
    names = {id(p): name for name, p in net.named_parameters()}
    assert [p.shape for p in net.head_parameters()] == [(2, 32), (2,)]
    assert all(f".{head}." in names[id(p)] for p in net.head_parameters())
    assert not any(f".{head}." in names[id(p)] and "bert" not in names[id(p)] for p in net.adapter_parameters())
    learning = {id(p) for p in net.parameters() if p.requires_grad}
    assert learning == {id(p) for p in (*net.adapter_parameters(), *net.head_parameters(), net.log_range)}
    program = program_of(net)
    with torch.no_grad():
        for p in net.head_parameters() + net.adapter_parameters() * (adapter != "none"):
            p.add_(torch.full_like(p, 0.1))
    export(program, tmp_path / "adapter")  # compares what is read back
    if adapter != "none":
        plain = peft.PeftModel.from_pretrained(headed(head), tmp_path / "adapter")
        found = dict(plain.get_base_model().named_modules())[head].modules_to_save["default"].weight
        torch.testing.assert_close(found, start.weight + 0.1)


def program_of(net):
    prior = build_prior("nested", net.layout)
    guide = build_guide("mean_field", net.layout, prior, {"open_logit": 1.0})
    return BayesianLoRA(net, prior, guide, get_task("sst2").likelihood, n_train=100)


@pytest.mark.parametrize(
    "wrong", [{"target_modules": ["qery"]}, {"rank": 0}, {"rank": 33}, {"scope": "all"}, {"adapter": "loha"}], ids=str
)
def test_a_failing_attach_leaves_the_backbone_unchanged(wrong):
    backbone = tiny_bert()
    before = [(name, type(m)) for name, m in backbone.named_modules()]
    with pytest.raises(ValueError):
        attach(backbone, **{**SETTINGS, **wrong})
    assert [(name, type(m)) for name, m in backbone.named_modules()] == before
    assert all(p.requires_grad for p in backbone.parameters())
    assert backbone.state_dict().keys() == tiny_bert().state_dict().keys()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("build", BACKBONES, ids=lambda build: build.__name__)
def test_peft_alone_reloads_what_was_saved_with_no_gap(build, scope, tmp_path):
    net = gated(build, scope=scope)
    with torch.no_grad():
        for parameter in net.head_parameters():
            parameter.add_(0.1)
    net.peft_model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    assert not any(isinstance(m, GatedLinear | QuantizedLinear) for m in plain.modules())
    expected = logits(net, *open_gates(net.layout))
    assert torch.equal(plain(**batch()[0]).logits, expected)
    assert not torch.allclose(build().eval()(**batch()[0]).logits, expected, atol=1e-3)


def test_peft_merges_what_b_lora_xs_computes_and_does_not_save_it_without_cores(tmp_path):
    net = gated(adapter="xs")
    with torch.no_grad():
        for core in net.adapter_parameters():
            core.normal_(std=0.2)
    expected = logits(net, *open_gates(net.layout))
    with pytest.raises(ValueError, match=r"without its cores.*write it with pyro_blora\.export"):
        net.peft_model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    merged = copy.deepcopy(net.peft_model).merge_and_unload()
    torch.testing.assert_close(merged(**batch()[0]).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tiny_bert().eval()(**batch()[0]).logits, expected, atol=1e-3)


def test_a_backbone_takes_adapters_once():
    net = gated()
    for used in (net, net.peft_model, net.backbone):
        with pytest.raises(ValueError, match=r"has adapters already.*load it again"):
            attach(used, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"alpha": 0.0}, "alpha must be a number above 0, got 0.0"), ({"alpha": math.nan}, "alpha must be a number"),
     ({"batch_size": 0}, "batch_size and sequence_length must be at least 1, got 0 and"),
     ({"init_lora_weights": "pissa"}, "unknown init_lora_weights 'pissa': known are default, eva")],
)  # fmt: skip
def test_settings_of_no_adapter_are_refused_and_the_backbone_is_as_it_was(settings, sentence):
    backbone = tiny_bert()
    with pytest.raises(ValueError, match=sentence):
        attach(backbone, **{**SETTINGS, **settings})
    assert backbone.state_dict().keys() == tiny_bert().state_dict().keys()


def test_disabled_adapters_are_the_pretrained_model():
    net = gated()
    with torch.no_grad(), net.peft_model.disable_adapter():
        out = net(**batch()[0]).logits
    torch.testing.assert_close(out, tiny_bert().eval()(**batch()[0]).logits, atol=1e-6, rtol=0)


def test_a_quantized_layer_can_be_made_plain_again():
    net = gated(scope="encoder")
    layer = next(layer for layer in net.layers() if isinstance(layer, QuantizedLinear))
    x = torch.randn(3, layer.weight.shape[1])
    assert torch.equal(layer.plain()(x), F.linear(x, layer.weight, layer.bias))


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_calibration_starts_ranges_from_data(scope):
    net = gated(trained=False, scope=scope)
    start = attach(tiny_bert(), **SETTINGS, scope=scope).log_range
    ranges = net.log_range.exp()
    assert bool(ranges.isfinite().all()) and bool((ranges > 0).all())
    assert net.gate_context.observer is None
    for layer, row, unseen in zip(net.layers(), ranges, start.exp(), strict=True):
        adapted = isinstance(layer, GatedLinear)
        weight = layer.get_base_layer().weight if adapted else layer.weight
        torch.testing.assert_close(row[1], weight.abs().max())
        assert row[0] != unseen[0] == 1.0
        if adapted:
            torch.testing.assert_close(row[2], layer.lora_A[ADAPTER].weight.abs().max())
            assert row[3] == row[2] and row[4] != unseen[4]


def test_calibrated_activations_cover_what_was_seen_in_any_batch():
    net, largest = gated(), []
    first = net.layers()[0]
    hook = first.register_forward_hook(lambda layer, args, out: largest.append(args[0].abs().max()))
    net.train()
    calibrate(net, [batch(seed=seed)[0] for seed in range(3)])
    hook.remove()
    assert net.training and len(largest) == 3
    assert 0.9 * max(largest) < net.log_range[0, 0].exp() <= 1.0001 * max(largest)


@pytest.mark.parametrize("channel", [0, 1])
def test_every_channel_of_a_large_activation_counts(channel):
    x = torch.randn(32, 128, 768, generator=torch.Generator().manual_seed(0))  # three times what is looked at
    x[..., channel] *= 100
    extent = ranges._Extent()
    extent.activation(0, 0, x)
    true = x.abs().flatten().kthvalue(int(0.9999 * x.numel())).values
    assert 0.8 < extent.ranges[0, 0] / true < 1.25


def test_a_weight_of_zeros_gives_finite_outputs_and_gradients():
    backbone = tiny_bert()
    with torch.no_grad():
        for parameter in backbone.bert.encoder.layer[0].attention.self.query.parameters():
            parameter.zero_()
    net = attach(backbone, **SETTINGS).eval()
    calibrate(net, [batch()[0]])
    for z, g in (open_gates(net.layout), some_gates(net.layout)):
        assert bool(logits(net, z.requires_grad_(), g).isfinite().all())
        assert all(bool(slope.isfinite().all()) for slope in gradients(net, z.detach(), g))


def test_bfloat16_autocast_keeps_the_network_close():
    net = gated(scope="encoder")
    z, g = open_gates(net.layout)
    z[..., -1] = 0  # 16 bit everywhere
    exact = logits(net, z, g)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(net, z, g)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_inputs_are_rounded_once_and_give_what_equal_inputs_give(build, checkpointing, monkeypatch):
    shared, own = (gated(build, share_inputs=share) for share in (True, False))
    own.load_state_dict(shared.state_dict())
    owners = shared.layout.input_owner
    with torch.no_grad():
        shared.log_range.copy_(torch.rand_like(shared.log_range))
        own.log_range.copy_(shared.log_range)
        own.log_range[:, 0] = shared.log_range[owners, 0]
    z, g = (x.clone().requires_grad_() for x in some_gates(shared.layout))
    equal = z.detach().clone()
    equal[:, 0] = z[owners, 0].detach()
    equal.requires_grad_()
    rounded, inner = [], gate_context.quantize_on
    monkeypatch.setattr(gate_context, "quantize_on", lambda x, grid: rounded.append(x.shape[-1]) or inner(x, grid))
    if checkpointing:
        shared.gradient_checkpointing_enable()
        shared.train(), own.train()
        for module in (*shared.modules(), *own.modules()):
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    outs = []
    for net, chains in ((shared, z), (own, equal)):
        with adapters.gates(net, chains, g):
            outs.append(net(**batch()[0]).logits)
        if net is shared and not checkpointing:
            inputs = rounded.count(net.layout.projections[0].in_features)
            assert inputs == 2 if build is tiny_bert else inputs <= 6  # DeBERTa's layers read positions, too
    torch.testing.assert_close(*outs)
    mine, true = (torch.autograd.grad(out.sum(), (chains, net.log_range))
                  for out, chains, net in zip(outs, (z, equal), (shared, own), strict=True))  # fmt: skip
    for slope, separate in zip(mine, true, strict=True):
        summed = separate.clone()
        summed[:, 0] = torch.zeros_like(separate[:, 0]).index_add(0, owners, separate[:, 0])
        torch.testing.assert_close(slope, summed, atol=1e-5, rtol=1e-4)


def test_the_whole_network_can_be_compiled_without_a_break(monkeypatch):
    """For torch.compile the layers are plain PyTorch: the quantizer's own compiled kernels stay out of the way."""
    torch.compiler.reset()
    monkeypatch.setattr(fake_quantize, "_kernels", None)  # nobody asks for them
    net = gated(lambda: tiny_bert(num_hidden_layers=1), scope="encoder")  # each layer takes seconds to compile
    z, g = some_gates(net.layout)
    with monkeypatch.context() as patch:
        patch.setattr(fake_quantize, "_kernels", lambda *_: fake_quantize._EAGER)
        plain = gradients(net, z, g)
    torch._dynamo.utils.counters.clear()
    net.peft_model.compile(backend="aot_eager")
    compiled = gradients(net, z, g)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for slope, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(slope, expected, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_a_shared_input_is_rounded_anew_in_every_block():
    """Also where the very same tensor comes again under other gates, in a block within a block."""
    net = gated(tiny_bert, share_inputs=True)
    layer, x = net.layers()[0], torch.randn(2, 3, 32)
    coarse, fine = (torch.full(net.layout.z_shape, value) for value in (0.0, 1.0))
    g = torch.ones(net.layout.g_shape)

    def alone(z):
        with adapters.gates(net, z, g):
            return layer(x)

    expected = alone(coarse), alone(fine)
    assert not torch.equal(*expected)
    with adapters.gates(net, coarse, g):
        before = layer(x)
        with adapters.gates(net, fine, g):
            within = layer(x)
        after = layer(x)
    assert torch.equal(before, expected[0]) and torch.equal(within, expected[1]) and torch.equal(after, expected[0])


def test_weights_of_keys_that_the_net_has_not_are_refused():
    net = attach(tiny_bert(), **SETTINGS)
    z, g = (torch.ones(shape) for shape in (net.layout.z_shape, net.layout.g_shape))
    key, value = next(iter(net.random_weights().items()))
    said = r"weights of \(0, 'loraA'\) are none of net.random_weights\(\): give its keys"
    with pytest.raises(ValueError, match=said), adapters.use_gates(net, z, g, weights={(0, "loraA"): value}):
        pass
    with adapters.use_gates(net, z, g, weights={key: value.detach() + 1.0}):
        pass
