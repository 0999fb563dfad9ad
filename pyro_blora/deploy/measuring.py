"""Times of a backbone's products on this machine, in onnxruntime: the table of costs for `--prior.cost latency`.

A product has one of two kernels, integers where both factors have 8 bit or fewer and float32 elsewhere, and an input
one of four ways onto its grid: codes that are clipped at one end (8 bit) or two, a grid in float32, and none. These are
measured for every shape, as an exported model has them (onnx_modules.py); widths with the same kernel have one figure.
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
from .low_bit import INT8, Rounded
from .onnx_file import OPSET, exporting_silently
from .onnx_modules import Product, Quantized, Wide
from .packing import made_by

_COPIES = 6  # of a product in one graph: weights do not stay in the cache between layers, either
_ROUNDS = 15  # in each of which everything is run once; medians are of these
_SEED = 0

Shape = tuple[int, int]  # m, n of a weight
_CLIPPED, _CODES, _GRID, _EXACT = "clipped codes", "codes", "grid", "exact"  # what rounds an input


def measure_costs(
    to: str | Path, *, backbone: str = "demo", rank: int = 8, bit_widths: str = "2,4,8,16,32", batch: int = 8,
    length: int = 128, threads: int = 1,
) -> Path:  # fmt: skip
    """Measure every product and every rounding of a backbone's linear maps, and of adapters of this rank, into a file.

    batch, length: texts of a forward, and their tokens. threads: of onnxruntime.
    Errors: ValueError for a file that exists, and for numbers below 1; those of `load_backbone`; ImportError without
    the extra `onnx`.
    """
    to, widths = Path(to).expanduser(), ladder_of(bit_widths)
    if to.exists():
        raise ValueError(f"{to} exists already: give another --to, or delete it")
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


def _way(width: int, widths: tuple[int, ...]) -> str:
    if width == widths[-1]:
        return _EXACT
    return _GRID if width > INT8 else _CODES if width == INT8 else _CLIPPED


def _measured(
    shapes: list[Shape], widths: tuple[int, ...], size: tuple[int, int], threads: int
) -> tuple[dict[int, list[float]], dict[Shape, list[list[float]]]]:
    """(seconds of a rounding by input and width, seconds of a product by shape and pair of widths)."""
    sizes = sorted({n for _, n in shapes})
    ways = [way for way in dict.fromkeys([_CODES, *(_way(width, widths) for width in widths)]) if way != _EXACT]
    runs: dict[Any, Callable[[], object]] = {}
    random = torch.Generator().manual_seed(_SEED)
    with phase("exporting products", len(sizes) * len(ways) + 2 * len(shapes)) as shown, torch.no_grad():
        for n in sizes:
            for way in ways:
                runs[n, way] = _session(_Roundings(way, random), torch.randn(*size, n, generator=random), threads)
                shown.advance()
        for m, n in shapes:
            for is_integer in (True, False):
                graph = _Products(m, n, is_integer, random)
                runs[m, n, is_integer] = _session(graph, torch.randn(*size, n, generator=random), threads)
                shown.advance()
    seconds = {name: median / _COPIES for name, median in _medians(runs).items()}
    rounding = {n: {_EXACT: 0.0} | {way: seconds[n, way] for way in ways} for n in sizes}
    products = {}
    for m, n in shapes:
        of = {False: seconds[m, n, False], True: max(0.0, seconds[m, n, True] - rounding[n][_CODES] / _COPIES)}
        products[m, n] = [[of[max(one, other) <= INT8] for other in widths] for one in widths]
    return {n: [rounding[n][_way(width, widths)] for width in widths] for n in sizes}, products


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
    """The same input onto several grids."""

    def __init__(self, way: str, random: torch.Generator):
        super().__init__()
        bits = {_CLIPPED: INT8 // 2, _CODES: INT8, _GRID: 2 * INT8}[way]
        of = Wide if way == _GRID else Quantized
        ranges = 2 + torch.rand(_COPIES, generator=random)  # all others: equal ones would be computed once
        self.each = nn.ModuleList(of(Rounded(x, bits)) for x in ranges)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.codes(x) if isinstance(each, Quantized) else each(x) for each in self.each)


class _Products(nn.Module):
    """One input, and several weights."""

    def __init__(self, m: int, n: int, is_integer: bool, random: torch.Generator):
        super().__init__()
        self.rounded = Quantized(Rounded(torch.tensor(3.0), INT8)) if is_integer else nn.Identity()
        weights = (torch.randint(-127, 128, (m, n), generator=random).float() / 127 for _ in range(_COPIES))
        self.each = nn.ModuleList(Product(w, torch.tensor(1 / 127), is_integer) for w in weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.rounded(x)
        return tuple(each(x) for each in self.each)


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
