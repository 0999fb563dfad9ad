"""A packed model as an ONNX file, which onnxruntime runs on integer kernels without torch.

torch.onnx's exporter writes it from the plain network of packed.py, whose projections are onnx_modules.py's. It is
compared with that network before the call returns: logits are the same float32 numbers. In a fast or a small file they
are not, as onnxruntime sums in another order, between the products or in those of a narrow weight: its graph is
compared piece by piece (onnx_pieces.py), the file with that graph, and the card says how far logits then are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.run_config import RunConfig
from ..files import new_folder
from ..models.architectures import example_rows
from ..models.quiet_loading import quiet
from ..program import BayesianLoRA
from ..tasks.heads import SEQUENCE, Head
from . import cards
from .about import About
from .held_out import Answer, HeldOut, answer_of
from .manifest import write_manifest
from .model_card import write_card
from .onnx_attention import set_fast_attention, without_heads
from .onnx_modules import in_onnx_operators
from .onnx_pieces import Observed, gap_by_piece
from .onnx_tables import put_codes
from .packed import load_packed
from .packing import described_task, made_by, pack
from .peft import plain_backbone, save_tokenizer

SCHEMA, VERSION = "onnx", 2
_BEFORE_SMALL = 1  # version of what has no narrow products, which an older package reads
MANIFEST, MODEL = "onnx.json", "model.onnx"
OPSET = 21  # QuantizeLinear of int16, and per-axis scales; onnxruntime reads it since 1.20
_GAP = 1e-4  # mean difference of logits, of the largest: codes are the same, but where float64 rounds otherwise
_GAP_OF_PIECE = 1e-4  # where sums are in float32, of each piece at equal inputs: several codes of 16 bit
_GAP_FAST = 0.02  # there, of logits to those of the same graph whose pieces were compared
_OUTPUT, _TYPES = "logits", "token_type_ids"


@torch.no_grad()
def export_onnx(
    program: BayesianLoRA, folder: str | Path, *, rows: dict[str, Tensor] | None = None, tokenizer: Any = None,
    config: RunConfig | None = None, held_out: HeldOut | None = None, fast: bool = False,
    small: bool = False,
) -> Path:  # fmt: skip
    """Write the deployed model to `folder`, which must not exist, as ONNX. Arguments as in `packing.pack`.

    fast: float32 between the products of codes, in a third to two thirds of the time; some codes are others then.
    small: where an input has more than 8 bits and its weight up to 8, that weight's codes at 2, 4 or 8 bits, multiplied
    in float32: the packed model's disk, and less memory, in up to several times the time.

    Errors: as there; ImportError without the extra `onnx`; ValueError for a network that torch.onnx cannot export;
    RuntimeError if onnxruntime's logits are not the program's.
    """
    folder = Path(folder).expanduser()
    with new_folder(folder, "a model") as partial:
        with tempfile.TemporaryDirectory() as place:
            packed = load_packed(pack(program, Path(place) / "packed", rows=rows))
            model = load_packed(Path(place) / "packed")
        head = program.net.head
        batch = head.rows(rows) if rows else _example(packed, head, tokenizer, held_out)
        taken = inspect.signature(packed.forward).parameters
        inputs = sorted(name for name in batch if name in taken)  # as the exporter lists a table's entries
        if fast:
            set_fast_attention(model)
        products = in_onnx_operators(model, fast, small)
        put_codes(model, program.net.backbone)
        traced, checked = {name: batch[name] for name in inputs}, _checked(batch, held_out)
        expected = answer_of(packed, program)
        with tempfile.TemporaryDirectory() as place:
            observed = Path(place) / MODEL if fast or products.narrow else None
            write_graph(model, traced, program, partial / MODEL, fast=fast, observed=observed)
            right = expected if observed is None else _of_right_pieces(observed, inputs, packed, program, checked)
        answer = answer_by(session_of(partial / MODEL), inputs, head)
        apart = _gap(answer, right, checked).mean()
        if not apart <= (_GAP if observed is None else _GAP_FAST):
            raise RuntimeError(f"onnxruntime's logits differ by {apart:.2g} of the largest: please report this")
        gap = _gap(answer, expected, checked)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial, config)
        about = About.of(program, plain_backbone(program.net), config)
        measured = None if held_out is None else held_out.measure(answer)
        gaps = {"logit_gap_mean": gap.mean().item(), "logit_gap_largest": gap.max().item()}
        content: dict[str, Any] = {
            "schema": SCHEMA, "version": VERSION if products.narrow else _BEFORE_SMALL, "made_by": made_by(),
            "inputs": inputs, "output": _OUTPUT,
            "labels": about.labels, "task": described_task(program, config),
            "products": {name: n for name, n in products._asdict().items() if n or name != "narrow"}, "fast": fast,
            "measured": {**gaps, **({} if measured is None else measured._asdict())},
        }  # fmt: skip
        write_manifest(partial / MANIFEST, content)
        size = (partial / MODEL).stat().st_size
        write_card(partial, about, cards.onnx(about, products, gaps, size, fast, tokenizer=tokenizer), measured)
    return folder


def _example(model: Any, head: Head, tokenizer: Any, held_out: HeldOut | None) -> dict[str, Tensor]:
    """Inputs to trace with, of every name that a user's rows have: what is not among these, the file ignores."""
    if held_out is not None:
        return head.rows(held_out.batch()[0])
    rows = example_rows(model, 2, 16, varied=True)
    has_types = (getattr(model.config, "type_vocab_size", None) or 0) > 1
    if tokenizer is not None:
        has_types = _TYPES in tokenizer.model_input_names
    return head.example({**rows, **({_TYPES: torch.zeros_like(rows["input_ids"])} if has_types else {})})


