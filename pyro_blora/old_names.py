"""Moved modules under the names that README, docs and exported folders gave them: importing one warns."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OLD_NAMES = {
    "pyro_blora.arviz_data": "pyro_blora.posterior.arviz_compat",
    "pyro_blora.backbone": "pyro_blora.models.loading",
    "pyro_blora.diagnostics": "pyro_blora.posterior.gate_posterior",
    "pyro_blora.host": "pyro_blora.machine",
    "pyro_blora.processes": "pyro_blora.distributed",
    "pyro_blora.tasks.metric": "pyro_blora.tasks.glue_metric",
}


class _OldNames(MetaPathFinder, Loader):
    """Finds a module by its old name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in OLD_NAMES else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, OLD_NAMES[module.__name__]
        warnings.warn(f"{old} has moved: import {new}", DeprecationWarning, stacklevel=2)  # at the line that imports
        sys.modules[old] = importlib.import_module(new)  # the import system hands out what stands here


def install() -> None:
    sys.meta_path.insert(0, _OldNames())
