"""A packed model in: codes at their learned widths and ranges to a plain network of transformers, without Pyro or PEFT.

`packed.json` says what every tensor of `packed.safetensors` is (packed.schema.json); packing.py writes both.

    NAME.weight            of a layer that has no grid, as it is
    PROJECTION.base        its weight: codes, or at 32 bit the numbers; none where the base is not packed in
    PROJECTION.lora_A, .lora_B      the same of an adapter's open ranks
    PROJECTION.input.range, .base.range, ...    of each tensor below 32 bit, one number or one per row
    PROJECTION.smoothing            s, one a channel: the input is x / s, and base and lora_A were multiplied with s

Where the base is not packed in, its tensors are read from transformers' own folder or the hub, and compared by hash.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.conv1d import to_linear, transposed
from ..models.names import DEMO, DEMO_ON_THE_HUB, backbone_path
from ..models.quiet_loading import quiet
from ..quantizer.packing import Scale, restored
from .low_bit import EXACT, LowRank, OnGrid, Rounded, Site, put_in
from .manifest import Refused, content_sum, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA, VERSION = "packed", 2
UNSMOOTHED = 1  # version of what has no smoothing, which an older package reads
MANIFEST, WEIGHTS = "packed.json", "packed.safetensors"
_SHOWN = 200  # characters of another error in a message
_ALIGNED = 64  # bytes, of torch's own tensors
_RESTORE = "copy or export the folder again"


def is_packed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def load_packed(folder: Path, *, backbone: str | Path | None = None) -> PreTrainedModel:
    """The deployed model, in evaluation mode on the CPU: `model(**tokenizer(texts, return_tensors="pt")).logits`.

    backbone: where the base is, of a folder that only refers to it; None: its name on the hub.
    Errors: ValueError, one sentence, for a file that is damaged, missing or of another version, and for another base.
    """
    content = read_manifest(folder / MANIFEST, schema=SCHEMA, version=VERSION)
    try:
        return _loaded(folder, content, backbone)
    except Refused:
        raise
    except Exception as error:  # whatever transformers makes of a description that only looks right
        said = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
        raise Refused(f"{folder} is not a packed model that can be built ({said}): {_RESTORE}") from None


@torch.no_grad()
def _loaded(folder: Path, content: dict[str, Any], backbone: str | Path | None) -> PreTrainedModel:
    from safetensors.torch import load_file

    tensors, made_of = _aligned(load_file(folder / WEIGHTS)), content["architecture"]
    model_class = transformers_class(made_of["class"])
    config = model_class.config_class.from_dict(dict(made_of["config"]))  # type: ignore[union-attr]  # a class has one
    base = _referenced(model_class, config, content, backbone) if "base" in content else {}
    sites, weights = {}, {}
    for name, entry in content["projections"].items():
        own = _Tensors(tensors, name, entry["bits"])
        m, n = entry["shape"]
        given, smoothing = base.pop(f"{name}.weight", None), own.smoothing(n) if entry.get("smoothed") else None
        if given is not None and smoothing is not None:
            given = given * smoothing
        weight = own.weight("base", (m, n)) if given is None else own.on_grid("base", given)
        weights[f"{name}.weight"] = weight.x
        adapter = None
        if "rank" in entry:
            closed = entry["rank"] - entry["open"]  # rows and columns of zeros, for products of the trained shape
            down, up = own.weight("lora_A", (entry["open"], n)), own.weight("lora_B", (m, entry["open"]))
            if down.step is not None and down.step.dim():
                down = down._replace(step=F.pad(down.step, (0, 0, 0, closed), value=1.0))
            down, up = down._replace(x=F.pad(down.x, (0, 0, 0, closed))), up._replace(x=F.pad(up.x, (0, closed)))
            adapter = LowRank(down, own.rounded("hidden"), up, entry["scale"])
        sites[name] = Site(own.rounded("input"), weight, adapter, smoothing)
    for name, entry in content["embeddings"].items():
        weights[name] = _Tensors(tensors, name, {"codes": entry["bits"]}).weight("codes", entry["shape"]).x
    weights = transposed(model_class, config, weights)
    with quiet(), torch.random.fork_rng(devices=[]):
        model: Any
        report: dict[str, Any]
        model, report = model_class.from_pretrained(  # type: ignore[misc]  # with the report it gives a pair
            None, config=config, state_dict={**base, **tensors, **weights}, dtype=torch.float32,
            attn_implementation=made_of["attention"], output_loading_info=True,
        )  # fmt: skip
    for what, found in report.items():
        if found:
            raise Refused(f"{folder / WEIGHTS} has {what.replace('_', ' ')}: {sorted(map(str, found))[0]}: {_RESTORE}")
    to_linear(model, sites)
    put_in(model, sites)
    return model.requires_grad_(False).eval()


def _aligned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """At addresses as of any new tensor: elsewhere, as in a file, products in float32 may sum in another order."""
    return {name: x.clone() if x.data_ptr() % _ALIGNED else x for name, x in tensors.items()}


class _Tensors:
    """Those of one projection, each taken out of the file's once."""

    def __init__(self, tensors: dict[str, Tensor], name: str, bits: Mapping[str, int]):
        self.tensors, self.name, self.bits = tensors, name, bits

    def _take(self, part: str) -> Tensor:
        found = self.tensors.pop(f"{self.name}.{part}", None)
        if found is None:
            raise Refused(f"{WEIGHTS} has no tensor {self.name}.{part}: {_RESTORE}")
        return found

    def _positive(self, part: str) -> Tensor:
        found = self._take(part)
        if found.dtype != torch.float32 or not bool((found > 0).all() and found.isfinite().all()):
            raise Refused(f"{WEIGHTS}: {self.name}.{part} is no positive number: {_RESTORE}")
        return found

    def _range(self, part: str) -> Tensor:
        return self._positive(f"{part}.range")

    def smoothing(self, channels: int) -> Tensor:
        """(n,)"""
        found = self._positive("smoothing")
        if found.shape != (channels,):
            raise Refused(f"{WEIGHTS}: {self.name}.smoothing is {tuple(found.shape)}, not ({channels},): {_RESTORE}")
        return found

    def weight(self, part: str, shape: tuple[int, int]) -> OnGrid:
        """Stored codes as numbers, or the stored numbers, of this shape."""
        bits, stored = self.bits[part], self._take(part)
        found = OnGrid(stored)
        if bits != EXACT:
            value_range = self._range(part)
            found = OnGrid(restored(stored, value_range, bits, shape), Scale.of(value_range, bits).step, bits)
        if found.x.shape != tuple(shape) or found.x.dtype != torch.float32:
            is_of = f"{tuple(found.x.shape)} {found.x.dtype}"
            raise Refused(f"{WEIGHTS}: {self.name}.{part} is {is_of}, not {shape}: {_RESTORE}")
        return found

    def on_grid(self, part: str, x: Tensor) -> OnGrid:
        """Another weight on the grid of this part."""
        bits = self.bits[part]
        if bits == EXACT:
            return OnGrid(x)
        value_range = self._range(part)
        scale = Scale.of(value_range, bits)
        return OnGrid(scale.rounded(x), scale.step, bits)

    def rounded(self, part: str) -> Rounded:
        """What rounds an activation."""
        bits = self.bits[part]
        return Rounded() if bits == EXACT else Rounded(bits, self._range(part))


