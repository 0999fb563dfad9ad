"""A network's other operators, in float64 and rounded to float32 once: what a deployed model computes between products.

A grid turns the last bit of a value at a border into another code, which the layers above amplify. In float32, the last
bit of a sum or an exponential depends on the library, on the other rows of a batch and on padding; in float64 they
differ in the 53rd bit, which rounding to float32 removes in all but one of 10^8 values. Additions, products and the
like, element by element, are the same everywhere and stay in float32. GELU, whose error function onnxruntime has in
float32 alone, becomes operations of that kind.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .products import in_float64

# 1 - erf(z) = (1 + a1 z + ... + a6 z^6)^-16 within 3e-7 (Abramowitz and Stegun 7.1.28), for z = |x| / sqrt(2)
_OF_ERF = (0.0705230784, 0.0422820123, 0.0092705272, 0.0001520143, 0.0002765672, 0.0000430638)
_OF_GELU = [a / 2 ** (power / 2) for power, a in enumerate(_OF_ERF, 1)]
_IN_FLOAT64 = {
    "layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "tanh", "sigmoid", "silu", "exp", "rsqrt", "cos",
    "sin", "mean", "sum", "var", "matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "conv1d",
    "cosine_similarity", "normalize",
}  # fmt: skip


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Run float32 operators whose last bit depends on an order of sums, or on a library, in float64."""
    with _Reproducible(), contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Reproducible(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        own = _OWN.get(name)
        if own is None and name not in _IN_FLOAT64:
            return func(*args, **kwargs)
        if not _all_float32([*args, *kwargs.values()]):
            return func(*args, **kwargs)
        if own is not None:
            return own(*args, **kwargs)
        found = func(*map(_wide, args), **{key: _wide(x) for key, x in kwargs.items()})
        return found.float() if isinstance(found, Tensor) and found.dtype == torch.float64 else found


def _all_float32(values: Sequence[Any]) -> bool:
    """Whether float32 is the one floating-point type among these."""
    tensors = itertools.chain.from_iterable(x if isinstance(x, tuple | list) else (x,) for x in values)
    return {x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()} == {torch.float32}


def _wide(x: Any) -> Any:
    """In float64, also what says that a result is to be float32."""
    if x is torch.float32:
        return torch.float64
    if isinstance(x, tuple | list) and any(isinstance(each, Tensor) for each in x):
        return type(x)(map(_wide, x))
    return x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """max(x, 0) - |x| / 2 (1 - erf(|x| / sqrt(2))), within 1e-6; with `tanh`, that formula."""
    if approximate == "tanh":
        inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1.0 + torch.tanh(inner.double()).float())
    z = x.abs()
    powers = z * _OF_GELU[-1] + _OF_GELU[-2]
    for a in _OF_GELU[-3::-1]:
        powers = powers * z + a
    powers = powers * z + 1.0
    for _ in range(4):
        powers = powers * powers
    return torch.relu(x) - (0.5 * z) / powers


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention`.  query (B, heads, T, d), key and value (B, heads, keys, d)"""
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(shared, -3) for x in (key, value))
    factor = torch.tensor(query.shape[-1] ** -0.5 if scale is None else scale, dtype=torch.float32)
    scores = query.double() @ key.double().mT * factor.item()  # a float32 number, as an ONNX attribute is one
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~ones.tril(), -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    weights = scores.softmax(-1)
    if attn_mask is not None or is_causal:  # a token that may look at none, as padding, takes nothing
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    return (torch.dropout(weights, dropout_p, dropout_p > 0) @ value.double()).float()


_OWN: dict[str, Callable[..., Tensor]] = {
    "gelu": gelu, "scaled_dot_product_attention": _attention, "linear": in_float64,
}  # fmt: skip
