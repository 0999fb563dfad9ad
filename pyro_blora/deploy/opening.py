"""What was trained or exported, by its folder or its name on the hub: a program with its posterior, or a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hub_names import folder_of
from .packed import is_packed, load_packed

if TYPE_CHECKING:
    from .deployed_model import DeployedModel
    from .loaded_model import Model


def load(
    run: str | Path, *, n_train: int | None = None, allow_code: Iterable[str] = (), backbone: str | Path | None = None,
    revision: str | None = None,
) -> Any:  # fmt: skip
    """The trained program of a run folder or an exported one, a `Model`; of a packed one the deployed network.

    A program draws, prices, predicts on texts (`model.predict(["a good film"])`) and goes to ArviZ; `loading.load` says
    what it needs and refuses. A packed folder gives a plain network of transformers, in evaluation mode, whose logits
    are those of the deployed allocation: no code is run, and neither Pyro nor PEFT is imported.
    run: a folder, or the name of one on the hub, `user/name`, that `push` wrote; revision: its branch, tag or commit.
    n_train: N, in place of the number of training examples. backbone: where it is now, if not where it was. allow_code:
    functions in files (`mine.py:late`) that the configuration names and that may run. A packed folder takes
    `backbone` alone, where it refers to its base.
    Errors: ValueError for a folder that is neither, whose files are damaged, and for another backbone; for a name that
    the hub does not have, or that cannot be asked for offline.
    """
    folder = folder_of(run, revision)
    if is_packed(folder):
        if n_train is not None or tuple(allow_code):
            raise ValueError(f"{folder} is a packed model, which has no posterior: drop n_train and allow_code")
        return load_packed(folder, backbone=backbone)
    from . import loading  # now, as Pyro takes a second to import

    return loading.load(folder, n_train=n_train, allow_code=allow_code, backbone=backbone)


def load_to_predict(
    run: str | Path, *, allow_code: Iterable[str] = (), backbone: str | Path | None = None, revision: str | None = None
) -> Model | DeployedModel:
    """What predicts on texts, of any folder that does: a run's, an adapter's, a packed or an ONNX model's.

    Arguments and errors as in `load`.
    """
    from .deployed_model import DeployedModel, is_deployed
    from .loading import load as load_program

    folder = folder_of(run, revision)
    if is_deployed(folder):
        if tuple(allow_code):
            raise ValueError(f"{folder} names no code that could run: drop allow_code")
        return DeployedModel(folder, backbone=backbone)
    return load_program(folder, allow_code=allow_code, backbone=backbone)
