"""The input embeddings of a run with `--embedding_bits`, as ONNX's operators: codes of a byte or two, a step a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.embeddings import rounded_to
from ..quantizer.packing import Scale
from ..quantizer.products import BYTE


class CodedTable(nn.Module):
    """A table whose rows are read as code times step, which is the rounded number to the bit.  ids (...) -> (..., n)"""

    codes: Tensor
    step: Tensor

    def __init__(self, table: Tensor, bits: int, value_range: Tensor):
        super().__init__()
        scale = Scale.of(value_range, bits)
        codes = scale.codes(table).to(torch.int8 if bits <= BYTE else torch.int16)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("step", scale.step, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.codes[ids].to(self.step.dtype) * self.step[ids]


def put_codes(model: nn.Module, trained: nn.Module) -> None:
    """Give a packed model the codes of the table that it was trained with, unless its head multiplies by that, too."""
    whole: Any = model
    own: Any = trained
    table, (bits, value_range) = whole.get_input_embeddings(), rounded_to(own.get_input_embeddings())
    by_head = getattr(whole.get_output_embeddings(), "weight", None)  # none in ONNX's operators
    if value_range is not None and by_head is not table.weight:
        whole.set_input_embeddings(CodedTable(table.weight.detach(), bits, value_range.cpu()))
