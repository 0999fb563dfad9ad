"""Attention of a fast ONNX file: onnxruntime's own operator in place of its products, softmax and transpositions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.onnx.ops import symbolic

from ..models.attention import is_ordinary
from ..models.quiet_loading import quiet

_NAME, _ELSE = "pyro_blora_onnx", "eager"  # of transformers'; the latter takes a fifth less time than sdpa
_OPERATOR = "MultiHeadAttention"


def set_fast_attention(model: Any) -> None:
    """Let torch.onnx's exporter write every attention as one operator, where a model's is an ordinary one."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    with quiet():
        model.set_attn_implementation(_NAME if is_ordinary(model) else _ELSE)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (B, heads, T, c), key and value (B, their heads, keys, c), mask of numbers (B or 1, heads or 1, T, keys)"""
    batch, heads, tokens, width = query.shape
    shared = heads // key.shape[1]  # queries of a key
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    joined = [x.transpose(1, 2).reshape(batch, x.shape[2], heads * width) for x in (query, key, value)]
    found = symbolic(
        f"com.microsoft::{_OPERATOR}", (*joined, None, None, attention_mask),
        {"num_heads": heads, "scale": float(width**-0.5 if scaling is None else scaling)},
        dtype=query.dtype, shape=joined[0].shape, version=1,
    )  # fmt: skip
    return found.view(batch, tokens, heads, width), None


def without_heads(graph: Any) -> None:
    """Let these operators read projections, and be read, without the shapes by heads between.

    The exporter has left two Reshape of what was two and, between them, two transpositions.
    """
    import onnx_ir

    for node in graph:
        if node.op_type != _OPERATOR:
            continue
        for place, value in enumerate(node.inputs[:3]):
            first = _reshaped(_reshaped(value))
            if first is not None and first.shape is not None and first.shape == value.shape:
                node.replace_input_with(place, first)
        (found,) = node.outputs
        last = _read_as(_read_as(found))
        if last is not None and last.shape is not None and last.shape == found.shape:
            onnx_ir.convenience.replace_all_uses_with(last, found, replace_graph_outputs=True)


def _reshaped(value: Any) -> Any:
    """What a Reshape has made this value of, or None."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else None


def _read_as(value: Any) -> Any:
    """What a Reshape, its one reader, makes of this value, or None."""
    readers = [] if value is None else [node for node, _ in value.uses()]
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type == "Reshape" else None
