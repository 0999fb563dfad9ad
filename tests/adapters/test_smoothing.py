"""Smoothing: nothing at 32 bit, the formula where something is rounded, a start that helps; out and in again."""

import pytest
import torch
from models import batch, random_chains, tiny_bert, tiny_deberta
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import attach, export, load, use_gates
from pyro_blora.__main__ import main
from pyro_blora.adapters import calibrate, open_gates, start_smoothing
from pyro_blora.deploy.merged import merge
from pyro_blora.layout import BASE, INPUT, LORA_A
from pyro_blora.posterior.draws import deployed
from pyro_blora.quantizer import quantize
from pyro_blora.training import fit

pytestmark = pytest.mark.usefixtures("eager")


def smoothed(build=tiny_bert, **settings):
    """A net with ranges and scales away from their start."""
    torch.manual_seed(0)
    net = attach(build(dropout=0.0), rank=4, sequence_length=10, smoothing=True, **settings).eval()
    for p in net.adapter_parameters():
        torch.nn.init.normal_(p, std=0.2)
    calibrate(net, [batch()[0]])
    torch.nn.init.normal_(net.smoothing.log_scale, std=0.5)
    return net


def logits(net, z, g, **settings):
    with torch.no_grad(), use_gates(net, z, g, **settings):
        return net.logits(**batch()[0])


@pytest.mark.parametrize(
    "net",
    [{}, {"adapter": "xs"}, {"build": tiny_deberta, "scope": "encoder", "share_inputs": True}],
    ids=["LoRA", "XS", "DeBERTa, shared inputs"],
)
def test_it_changes_nothing_at_32_bit_and_little_at_16(net):
    net = smoothed(**net)
    z, g = open_gates(net.layout)
    exact = logits(net, z, g, opened=True)
    z[..., -1] = 0
    with torch.no_grad():
        net.log_range.add_(2.0)  # nothing is clipped
    fine = logits(net, z, g)
    torch.testing.assert_close(fine, exact, atol=5e-3, rtol=0)
    assert not torch.equal(fine, exact)
    z[..., 2:] = 0
    coarse = logits(net, z, g)
    torch.nn.init.zeros_(net.smoothing.log_scale)
    assert torch.equal(logits(net, *open_gates(net.layout), opened=True), exact)
    assert not torch.equal(logits(net, z, g), coarse)


def test_a_layer_rounds_the_divided_input_and_the_multiplied_weights():
    """With their gradients, in everything that learns."""
    net = smoothed()
    layer, x = net.layers()[1], torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    z, g = random_chains(net.layout.z_shape), open_gates(net.layout)[1]
    ladder = torch.nn.functional.pad(z, (1, 0), value=1.0)[1]
    learned = [net.smoothing.log_scale, net.log_range, *layer.low_rank()]

    def on(tensor, value):
        return quantize(value, net.log_range[1, tensor].exp(), ladder[tensor])

    def by_hand():
        s, (down, up) = net.smoothing.scales()[1], layer.low_rank()
        x_hat = on(INPUT, x / s)
        y = x_hat @ on(BASE, layer.base_weight() * s).T + layer.get_base_layer().bias
        hidden = on(net.layout.tensors.index("hidden"), x_hat @ on(LORA_A, down * s).T)
        return y + layer.scaling["default"] * hidden @ on(net.layout.tensors.index("lora_B"), up).T

    with use_gates(net, z.requires_grad_(), g):
        found = layer(x)
    expected = by_hand()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    slopes = [torch.autograd.grad((y * upstream).sum(), learned) for y in (found, expected)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert slopes[0][0].abs().max() > 0


@pytest.mark.parametrize("share", [False, True])
def test_its_start_takes_an_outlier_out_of_an_activation(share):
    """One channel that is fifty times as large as the others, as trained transformers have; inputs of 4 bit."""
    model = tiny_bert(dropout=0.0)
    gain = model.bert.embeddings.LayerNorm.weight
    with torch.no_grad():
        gain[3] *= 50
        for name in ("query", "key", "value"):
            model.get_submodule(f"bert.encoder.layer.0.attention.self.{name}").weight[:, 3] /= 50
    net = attach(model, rank=4, sequence_length=10, smoothing=True, share_inputs=share).eval()
    inputs, _ = batch()
    z, g = open_gates(net.layout)
    exact = logits(net, z, g, opened=True)
    z[:3, INPUT, 1:] = 0  # of the first layer
    z[:3, BASE, 2:] = 0
    errors = []
    for start in (lambda: None, lambda: start_smoothing(net, [inputs])):
        start()
        calibrate(net, [inputs])
        with torch.no_grad():  # of the weights as they are multiplied
            for layer, s in zip(net.layers(), net.smoothing.scales(), strict=True):
                net.log_range[layer.index, BASE] = (layer.base_weight() * s).abs().max().log()
        errors.append((logits(net, z, g) - exact).square().mean().sqrt())
    assert errors[1] < errors[0] / 3
    owners = net.layout.input_owner.tolist()
    assert len(net.smoothing.log_scale) == 32 * len(set(owners))


def test_it_learns_at_the_rate_of_the_ranges_and_goes_out_and_in(tmp_path):
    backbone = save_tiny_backbone(tmp_path / "backbone")
    config = tiny_config(backbone, smoothing=True, lr_ranges=1e-2, prior="fixed", prior_settings={"bits": 4})
    trained = fit(config, quiet=True)
    still = fit(
        tiny_config(backbone, smoothing=True, lr_ranges=0.0, prior="fixed", prior_settings={"bits": 4}), quiet=True
    )
    moved = (trained.program.net.smoothing.log_scale - still.program.net.smoothing.log_scale).abs()
    assert 1e-3 < moved.mean() < 0.1 and still.program.net.smoothing.log_scale.std() > 0.1
    folder = export(trained.program, tmp_path / "out", config=config, tokenizer=trained.parts.tokenizer)
    merged = merge(trained.program, tmp_path / "merged")
    for card in (folder, merged):
        assert "At 32 bit this changes nothing, so it is not in here" in (card / "README.md").read_text()
    loaded = load(folder, backbone=backbone)
    inputs = {"input_ids": torch.arange(4, 24).view(2, 10)}
    answers = [program.eval().logits(inputs, deployed(program)) for program in (trained.program, loaded)]
    assert torch.equal(*answers)


def test_an_adapter_without_quantized_projections_is_refused(capsys):
    assert main(["train", "--method", "adalora", "--smoothing"]) == 2
    assert "smoothing is of quantized projections, which this adapter does not have" in capsys.readouterr().err
