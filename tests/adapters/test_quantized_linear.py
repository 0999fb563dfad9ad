"""Several maps of one quantized input: gradients, what is saved, what is computed again."""

import contextlib

import pytest
import torch
from models import batch, random_chains, tiny_bert, tiny_deberta

from pyro_blora import adapters, attach
from pyro_blora.adapters import layers, quantized_linear
from pyro_blora.adapters.quantized_linear import Map, quantized_products, source_of
from pyro_blora.quantizer import grids, mixture_weights, quantize_on


@pytest.mark.parametrize("gridless", [None, "x", "first", "second"])
@pytest.mark.parametrize("frozen", [False, True])
def test_products_and_their_gradients_are_those_of_the_separate_operations(gridless, frozen):
    """Rounded again in the backward pass, every gradient is that of rounding once and keeping the result."""
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    x = torch.randn(3, 5, 7, **double).transpose(0, 1).requires_grad_()  # not contiguous
    weights = [torch.randn(m, 7, **double).requires_grad_(not frozen) for m in (4, 2)]
    bias = torch.randn(4, **double).requires_grad_()
    ranges = (torch.rand(3, **double) + 0.5).requires_grad_()
    chains = mixture_weights(torch.rand(3, 5, **double).cumprod(-1)).requires_grad_()
    upstream = [torch.randn(5, 3, m, **double) for m in (4, 2)]
    names = ("x", "first", "second")
    on = {n: None if n == gridless else g for n, g in zip(names, grids(ranges, chains), strict=True)}
    learned = [t for t in (x, bias, ranges, chains, *weights) if t.requires_grad]

    def rounded(name, value):
        return value if on[name] is None else quantize_on(value, on[name])

    separate = [torch.nn.functional.linear(rounded("x", x), rounded("first", weights[0]), bias),
                torch.nn.functional.linear(rounded("x", x), rounded("second", weights[1]))]  # fmt: skip
    together = quantized_products(x, on["x"], [Map(weights[0], on["first"], bias), Map(weights[1], on["second"])])
    slopes = []
    for outs in (together, separate):
        loss = sum((out * u).sum() for out, u in zip(outs, upstream, strict=True))
        slopes.append(torch.autograd.grad(loss, learned, retain_graph=True))
    for out, expected in zip((*together, *slopes[0]), (*separate, *slopes[1]), strict=True):
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)


def test_products_save_input_and_weights_as_they_are(eager):
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32)
    given = {x.data_ptr(), weight.data_ptr()}
    saved = []
    ranges, chains = torch.ones(2, requires_grad=True), torch.full((2, 5), 0.2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        on_x, on_weight = grids(ranges, chains)
        quantized_products(x, on_x, [Map(weight, on_weight)])
    assert {t.data_ptr() for t in saved if t.numel() > 20} == given


def test_products_under_autocast_are_in_its_dtype(eager):
    torch.manual_seed(0)
    x, weight = torch.randn(6, 32, requires_grad=True), torch.randn(8, 32)
    on_x, on_weight = grids(torch.full((2,), 2.0), mixture_weights(torch.tensor([[1.0, 1, 1, 0, 0]] * 2)))
    exact = quantized_products(x, on_x, [Map(weight, on_weight)])[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = quantized_products(x, on_x, [Map(weight, on_weight)])[0]
    assert out.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, atol=0.2, rtol=0.02)
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope, torch.autograd.grad(exact.sum(), x)[0], atol=0.1, rtol=0.02)


# --- inputs that are computed again -----------------------------------------------------------------------------------


def saved_and_gradients(build, again):
    """Sizes of what a training step saves, and its gradients, with inputs computed again or kept."""
    torch.manual_seed(0)
    net = attach(build(dropout=0.0), rank=4, sequence_length=10, scope="encoder")
    z, g = random_chains(net.layout.z_shape), random_chains(net.layout.g_shape)
    storages = {}

    def pack(saved):
        if saved.dim():
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with pytest.MonkeyPatch.context() as patch:
        if not again:
            patch.setattr(layers, "source_of", lambda x: None)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with adapters.gates(net, z.requires_grad_(), g.requires_grad_()):
                loss = net(**batch(size=16)[0]).logits.square().sum()
            loss.backward()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    gradients = [p.grad for p in (*net.parameters(), z, g) if p.grad is not None]
    return sum(size for place, size in storages.items() if place not in own), gradients


@pytest.mark.parametrize("build", [tiny_bert, tiny_deberta])
def test_what_the_module_before_a_map_keeps_is_not_kept_twice(build, eager):
    (less, again), (more, kept) = (saved_and_gradients(build, again) for again in (True, False))
    assert len(again) == len(kept) and all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    activations = 2 * 16 * 10 * 4 * (64 + 32)  # of two layers: what the activation and a layer norm give
    assert more - less >= activations


