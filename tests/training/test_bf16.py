"""Under bfloat16 autocast: every observer and every quantized map, in networks that mix two results of one layer."""

from pathlib import Path

import pytest
import torch
from models import batch, tiny_bert, tiny_deberta
from tiny import save_tiny_backbone, tiny_config
from torch import nn

from pyro_blora.adapters import Observer, attach, calibrate, observed
from pyro_blora.training import fit

pytestmark = pytest.mark.usefixtures("eager")

OWN = """
import sys
sys.path[:0] = [{tests!r}]
import transformers
from models import tiny_{kind}


def tiny(num_labels):
    model = tiny_{kind}(num_labels=num_labels, vocab_size=400)
    return model, transformers.AutoTokenizer.from_pretrained({tokenizer!r})
"""
KINDS = ("bert", "deberta", "deberta_v2", "llama")
WHAT = {
    "adapted": {},
    "encoder": {"scope": "encoder"},
    "checkpointed": {"scope": "encoder", "gradient_checkpointing": True},
    "shared": {"share_inputs": True},
    "eva": {"prior": "eva", "init_lora_weights": "eva"},
    "xs": {"adapter": "xs", "weights": "gaussian"},
    "laplace": {"weights": "laplace", "weights_settings": {"structure": "diag", "prior_precision": 1.0}},
    "bayesian_bits": {"method": "bayesian_bits"},
    "rank_gates": {"method": "rank_gates"},
}
OF_ALL_KINDS = ("adapted", "encoder", "checkpointed", "xs")  # the others do not depend on the architecture
PAIRS = [(kind, what) for kind in KINDS for what in WHAT if what in OF_ALL_KINDS or kind in ("bert", "deberta_v2")]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """kind -> a backbone's name, `file.py:function`."""
    folder = tmp_path_factory.mktemp("backbones")
    tokenizer = save_tiny_backbone(folder / "tokenizer")
    names = {}
    for kind in KINDS:
        path = folder / f"{kind}.py"
        path.write_text(OWN.format(tests=str(Path(__file__).parents[1]), kind=kind, tokenizer=str(tokenizer)))
        names[kind] = f"{path}:tiny"
    return names


def config_of(backbones, kind, **changes):
    values = {"max_train": 16, "epochs": 2, "batch_size": 4, "rank": 2, "precision": "bf16", "kl_warmup": 0.5}
    targets = {"target_modules": ("q_proj", "k_proj", "v_proj")} if kind == "llama" else {}
    return tiny_config(backbones[kind], **{**values, **targets, **changes})


@pytest.mark.parametrize(("kind", "what"), PAIRS)
def test_gates_start_and_train(backbones, kind, what):
    trained = fit(config_of(backbones, kind, **WHAT[what]), quiet=True)
    assert trained.metrics[-1]["step"] == 8
    assert all(bool(p.isfinite().all()) for p in trained.program.parameters())
    if trained.program.net.layout.adapted and what not in ("rank_gates",):
        assert any(bool(p.abs().sum() > 0) for p in trained.program.gate_guide.parameters()), "the gates did not start"


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_through_the_same_bits(backbones, kind, tmp_path):
    config = config_of(backbones, kind, checkpoint_steps=1)
    whole = fit(config, folder=tmp_path / "whole", quiet=True).program
    for until in (4, 6, None):  # as the gates start, and after
        parts = fit(config, folder=tmp_path / "parts", quiet=True, until=until).program
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


class Dtypes(Observer):
    """What a layer's own map would have returned, beside what an observer returned."""

    def __init__(self, inner):
        self.inner, self.pairs = inner, []

    def _note(self, given, returned):
        self.pairs.append((given.dtype, returned.dtype, given.shape, returned.shape))
        return returned

    def activation(self, projection, tensor, x):
        return self._note(x, self.inner.activation(projection, tensor, x))

    def product(self, projection, tensor, x, weight, bias):
        plain = nn.functional.linear(x, weight, bias)
        return self._note(plain, self.inner.product(projection, tensor, x, weight, bias))

    def ranks(self, projection, hidden):
        return self._note(hidden, self.inner.ranks(projection, hidden))


@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta])
def test_observers_return_the_dtype_and_shape_they_were_given(build):
    from pyro_blora.adapters.input_pca import _Moments
    from pyro_blora.adapters.ranges import _Clipped, _Extent
    from pyro_blora.training.gate_init import _Slopes
    from pyro_blora.training.range_calibration import _Sample

    net = attach(build(), rank=2, sequence_length=10, scope="encoder")
    net.autocast = torch.bfloat16
    inputs, labels = batch()
    calibrate(net, [inputs])
    ranges = net.log_range.exp().detach()
    observers = [
        Observer(), _Extent(), _Sample(net.layout, 1, torch.device("cpu")), _Clipped(net), _Moments({0}),
        _Slopes(net.layout, ranges[..., None].expand(*ranges.shape, 5), len(labels)),
    ]  # fmt: skip
    for observer in observers:
        noted = Dtypes(observer)
        with observed(net, noted):
            net(**inputs)
        assert noted.pairs, "nothing was observed"
        for given, returned, shape, returned_shape in noted.pairs:
            assert (given, shape) == (returned, returned_shape), type(observer).__name__
        assert any(given == torch.bfloat16 for given, *_ in noted.pairs)


@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta])
@pytest.mark.parametrize("scope", ["adapted", "encoder"])
def test_gated_layers_return_what_plain_ones_would(build, scope):
    """bfloat16 out of every gated layer, whatever its gates, also with one weight an example."""
    from pyro_blora.adapters import gates, open_gates

    net = attach(build(), rank=2, sequence_length=10, scope=scope)
    net.autocast, (inputs, labels) = torch.bfloat16, batch()
    calibrate(net, [inputs])
    seen = []
    for layer in net.layers():
        layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    z, g = open_gates(net.layout)
    apart = {key: p.expand(len(labels), *p.shape) for key, p in net.random_weights().items()}
    for bits in (z, z * 0.0, (z * 0.5).requires_grad_()):
        with gates(net, bits, g):
            net(**inputs)
    if build is tiny_bert:  # DeBERTa's positions are no example's: they are passed one example at a time
        with gates(net, z, g, apart):
            net(**inputs)
    assert set(seen) == {torch.bfloat16}
