"""--granularity channel: a range for every output channel of a weight, from the network to a run's folder."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from models import batch, random_chains, tiny_bert, tiny_deberta, weighted_net, weighted_program
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import RunConfig, adapters, attach, load
from pyro_blora.__main__ import main
from pyro_blora.adapters import calibrate, clipped
from pyro_blora.adapters.gate_context import Observer
from pyro_blora.adapters.gated_model import observed
from pyro_blora.config.naming import digest
from pyro_blora.layout import BASE, HIDDEN, INPUT, LORA_A, LORA_B, AdapterLayout
from pyro_blora.quantizer import rounded
from pyro_blora.run import train_run
from pyro_blora.training import fit
from pyro_blora.training.gate_init import _Slopes
from pyro_blora.training.range_calibration import range_errors


def both(adapter="lora", build=tiny_bert, **settings):
    """The same net with ranges by tensor and by channel, those of a tensor's channels alike."""
    nets = [weighted_net(adapter, build, granularity=kind, **settings) for kind in ("tensor", "channel")]
    by_tensor, by_channel = nets
    with torch.no_grad():
        by_channel.log_range.copy_(by_channel.layout.by_range(by_tensor.log_range))
    return nets


def test_weights_have_a_range_for_every_row_and_activations_one():
    net = weighted_net("lora", scope="encoder", granularity="channel")
    calibrate(net, [batch()[0]])
    for layer, projection in zip(net.layers(), net.layout.projections, strict=True):
        i = layer.index
        torch.testing.assert_close(net.value_range(i, BASE), layer.base_weight().abs().amax(1))
        assert net.value_range(i, INPUT).shape == net.value_range(i, HIDDEN).shape == ()
        if projection.adapted:
            down, up = layer.low_rank()
            torch.testing.assert_close(net.value_range(i, LORA_A), down.abs().amax(1))
            torch.testing.assert_close(net.value_range(i, LORA_B), up.abs().amax(1))
    assert net.log_range.shape == net.layout.range_shape == (sum(net.layout.range_sizes),)
    with torch.no_grad():
        net.log_range.sub_(1.0)
    weight = net.layers()[0].base_weight()
    share = (weight.abs() > weight.abs().amax(1, keepdim=True) * math.exp(-1)).double().mean()
    assert clipped(net, [batch()])[0, BASE] == pytest.approx(float(share)) and 0 < share < 1


def test_rows_of_zeros_start_at_the_range_of_the_other_side():
    net = attach(tiny_bert(), rank=4, sequence_length=10, granularity="channel")  # B = 0
    for layer in net.layers():
        largest = layer.low_rank()[0].abs().max()
        torch.testing.assert_close(net.value_range(layer.index, LORA_B), largest.expand(32))


@pytest.mark.parametrize(
    "settings", [{"scope": "encoder"}, {"adapter": "xs"}, {"build": tiny_deberta}], ids=["encoder", "xs", "deberta"]
)
def test_with_equal_ranges_the_network_is_that_of_one_range_a_tensor(settings):
    outputs, slopes = [], []
    for net in both(**settings):
        z, g = (random_chains(shape).requires_grad_() for shape in (net.layout.z_shape, net.layout.g_shape))
        with adapters.use_gates(net, z, g):
            logits = net.logits(**batch()[0])
            of_z, of_g, of_ranges, *of_weights = torch.autograd.grad(
                logits.square().sum(), (z, g, net.log_range, *net.adapter_parameters())
            )
        outputs.append(logits)
        if net.layout.granularity == "channel":
            owners = net.layout.range_owner
            of_ranges = torch.zeros(of_z[..., 0].numel()).index_add(0, owners, of_ranges).view(of_z.shape[:2])
        slopes.append([of_z, of_g, of_ranges, *of_weights])
    assert torch.equal(*outputs)
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def test_drawn_weights_of_every_example_are_on_the_grids_of_their_rows():
    net = weighted_net("lora", granularity="channel").eval()
    z, g = random_chains(net.layout.z_shape), random_chains(net.layout.g_shape)
    inputs = batch(size=3)[0]
    drawn = {
        key: torch.stack([p.detach() * (1 + 0.1 * i) for i in range(3)]) for key, p in net.random_weights().items()
    }
    with torch.no_grad():
        with adapters.use_gates(net, z, g, drawn):
            together = net.logits(**inputs)
        for i in range(3):
            with adapters.use_gates(net, z, g, {key: w[i] for key, w in drawn.items()}):
                torch.testing.assert_close(net.logits(**inputs)[i], together[i], rtol=1e-4, atol=1e-4)


