"""A prior that pins every gate where a file, or a finished run, has it: to train on at that allocation.

An allocation is a table: by projection, named as in posterior.nc (`3.value`), the bit width of each of its tensors and
the rank of its adapter. As JSON it is a file, which `RunConfig` reads once: the table takes the place of the file's
name in the configuration, so a run stays what it was when the file changes or is gone.

    {"0.query": {"input": 8, "base": 4, "lora_A": 8, "lora_B": 8, "hidden": 8, "rank": 5}, "0.key": {...}, ...}
"""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..gates import Gates
from ..layout import AdapterLayout
from ..registries import register_prior
from ..user_files import read_json
from ..user_values import suggest
from .static import pinned

Widths = dict[str, dict[str, int]]
RANK = "rank"  # beside the names of the tensors


@register_prior(
    "allocation", reads={"file": "pyro_blora.priors.allocation:of_file", "run": "pyro_blora.priors.allocation:of_run"}
)
def allocation(
    layout: AdapterLayout, *, file: str | None = None, run: str | None = None, widths: Widths | None = None
) -> Gates:
    """Every gate pinned where a file or a finished run has it; nothing is random.

    Settings, one of them: file, JSON of widths and ranks (priors/allocation.py has an example); run, the folder of a
    finished run, whose deployed allocation it is; widths, what was read, which takes their place in the configuration.
    """
    given = [x for x in (file, run, widths) if x is not None]
    if len(given) != 1:
        raise ValueError(
            f"prior 'allocation' needs one allocation, got {len(given)}: give either --prior.file WIDTHS.json or "
            "--prior.run RUN"
        )
    if widths is None:
        widths = (of_file(file) if file is not None else of_run(str(run)))["widths"]
    depths, ranks = depths_of(layout, widths)
    return Gates(pinned(depths, layout.z_shape[-1]), pinned(ranks - 1, layout.rank - 1))


def depths_of(layout: AdapterLayout, widths: Any) -> tuple[Tensor, Tensor]:
    """Open bit gates (L, T) and ranks (L,); what does not exist is open.

    Errors: ValueError naming the first projection, tensor, width or rank that does not fit the layout.
    """
    if not (isinstance(widths, dict) and all(isinstance(of, dict) for of in widths.values())):
        raise ValueError(
            'an allocation must be a table such as {"0.query": {"input": 8, "base": 4, "rank": 8}}, of every projection'
        )
    depths = torch.full(layout.z_shape[:2], len(layout.ladder) - 1)
    ranks = torch.full(layout.g_shape[:1], layout.rank)
    if strange := [name for name in widths if name not in layout.names]:
        raise ValueError(
            f"the allocation is of another model: it has {strange[0]!r}, which is no projection of this one in scope "
            f"{layout.scope!r}: {suggest(strange[0], layout.names)}"
        )
    for i, name in enumerate(layout.names):
        if name not in widths:
            raise ValueError(
                f"the allocation lacks projection {name!r}, it has {len(widths)} of {len(layout.names)}: it is of "
                f"another model, or of another --scope than {layout.scope!r}"
            )
        of = widths[name]
        exist = [tensor for t, tensor in enumerate(layout.tensors) if layout.z_mask[i, t]]
        needed = {tensor: layout.ladder for tensor in exist}
        if layout.projections[i].adapted:
            needed[RANK] = tuple(range(1, layout.rank + 1))
        for key, allowed in needed.items():
            if key not in of:
                raise ValueError(f"the allocation of {name!r} lacks {key!r}: it needs {', '.join(needed)}")
            if isinstance(of[key], bool) or of[key] not in allowed:
                among = f"1 to {layout.rank}" if key == RANK else f"one of {', '.join(map(str, allowed))}"
                raise ValueError(f"the allocation of {name!r}: {key} must be {among}, got {of[key]!r}")
        if unknown := [key for key in of if key not in (*layout.tensors, RANK)]:
            raise ValueError(f"the allocation of {name!r}: unknown {unknown[0]!r}: {suggest(unknown[0], needed)}")
        for t, tensor in enumerate(layout.tensors):
            if tensor in needed:
                depths[i, t] = layout.ladder.index(of[tensor])
        ranks[i] = of[RANK] if RANK in needed else layout.rank
    return depths, ranks


def table_of(layout: AdapterLayout, z: Tensor, g: Tensor) -> Widths:
    """The table of an allocation.  z (L, T, K), g (L, R - 1), 0 or 1"""
    found: Widths = {}
    bits, ranks = z.nan_to_num(1.0).sum(-1).long().tolist(), (1 + g.nan_to_num(1.0).sum(-1)).long().tolist()
    for i, (name, projection) in enumerate(zip(layout.names, layout.projections, strict=True)):
        exist = [t for t in range(len(layout.tensors)) if layout.z_mask[i, t]]
        found[name] = {layout.tensors[t]: layout.ladder[bits[i][t]] for t in exist}
        if projection.adapted:
            found[name][RANK] = ranks[i]
    return found


def of_file(path: str) -> dict[str, Widths]:
    """The setting `widths` from a JSON file.  Errors: ValueError for a file that is missing or no JSON."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"prior 'allocation': there is no file {path}: give a JSON file of widths and ranks")
    return {"widths": read_json(file)}


def of_run(folder: str) -> dict[str, Widths]:
    """The setting `widths` from the deployed allocation of a finished run; of several fits, the exported one's."""
    posterior = importlib.import_module("pyro_blora.posterior.arviz_compat")  # by name: posterior/ builds on priors/
    constant = posterior.group(posterior.read(Path(folder).expanduser()), "constant_data")
    constant = constant.isel(chain=0) if "chain" in constant.dims else constant  # runs before restarts had none
    if "z_deployed" not in constant:
        raise ValueError(f"prior 'allocation': run {folder} is too old to hold its deployed allocation: train it again")
    layout = AdapterLayout.from_dict(json.loads(constant.attrs["layout"]))
    gates = (torch.tensor(constant[f"{site}_deployed"].values) for site in "zg")
    return {"widths": table_of(layout, *gates)}
