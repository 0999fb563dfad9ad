"""Times of a backbone's products on this machine, in onnxruntime: the table of costs for `--prior.cost latency`.

Products are those of an exported model for speed (onnx_products.py, fast): integers where that is faster, one product
for each byte of an input, and float32 elsewhere. Widths with the same kernels share a figure. Each is measured alone,
also lora_A, which an export multiplies together with the base's weight: its price is a little too high.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bit_widths import ladder_of
from ..cost_table import SCHEMA, VERSION, Times
from ..files import replace_text
from ..layout import AdapterLayout
from ..machine import processor
from ..models.loading import load_backbone
from ..progress import phase
from ..quantizer.products import BYTE
from .low_bit import EXACT, OnGrid, Rounded, Weight
from .onnx_file import OPSET, exporting_silently
from .onnx_modules import OneInput
from .onnx_products import Codes, is_of_codes
from .packing import made_by

_COPIES = 6  # of a product in one graph: weights do not stay in the cache between layers, either
_ROUNDS = 15  # in each of which everything is run once; medians are of these
_SEED = 0
_RANGE = 3.0

Shape = tuple[int, int]  # m, n of a weight


def measure_costs(
    to: str | Path, *, backbone: str = "demo", rank: int = 8, bit_widths: str = "2,4,8,16,32", batch: int = 8,
    length: int = 128, threads: int = 1,
) -> Path:  # fmt: skip
    """Measure every product and every rounding of a backbone's linear maps, and of adapters of this rank, into a file.

    batch, length: texts of a forward, and their tokens. threads: of onnxruntime.
    Errors: ValueError for a file that exists, for one in a folder that does not, and for numbers below 1; those of
    `load_backbone`; ImportError without the extra `onnx`.
    """
    to, widths = Path(to).expanduser(), ladder_of(bit_widths)
    if to.exists():
        raise ValueError(f"{to} exists already: give another --to, or delete it")
    if not to.parent.is_dir():
        raise ValueError(f"there is no folder {to.parent} for {to.name}: make it, or give another --to")
    for name, value in {"rank": rank, "batch": batch, "length": length, "threads": threads}.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    import onnxruntime

    with phase(f"loading {backbone}"):
        layout = AdapterLayout.of(
            load_backbone(backbone, 2), rank=rank, scope="encoder", ladder=widths, sequence_length=length
        )
    rounding, products = _measured(_shapes(layout), widths, (batch, length), threads)
    content = {
        "schema": SCHEMA, "version": VERSION, "made_by": made_by(), "backbone": backbone, "rank": rank,
        "machine": {
            "processor": processor(), "threads": threads, "onnxruntime": onnxruntime.__version__,
            "torch": importlib.metadata.version("torch"), "date": datetime.date.today().isoformat(),
        },
        "batch": batch, "length": length, "rows": batch * length, "widths": list(widths),
        "rounding": [{"in": n, "seconds": seconds} for n, seconds in rounding.items()],
        "products": [{"out": m, "in": n, "seconds": seconds} for (m, n), seconds in products.items()],
    }  # fmt: skip
    Times(content)
    replace_text(to, _written(content) + "\n")
    return to


def _shapes(layout: AdapterLayout) -> list[Shape]:
    """Of all products: every linear map, and an adapter on any of them."""
    found: dict[Shape, None] = {}
    for p in layout.projections:
        found |= dict.fromkeys([(p.out_features, p.in_features), (layout.rank, p.in_features),
                                (p.out_features, layout.rank)])  # fmt: skip
    return list(found)


def _kind(one: int, other: int, n: int) -> tuple[int, int]:
    """Widths of input and weight that have the same kernels: bytes of codes, or float32 of a rounded input or not.

    n: columns of the weight.
    """
    if one == EXACT:
        return EXACT, EXACT
    if not is_of_codes(one, other, n, fast=True):
        return BYTE, EXACT
    return BYTE if one <= BYTE else 2 * BYTE, BYTE


def _rounded_as(width: int) -> int:
    """The width of an input that is rounded alike: codes of a byte are clipped at both ends, or at one."""
    return BYTE // 2 if width < BYTE else BYTE if width == BYTE else 2 * BYTE


def _measured(
    shapes: list[Shape], widths: tuple[int, ...], size: tuple[int, int], threads: int
) -> tuple[dict[int, list[float]], dict[Shape, list[list[float]]]]:
    """(seconds of a rounding by input and width, seconds of a product by shape and pair of widths).

    The sum of both is what a product takes with its input; where the weight has no codes, an input is rounded in
    another way, and the figure of the product has the difference.
    """
    sizes, grids = sorted({n for _, n in shapes}), dict.fromkeys(map(_rounded_as, widths[:-1]))
    kinds = {
        shape: dict.fromkeys(_kind(one, other, shape[1]) for one in widths for other in widths) for shape in shapes
    }
    runs: dict[Any, Callable[[], object]] = {}
    random = torch.Generator().manual_seed(_SEED)
    with phase("exporting products", len(sizes) * len(grids) + sum(map(len, kinds.values()))) as shown, torch.no_grad():
        for n in sizes:
            for bits in grids:
                runs[n, bits] = _session(_Roundings(bits), torch.randn(*size, n, generator=random), threads)
                shown.advance()
        for m, n in shapes:
            for kind in kinds[m, n]:
                graph = _Products(m, n, *kind, random)
                runs[m, n, kind] = _session(graph, torch.randn(*size, n, generator=random), threads)
                shown.advance()
    seconds = {name: median / _COPIES for name, median in _medians(runs).items()}
    rounding = {n: [0.0 if width == EXACT else seconds[n, _rounded_as(width)] for width in widths] for n in sizes}
    products = {}
    for m, n in shapes:
        products[m, n] = [
            [max(0.0, seconds[m, n, _kind(one, other, n)] - _of_kind(seconds, n, one)) for other in widths]
            for one in widths
        ]
    return rounding, products


def _of_kind(seconds: dict[Any, float], n: int, width: int) -> float:
    """Of the rounding that is in a product's measurement: that of 8 bit for all of one byte."""
    return 0.0 if width == EXACT else seconds[n, BYTE if (n, BYTE) in seconds and width <= BYTE else _rounded_as(width)]


