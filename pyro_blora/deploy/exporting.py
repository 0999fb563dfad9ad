"""`pyro-blora export`: a run's folder in, one artefact out, measured on the run's held-out rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config.export_flags import require_together
from ..progress import phase
from .held_out import Measured, held_out_of
from .hub_names import folder_of
from .loading import load

_OF_ONNX = ("onnx", "onnxscript", "onnxruntime")  # the extra


def export_run(
    run: str | Path, folder: str | Path, *, format: str = "packed", base: str = "packed", merge: bool = False,
    embeddings: int = 32, fast: bool = False, small: bool = False, draws: int | None = None, seed: int | None = None,
    allow_code: Iterable[str] = (), backbone: str | None = None,
) -> tuple[Path, Measured | None]:  # fmt: skip
    """Write what a run has learned to a new folder; returns it, and what it scores on the run's held-out rows.

    run: its folder, or an exported adapter, of which nothing is measured. format: one of `export_flags.FORMATS`. base:
    `packed` or `reference`, merge, embeddings: see `packing.pack`. fast, small: see `onnx_file.export_onnx`. draws: of
    the posterior, an adapter each. seed: of the draws; None: the run's. allow_code, backbone: as in `load`.
    Errors: ValueError for options that do not belong to the format; those of `load` and of each format.
    """
    require_together(
        format, base=base, merge=merge, embeddings=embeddings, fast=fast, small=small, draws=draws, seed=seed
    )
    folder = Path(folder).expanduser()
    if folder.exists():
        raise ValueError(f"{folder} exists already: give another --to, an export is never overwritten")
    if format == "onnx" and (missing := [name for name in _OF_ONNX if importlib.util.find_spec(name) is None]):
        raise ValueError(f"--format onnx needs {', '.join(missing)}: pip install 'pyro-blora[onnx]'")
    with phase(f"loading {run}"):
        model = load(folder_of(run), allow_code=allow_code, backbone=backbone)
    held_out = held_out_of(model.source, model.run)
    shared: dict[str, Any] = {
        "tokenizer": model.source.tokenizer, "config": model.config, "held_out": held_out,
        "rows": None if held_out is None else held_out.batch()[0],
    }  # fmt: skip
    with phase(f"exporting {format}", still=True):
        if draws is not None:
            from .draw_tree import export_draws

            export_draws(model, folder, draws, seed=model.config.seed if seed is None else seed, **shared)
        elif format == "peft":
            from .peft import export

            export(model, folder, **shared)
        elif format == "merged":
            from .merged import merge as merged

            merged(model, folder, **shared)
        elif format == "onnx":
            from .onnx_file import export_onnx

            export_onnx(model, folder, fast=fast, small=small, **shared)
        else:
            from .packing import pack

            pack(model, folder, reference=base == "reference", merged=merge, embeddings=embeddings, **shared)
    return folder, None if held_out is None else held_out.measured