def transformers_class(name: str) -> type[PreTrainedModel]:
    """A model's class by its name.  Errors: Refused for what transformers does not have."""
    import transformers

    found: Any = getattr(transformers, name, None)
    own = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not own or found.__module__.partition(".")[0] != "transformers" or found.config_class is None:
        raise Refused(f"transformers {transformers.__version__} has no model {name!r}: install the version that has")
    model_class: type[PreTrainedModel] = found
    return model_class


def _referenced(
    model_class: type[PreTrainedModel], config: Any, content: dict[str, Any], backbone: str | Path | None
) -> dict[str, Tensor]:
    """The tensors that the folder has not, from transformers' files, by name.

    Errors: Refused where the base is not found, or is another one.
    """
    base = content["base"]
    name = str(backbone) if backbone is not None else base["name"]
    if backbone is None and name == DEMO_ON_THE_HUB:
        with contextlib.suppress(ValueError):
            name = backbone_path(DEMO)  # the same weights, from the package
    place = backbone_path(name)
    settings = {} if Path(place).is_dir() else {"revision": base["revision"]}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model: Any = model_class.from_pretrained(
                place, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, trust_remote_code=False,
                use_safetensors=True, **settings,
            )  # fmt: skip
    except Exception as error:  # whatever transformers makes of a folder, or of a hub out of reach
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(f"the base {name!r} could not be read ({first}): load(FOLDER, backbone=PATH)") from None
    to_linear(model, content["projections"])
    found = model.state_dict()
    tensors = {key: found[key] for key in base["tensors"] if key in found}
    if len(tensors) < len(base["tensors"]) or content_sum(tensors) != base["sha256"]:
        raise Refused(
            f"{name!r} is not the base that was exported, its weights differ: load(FOLDER, backbone=PATH) with "
            f"{base['name']} at revision {base['revision'] or 'that it had'}"
        )
    return tensors