def _medians(runs: dict[Any, Callable[[], object]]) -> dict[Any, float]:
    """Seconds of each, in rounds that run every one once, each second round backwards."""
    taken: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    with phase("measuring", _ROUNDS, unit="rounds") as shown:
        for i in shown.over(range(_ROUNDS)):
            for name in list(runs)[:: -1 if i % 2 else 1]:
                runs[name]()  # its weights and input come back into the cache as far as they fit
                began = time.perf_counter()
                runs[name]()
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in taken.items()}


class _Roundings(nn.Module):
    """The same input onto several grids: its codes."""

    def __init__(self, bits: int):
        super().__init__()
        ranges = torch.linspace(_RANGE - 1, _RANGE, _COPIES)  # all others: equal ones would be computed once
        self.each = nn.ModuleList(Codes(Rounded(bits, x), fast=True) for x in ranges)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(byte.codes for each in self.each for byte in each(x))


class _Products(nn.Module):
    """Several products, each of one input with its own grid and weight, as an exported model has them."""

    def __init__(self, m: int, n: int, one: int, other: int, random: torch.Generator):
        super().__init__()
        largest = 2 ** (min(other, 2 * BYTE) - 1) - 1
        step = None if other == EXACT else torch.tensor(1 / largest)
        ranges = torch.linspace(_RANGE - 1, _RANGE, _COPIES)

        def weight() -> Weight:
            codes = torch.randint(-largest, largest + 1, (m, n), generator=random).float()
            return Weight(OnGrid(codes / largest, step, other))

        inputs = (Rounded() if one == EXACT else Rounded(one, x) for x in ranges)
        self.each = nn.ModuleList(OneInput(rounded, [weight()], torch.float32) for rounded in inputs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(each(x)[0] for each in self.each)


def _session(graph: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
    """A run of the exported graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        with exporting_silently():
            exported: Any = torch.onnx.export(graph, (x,), dynamo=True, opset_version=OPSET, verbose=False)
            exported.save(path, external_data=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _written(content: dict[str, Any]) -> str:
    """JSON with a line for each shape."""
    return "{" + ",\n ".join(_field(name, value) for name, value in content.items()) + "}"


def _field(name: str, value: Any) -> str:
    import json

    def rounded(x: Any) -> Any:
        if isinstance(x, float):
            return float(f"{x:.4g}")
        if isinstance(x, list):
            return [rounded(each) for each in x]
        return {key: rounded(each) for key, each in x.items()} if isinstance(x, dict) else x

    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(rounded(each)) for each in value) + "]"
    return f"{json.dumps(name)}: {json.dumps(rounded(value))}"