def test_ranges_are_fitted_row_by_row_by_squared_errors_weighted_by_the_slope():
    program = weighted_program(weighted_net("lora", granularity="channel"))
    net, layout, (inputs, labels) = program.net, program.layout, batch()
    found = range_errors(program, [(inputs, labels)])
    layer = net.layers()[1]
    weight = layer.base_weight().requires_grad_()
    with observed(net, Observer()):
        nll = -program.likelihood(net.logits(**inputs), scale=program.log_scale.exp()).log_prob(labels).sum()
        (slope,) = torch.autograd.grad(nll, weight)
    ranges, errors = (layout.ranges_of(x, layer.index, BASE) for x in (found.ranges, found.errors))
    largest = weight.detach().abs().amax(1)
    torch.testing.assert_close(ranges[:, 0], largest)
    for candidate in (0, 7):
        for i, bits in enumerate(layout.ladder):
            change = rounded(weight, ranges[:, candidate], bits) - weight.detach()
            expected = (change * slope).square().mean(1)
            torch.testing.assert_close(errors[:, candidate, i], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    best = layout.ranges_of(found.best_by_width(), layer.index, BASE)
    assert torch.equal(best[:, 0], ranges.gather(1, errors[..., 0].argmin(1, keepdim=True))[:, 0])
    of_all = found.best(torch.ones(*layout.z_shape[:2], 5))
    adapters.set_ranges(net, of_all)
    torch.testing.assert_close(net.log_range.exp(), of_all)


def test_gates_start_from_what_each_rows_grid_changes():
    net = weighted_net("lora", granularity="channel")
    ranges = net.log_range.detach().exp()[..., None] * torch.tensor([0.5, 0.8, 1.0, 1.0, 1.0])
    weight = net.layers()[0].base_weight()
    changes = list(_Slopes(net.layout, ranges, 4)._changes(0, BASE, weight))
    for i, bits in enumerate((2, 4, 8)):
        by_hand = [rounded(row, row.abs().max() * (0.5, 0.8, 1.0)[i], bits) - row for row in weight]
        torch.testing.assert_close(changes[i], torch.stack(by_hand), rtol=1e-4, atol=1e-5)


def test_a_run_by_channel_resumes_to_the_same_bits_and_loads_to_the_same_predictions(tmp_path):
    config = tiny_config(
        save_tiny_backbone(tmp_path / "backbone"), granularity="channel", scope="encoder", prior_settings={"rate": 3},
        output_dir=str(tmp_path / "runs"),
    )  # fmt: skip
    folder = train_run(config)
    fit(config, folder=tmp_path / "cut", quiet=True, until=5)
    resumed, loaded = fit(config, folder=tmp_path / "cut", quiet=True).parts.program, load(folder)
    for (name, mine), other in zip(resumed.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert loaded.net.log_range.dim() == 1 and loaded.layout.granularity == "channel"
    kept = pd.read_parquet(folder / "predictions.parquet")
    names = [name for name in kept if name.startswith("p_")]
    np.testing.assert_array_equal(loaded.predict(kept)[names], kept[names])


def test_layouts_and_digests_of_before_are_those_of_one_range_a_tensor():
    layout = attach(tiny_bert(), rank=4, sequence_length=10).layout
    older = {name: value for name, value in json.loads(json.dumps(layout.to_dict())).items() if name != "granularity"}
    assert AdapterLayout.from_dict(older) == layout and layout.range_shape == layout.z_shape[:2]
    values = dataclasses.asdict(RunConfig())
    assert digest({name: value for name, value in values.items() if name != "granularity"}) == RunConfig().digest
    assert RunConfig(granularity="channel").digest != RunConfig().digest


def test_an_unknown_granularity_is_one_sentence_and_code_2(capsys):
    assert main(["train", "--granularity", "chanel"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "did you mean 'channel'" in told
    with pytest.raises(ValueError, match="unknown granularity 'row'"):
        attach(tiny_bert(), granularity="row")