def session_of(path: Path, **options: Any) -> Any:
    """onnxruntime on this file. options: of its SessionOptions."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    for name, value in options.items():
        setattr(chosen, name, value)
    return onnxruntime.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])


def answer_by(session: Any, inputs: list[str], head: Head = SEQUENCE) -> Answer:
    """An onnxruntime session, called on a batch as the program's network is."""
    logits = dataclasses.replace(head, read=lambda found: torch.from_numpy(np.asarray(found)))  # of its only output

    def run(batch: dict[str, Tensor]) -> Any:
        return session.run([_OUTPUT], {name: batch[name].numpy() for name in inputs})[0]

    return lambda batch: logits.logits(run, batch)


class _Logits(nn.Module):
    """The network from named inputs to what the likelihood takes."""

    def __init__(self, model: nn.Module, program: BayesianLoRA):
        super().__init__()
        self.model, self.read = model, program.net.head.read
        self.settings = {"use_cache": False} if program.net.has_cache else {}

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.read(self.model(**inputs, **self.settings))


def write_graph(
    model: Any, batch: dict[str, Tensor], program: BayesianLoRA, path: Path, *, fast: bool, observed: Path | None = None
) -> None:
    """The network as an ONNX file. fast: as onnxruntime takes the least time for it.

    observed: where the same graph is written with what its low-bit layers take and give as further outputs.

    Errors: ValueError where torch.onnx cannot export this network, with its first line.
    """
    import onnxscript.optimizer

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    try:
        with exporting_silently():
            logits = _Logits(model, program)
            network = Observed(logits) if observed else logits
            exported: Any = torch.onnx.export(
                network.eval(), (), kwargs={"inputs": batch}, dynamo=True, opset_version=OPSET,
                dynamic_shapes={"inputs": dict.fromkeys(batch, sizes)}, input_names=list(batch),
                output_names=[_OUTPUT], verbose=False,
            )  # fmt: skip
            for node in exported.model.graph.all_nodes():
                node.metadata_props.clear()  # traces of the exporter's calls, with paths of this machine
            if fast:
                _sum_before_norms(exported.model.graph)
                without_heads(exported.model.graph)
            if observed:
                exported.save(observed, external_data=False)
                del exported.model.graph.outputs[1:]
            onnxscript.optimizer.remove_unused_nodes(exported.model)
            exported.save(path, external_data=False)
    except Exception as error:  # whatever torch.export and the translation make of a network
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        first = (str(root).strip().splitlines() or [type(root).__name__])[0]
        raise ValueError(
            f"torch.onnx cannot export {type(model).__name__} ({first}): --format packed writes the same model"
        ) from error


def _sum_before_norms(graph: Any) -> None:
    """Write what a layer norm reads as Sum in place of Add, the same operation.

    onnxruntime would fuse the two into a kernel that takes four times as long as both (1.32, on a CPU).
    """
    for node in graph:
        before = node.inputs[0].producer() if node.op_type == "LayerNormalization" else None
        if before is not None and before.op_type == "Add":
            before.op_type = "Sum"


@contextlib.contextmanager
def exporting_silently() -> Iterator[None]:
    """Without the exporter's own progress, and warnings of the libraries about each other."""
    loud = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript")
    levels = [logger.level for logger in loud]
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            for logger in loud:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)


def _of_right_pieces(
    observed: Path, inputs: list[str], packed: nn.Module, program: BayesianLoRA, batches: list[dict[str, Tensor]]
) -> Answer:
    """What a file answers whose every piece is right.  Errors: RuntimeError where one is not."""
    session = session_of(observed)
    gap = gap_by_piece(session, inputs, packed, program, batches)
    if not gap <= _GAP_OF_PIECE:
        raise RuntimeError(f"a layer's values in onnxruntime differ by {gap:.2g} of the largest: please report this")
    return answer_by(session, inputs, program.net.head)


def _checked(batch: dict[str, Tensor], held_out: HeldOut | None) -> list[dict[str, Tensor]]:
    """Batches to compare on: of other sizes than the one that was traced."""
    few = {name: x[:1, : max(2, x.shape[1] // 2)] for name, x in batch.items()}
    return [batch, few, *([] if held_out is None else [held_out.batch(-1)[0]])]


def _gap(answer: Answer, expected: Answer, batches: list[dict[str, Tensor]]) -> Tensor:
    """The differences of all logits of these batches, of the largest logit or 1."""
    found = [(answer(batch).flatten(), expected(batch).flatten()) for batch in batches]
    one, other = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (one - other).abs() / other.abs().max().clamp(min=1.0)