def test_a_tensor_that_was_changed_is_not_computed_again():
    norm = torch.nn.LayerNorm(4)
    quantized_linear.remember_sources(norm)
    x = torch.randn(3, 4, requires_grad=True)
    y = norm(x)
    assert source_of(y).x is x and source_of(y + 1) is None
    with torch.no_grad():
        y.mul_(2)
    assert source_of(y) is None
    y = norm(x * 1)
    y.source.x.data.add_(0)  # .data tells nobody
    assert source_of(y) is not None
    with torch.no_grad():
        y.source.x.add_(1)
    assert source_of(y) is None
    with torch.no_grad():
        assert source_of(norm(x)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert source_of(norm(x)) is None


def test_the_product_behind_a_frozen_weight_is_near_the_exact_one(monkeypatch):
    """Of bfloat16 where the processor has matrix units for it; what learns is exact everywhere."""
    torch.manual_seed(0)
    x, weights = torch.randn(64, 48), [torch.randn(32, 48), torch.randn(32, 48).requires_grad_()]
    ranges, upstream = torch.full((3,), 2.0, requires_grad=True), torch.randn(64, 32)
    chains = mixture_weights(torch.tensor([[1.0, 0.9, 0.5, 0.2, 0.1]] * 3)).requires_grad_()
    found = []
    for large in (1, 1 << 60):
        monkeypatch.setattr(quantized_linear, "_LARGE", large)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        on_x, *on = grids(ranges, chains)
        outs = quantized_products(x, on_x, [Map(w, g) for w, g in zip(weights, on, strict=True)])
        loss = sum((out * upstream).sum() for out in outs)
        found.append(torch.autograd.grad(loss, (ranges, chains, weights[1])))
    (near_range, near_chain, learned), (exact_range, exact_chain, true) = found
    assert torch.equal(learned, true) and not torch.equal(near_chain, exact_chain)
    assert torch.equal(near_chain[[0, 2]], exact_chain[[0, 2]])
    for near, exact in ((near_range, exact_range), (near_chain, exact_chain)):
        assert (near - exact).norm() / exact.norm() < 0.01


def gradients_of(net, wrap):
    z, g = random_chains(net.layout.z_shape).requires_grad_(), random_chains(net.layout.g_shape).requires_grad_()
    net.zero_grad()
    with wrap(), adapters.gates(net, z, g):
        net(**batch(size=4)[0]).logits.square().sum().backward()
    return [x.grad.clone() for x in (z, g, net.log_range)]


def with_random_norms(hook=None):
    """An encoder in which a norm of a norm is another one; `hook` is registered before gates are attached."""
    torch.manual_seed(0)
    backbone = tiny_bert(dropout=0.0)
    for module in backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight), torch.nn.init.normal_(module.bias)
            if hook is not None:
                module.register_forward_hook(hook)
    return attach(backbone, rank=4, sequence_length=10, scope="encoder", target_modules=["value"]).train()


@pytest.mark.parametrize("wrap", [contextlib.nullcontext, torch.autograd.graph.save_on_cpu])
def test_a_checkpoint_that_gives_back_another_object_gets_the_same_gradients(wrap, eager):
    plain = gradients_of(with_random_norms(), contextlib.nullcontext)
    net = with_random_norms()
    net.gradient_checkpointing_enable()
    for mine, true in zip(gradients_of(net, wrap), plain, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-7)


def test_a_hook_that_changes_what_a_norm_gives_is_seen(eager, monkeypatch):
    def doubled(module, inputs, output):
        return 2 * output

    mine = gradients_of(with_random_norms(doubled), contextlib.nullcontext)
    monkeypatch.setattr(layers, "source_of", lambda x: None)
    for a, b in zip(mine, gradients_of(with_random_norms(doubled), contextlib.nullcontext), strict=True):
        torch.testing.assert_close(a, b)


def test_modules_of_another_kind_are_left_alone():
    class Conditional(torch.nn.LayerNorm):
        def forward(self, x, shift=0.0):
            return super().forward(x) + shift, shift

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conditional = torch.nn.LayerNorm(4), Conditional(4)

        def forward(self, x):
            return self.conditional(self.norm(input=x), 1.0)[0]

    net, x = Own(), torch.randn(3, 4, requires_grad=True)
    quantized_linear.remember_sources(net)
    quantized_linear.remember_sources(net)  # twice is once
    assert source_of(net(x)) is None and len(net.norm._forward_hooks) == 1
