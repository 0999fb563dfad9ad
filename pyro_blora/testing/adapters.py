"""What an adapter must keep, tried on a small BERT with random weights."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..adapters.attaching import attach
from ..adapters.gated_model import GatedModel, open_gates, use_gates
from ..adapters.ranges import calibrate
from ..checkpoint import trainable
from ..registries import ADAPTERS
from ..tasks.heads import SEQUENCE
from .promises import Refuse, refusing, tried

_RANK, _LENGTH, _STD = 4, 10, 0.2  # of the adapter; of the inputs; of what is learned
_SAME = 1e-4  # of the largest logit


def check_adapter(adapter: str | Callable, settings: dict | None = None, *, scope: str = "adapted") -> GatedModel:
    """Refuse an adapter that breaks a promise, with a sentence that names it; returns the net of a small BERT.

    adapter: a registered name, `file.py:function`, or the function itself. scope: as of `attach`.
    Errors: ValueError naming the adapter, what is wrong and the remedy.
    """
    refuse = refusing(ADAPTERS, adapter)
    with torch.random.fork_rng(devices=[]):
        backbone, inputs = _backbone(), _inputs()

        def attached() -> GatedModel:
            torch.manual_seed(1)
            net = attach(copy.deepcopy(backbone), rank=_RANK, sequence_length=_LENGTH, adapter=adapter,
                         adapter_settings=settings, scope=scope)  # fmt: skip
            return net.eval()

        net = tried(attached, "attaching it to a BERT", refuse)
        _check_start(net, backbone, inputs, refuse)
        _check_learning(net, inputs, refuse)
        if net.layers():
            _check_gates(net, inputs, refuse)
            _check_drawn(net, inputs, refuse)
        _check_low_rank(net, backbone, inputs, refuse)
        _check_state(net, attached(), inputs, refuse)
        _check_numbers(net, refuse)
    return net


def _backbone() -> nn.Module:
    import transformers  # now, as it takes seconds

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=2 * _LENGTH, initializer_range=_STD, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return getattr(transformers, SEQUENCE.auto_class).from_config(config).eval()


def _inputs() -> dict[str, Tensor]:
    mask = torch.ones(4, _LENGTH, dtype=torch.long)
    mask[-1, _LENGTH // 2 :] = 0
    return {"input_ids": torch.randint(2, 50, (4, _LENGTH)), "attention_mask": mask}


def _logits(net: GatedModel, inputs: dict, z: Tensor | None = None, g: Tensor | None = None, **drawn) -> Tensor:
    """At given gates; None: open."""
    opened = open_gates(net.layout)
    with use_gates(net, opened[0] if z is None else z, opened[1] if g is None else g, **drawn):
        return net(**inputs).logits


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@torch.no_grad()
def _check_start(net: GatedModel, backbone: nn.Module, inputs: dict, refuse: Refuse) -> None:
    gap = _gap(tried(lambda: _logits(net, inputs), "a forward", refuse), backbone(**inputs).logits)
    if not gap < _SAME:
        refuse(
            f"before training, with every gate open, it changes the logits by {gap:.1%}: start it where its update is "
            "0 (lora_B of zeros), so that step 0 is the pretrained model"
        )
    for kind, parameters in (("adapter", net.adapter_parameters()), ("head", net.head_parameters())):
        if not parameters:
            refuse(f"no parameter of the {kind} learns: leave requires_grad on for what is to be trained")


def _check_learning(net: GatedModel, inputs: dict, refuse: Refuse) -> None:
    """Everything that learns gets a gradient, and moves the logits."""
    before = _logits(net, inputs).detach()
    for parameter in net.adapter_parameters():
        nn.init.normal_(parameter, std=_STD)
    logits = _logits(net, inputs)
    if _gap(logits.detach(), before) < _SAME:
        refuse("its parameters do not change the logits: read them in the layer's low_rank() or forward()")
    logits.square().sum().backward()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for parameter in (*net.adapter_parameters(), *net.head_parameters()):
        if parameter.grad is None or not bool(parameter.grad.isfinite().all()):
            refuse(f"{names[id(parameter)]!r} gets no finite gradient: use it, or freeze it with requires_grad_(False)")


@torch.no_grad()
def _check_gates(net: GatedModel, inputs: dict, refuse: Refuse) -> None:
    """Bits of every tensor, and ranks, matter."""
    calibrate(net, [inputs])
    opened = _logits(net, inputs)
    for index, tensor in enumerate(net.layout.tensors):
        z, g = open_gates(net.layout)
        z[:, index] = 0.0
        if bool(net.layout.z_mask[:, index].any()) and torch.equal(_logits(net, inputs, z, g), opened):
            refuse(
                f"the bit gates of {tensor!r} change nothing: take every tensor through self.gate_context (activation, "
                "products, product), as GatedLinear does"
            )
    if net.layout.adapted and torch.equal(_logits(net, inputs, g=torch.zeros(net.layout.g_shape)), opened):
        refuse("the rank gates change nothing: take the hidden vector through self.gate_context.ranks")


@torch.no_grad()
def _check_drawn(net: GatedModel, inputs: dict, refuse: Refuse) -> None:
    """Weights that are drawn take the place of the parameters."""
    parameters, opened = net.random_weights(), _logits(net, inputs)
    learning = set(map(id, net.adapter_parameters()))
    if not all(id(p) in learning for p in parameters.values()):
        refuse("random_weights() has parameters that do not learn: name the adapter's own")
    same = {key: p.detach().clone() for key, p in parameters.items()}
    if _gap(_logits(net, inputs, weights=same), opened) > _SAME:
        refuse("drawn weights that equal the parameters give other logits: use drawn ones as the parameters are used")
    for key, p in parameters.items():
        if torch.equal(_logits(net, inputs, weights={key: p + 1.0}), opened):
            refuse(
                f"a drawn {key[1]!r} changes nothing: read it with self.gate_context.drawn(self.index, {key[1]!r}, ...)"
            )


@torch.no_grad()
def _check_low_rank(net: GatedModel, backbone: nn.Module, inputs: dict, refuse: Refuse) -> None:
    """What is exported as plain LoRA is what was computed: the update is merged into a copy of the backbone."""
    layout, merged = net.layout, copy.deepcopy(backbone)
    if not layout.adapted:
        return
    for projection in layout.adapted:
        down, up = tried(functools.partial(net.low_rank, projection.name), "low_rank(projection)", refuse)
        shapes = (projection.out_features, len(down)), (len(down), projection.in_features)
        if (tuple(up.shape), tuple(down.shape)) != shapes or len(down) > layout.rank:
            refuse(
                f"low_rank({projection.name!r}) has shapes {tuple(down.shape)} and {tuple(up.shape)}, expected (r, n) "
                f"and (m, r) with m, n = {projection.out_features}, {projection.in_features} and r <= {layout.rank}"
            )
        merged.get_parameter(f"{projection.name}.weight").add_(layout.alpha / layout.rank * up @ down)
    head = dict(net.backbone.named_parameters())
    for name, parameter in merged.get_submodule(
        "classifier"
    ).named_parameters():  # PEFT's copy of the head is the one that learns
        parameter.copy_(head[f"classifier.modules_to_save.default.{name}"])
    gap = _gap(_logits(net, inputs), merged(**inputs).logits)
    if not gap < _SAME:
        refuse(
            f"alpha / R * B A of low_rank() in the weights changes the logits by {gap:.1%}: return what the layer "
            "computes with, or what is exported is another network"
        )


@torch.no_grad()
def _check_state(net: GatedModel, other: GatedModel, inputs: dict, refuse: Refuse) -> None:
    found, taken = trainable(_Held(net)), trainable(_Held(other))
    if found.keys() != taken.keys():
        refuse(f"attached twice, it has other tensors: {sorted(found.keys() ^ taken.keys())[:4]}")
    for name, tensor in taken.items():
        tensor.copy_(found[name])
    if _gap(_logits(other, inputs), _logits(net, inputs)) > _SAME:
        refuse("what it learned is not restored from its parameters: hold all that it computes with in its layers")


class _Held(nn.Module):
    """A net as a program has it, for names of its parts."""

    def __init__(self, net: GatedModel):
        super().__init__()
        self.net = net


def _check_numbers(net: GatedModel, refuse: Refuse) -> None:
    penalty = torch.as_tensor(tried(net.penalty, "penalty()", refuse))
    if penalty.shape != () or not bool(penalty.isfinite()):
        refuse("penalty() must be one finite number (), nats per example")
    for projection in net.layout.adapted:
        count = tried(functools.partial(net.parameters_per_rank, projection), "parameters_per_rank(projection)", refuse)
        if not isinstance(count, int) or count < 1:
            refuse(f"parameters_per_rank({projection.name!r}) is {count!r}, expected a whole number of at least 1")
    if net.allocates:
        ranks = tried(lambda: net.allocate(1, 10, max(1, _RANK // 2)), "allocate(1, 10, target_rank)", refuse)
        L = len(net.layout.projections)
        if tuple(ranks.shape) != (L,) or not bool(((ranks >= 0) & (ranks <= net.layout.rank)).all()):
            refuse(f"allocate() must return the open ranks of every projection, ({L},), from 0 to {net.layout.rank}")
