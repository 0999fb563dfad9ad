"""`check_adapter` finds what is wrong with an adapter and says it."""

import pytest
import torch
from torch import nn

from pyro_blora.adapters import ADAPTERS, AdaLoRAModel, GatedModel, gated
from pyro_blora.adapters.adalora import adalora
from pyro_blora.adapters.gate_context import ADAPTER
from pyro_blora.adapters.layers import GatedLinear
from pyro_blora.layout import BASE, HIDDEN, LORA_A, LORA_B
from pyro_blora.testing import check_adapter


def of(layer, **settings):
    """The adapter of a class of layers."""

    def adapter(backbone, layout, head):
        return gated(backbone, layout, head, layer, **settings)

    return adapter


class Scaled(GatedLinear):
    """A good one: LoRA whose columns of lora_B are scaled by numbers that learn."""

    def start(self):
        self.lora_scale = nn.Parameter(torch.ones(self.r[ADAPTER]))

    def low_rank(self):
        down, up = super().low_rank()
        return down, up * self.lora_scale


class Started(GatedLinear):
    def start(self):
        nn.init.ones_(self.lora_B[ADAPTER].weight)


class Frozen(GatedLinear):
    def start(self):
        self.lora_A[ADAPTER].weight.requires_grad_(False)
        self.lora_B[ADAPTER].weight.requires_grad_(False)


class Unused(GatedLinear):
    def forward(self, x, *args, **kwargs):
        return self.gate_context.products(
            self.index, x, (BASE, self.get_base_layer().weight, self.get_base_layer().bias)
        )[0]


class OneSided(GatedLinear):
    def low_rank(self):
        down, up = super().low_rank()
        return down.detach(), up


class Computes(GatedLinear):
    """What LoRA computes, written down; a subclass leaves something out."""

    ranks, bits, scale = True, True, 1.0

    def forward(self, x, *args, **kwargs):
        gate_context, index, base = self.gate_context, self.index, self.get_base_layer()
        down, up = self.low_rank()
        y, hidden = gate_context.products(index, x, (BASE, base.weight, base.bias), (LORA_A, down, None))
        hidden = gate_context.activation(index, HIDDEN, hidden) if self.bits else hidden
        hidden = gate_context.ranks(index, hidden) if self.ranks else hidden
        return y + self.scale * self.scaling[ADAPTER] * gate_context.product(index, LORA_B, hidden, up)


class NoRanks(Computes):
    ranks = False


class NoBits(Computes):
    bits = False


class Louder(Computes):
    scale = 2.0


class NeverDrawn(GatedLinear):
    def low_rank(self):
        return tuple(self.random_weights().values())


class OthersDrawn(GatedLinear):
    def random_weights(self):
        return {**super().random_weights(), "base": self.get_base_layer().weight}

    def low_rank(self):
        down, up = (self.gate_context.drawn(self.index, *each) for each in super().random_weights().items())
        return down, up


class Turned(Computes):
    """It exports the transposed update."""

    def forward(self, x, *args, **kwargs):
        down, up = GatedLinear.low_rank(self)
        base = self.get_base_layer()
        y, hidden = self.gate_context.products(self.index, x, (BASE, base.weight, base.bias), (LORA_A, down, None))
        hidden = self.gate_context.ranks(self.index, self.gate_context.activation(self.index, HIDDEN, hidden))
        return y + self.scaling[ADAPTER] * self.gate_context.product(self.index, LORA_B, hidden, up)

    def low_rank(self):
        down, up = GatedLinear.low_rank(self)
        return down.mT, up


class Elsewhere(GatedLinear):
    """Part of what it computes with is in no file."""

    count = 0

    def start(self):
        Elsewhere.count += 1
        self.factor = 1.0 + Elsewhere.count

    def low_rank(self):
        down, up = super().low_rank()
        return down, up * self.factor


class VectorPenalty(GatedModel):
    def penalty(self):
        return torch.zeros(2)


class NoParameters(GatedModel):
    def parameters_per_rank(self, projection):
        return 0


class FewRanks(AdaLoRAModel):
    def allocate(self, step, steps, target_rank):
        return super().allocate(step, steps, target_rank)[:1]


def few_ranks(backbone, layout, head):
    net = adalora(backbone, layout, head)
    net.__class__ = FewRanks
    return net


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda backbone, layout, head: backbone, "must return a pyro_blora.adapters.GatedModel, got BertFor"),
        (of(Started), "with every gate open, it changes the logits by .*%: start it where its update is 0"),
        (of(Frozen), "no parameter of the adapter learns: leave requires_grad on"),
        (of(Unused), "its parameters do not change the logits"),
        (of(OneSided), "lora_A.default.weight' gets no finite gradient: use it, or freeze it"),
        (of(NoBits), "the bit gates of 'hidden' change nothing: take every tensor through self.gate_context"),
        (of(NoRanks), "the rank gates change nothing: take the hidden vector through self.gate_context.ranks"),
        (of(NeverDrawn), "a drawn 'lora_A' changes nothing: read it with self.gate_context.drawn"),
        (of(OthersDrawn), r"random_weights\(\) has parameters that do not learn"),
        (of(Turned), r"has shapes \(16, 4\) and \(16, 4\), expected \(r, n\) and \(m, r\)"),
        (of(Louder), r"alpha / R \* B A of low_rank\(\) in the weights changes the logits by"),
        (of(Elsewhere), "what it learned is not restored from its parameters"),
        (of(GatedLinear, model=VectorPenalty), r"penalty\(\) must be one finite number \(\)"),
        (of(GatedLinear, model=NoParameters), r"parameters_per_rank\(.*\) is 0, expected a whole number"),
        (few_ranks, r"allocate\(\) must return the open ranks of every projection, \(6,\)"),
    ],
)
def test_what_is_wrong_is_said(adapter, message):
    with pytest.raises(ValueError, match=message):
        check_adapter(adapter)


def test_one_that_fails_says_where():
    def failing(backbone, layout, head):
        raise KeyError("query")

    with pytest.raises(ValueError, match="adapter 'failing': attaching it to a BERT fails: KeyError: 'query'"):
        check_adapter(failing)


@pytest.mark.parametrize("scope", ["adapted", "encoder"])
def test_a_layer_of_ones_own_is_an_adapter(scope):
    assert isinstance(check_adapter(of(Scaled), scope=scope), GatedModel)
    assert isinstance(check_adapter(of(Computes), scope=scope), GatedModel)


@pytest.mark.parametrize("name", ADAPTERS.names())
def test_the_packages_own_pass(name):
    for scope in ("adapted",) if name == "adalora" else ("adapted", "encoder"):
        check_adapter(name, scope=scope)


def test_settings_are_those_of_the_function():
    check_adapter("xs", {"singular_values": "split"})
    with pytest.raises(ValueError, match="svd must be one of exact, randomized, got 'fast'"):
        check_adapter("xs", {"svd": "fast"})
