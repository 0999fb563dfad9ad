"""What was trained or exported, by its folder: a run or an adapter with its posterior, or a packed model without it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .packed import is_packed, load_packed


def load(
    run: str | Path, *, n_train: int | None = None, allow_code: Iterable[str] = (), backbone: str | Path | None = None
) -> Any:
    """The trained program of a run folder or an exported one, a `Model`; of a packed one the deployed network.

    A program draws, prices, predicts on texts (`model.predict(["a good film"])`) and goes to ArviZ; `loading.load` says
    what it needs and refuses. A packed folder gives a plain network of transformers, in evaluation mode, whose logits
    are those of the deployed allocation: no code is run, and neither Pyro nor PEFT is imported.
    n_train: N, in place of the number of training examples. backbone: where it is now, if not where it was. allow_code:
    functions in files (`mine.py:late`) that the configuration names and that may run. A packed folder takes
    `backbone` alone, where it refers to its base.
    Errors: ValueError for a folder that is neither, whose files are damaged, and for another backbone.
    """
    folder = Path(run)
    if is_packed(folder):
        if n_train is not None or tuple(allow_code):
            raise ValueError(f"{folder} is a packed model, which has no posterior: drop n_train and allow_code")
        return load_packed(folder, backbone=backbone)
    from . import loading  # now, as Pyro takes a second to import

    return loading.load(folder, n_train=n_train, allow_code=allow_code, backbone=backbone)
