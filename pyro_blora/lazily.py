"""Public names of a package that are imported on first use.

So that `pyro-blora --help` answers without torch, and a result is shown without what drew it. The package's text has
the names once, where type checkers read them, too:

    if TYPE_CHECKING:
        from .loop import fit as fit
    else:
        __getattr__, __dir__, __all__ = lazily(__name__, __file__)
"""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazily(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from what it imports in its block for type checkers."""
    modules = dict(_for_type_checkers(Path(file).read_text(encoding="utf-8")))
    names = sorted(modules)

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names)}")
        return getattr(importlib.import_module(f".{modules[name]}", package), name)

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return __getattr__, __dir__, names


def _for_type_checkers(text: str) -> list[tuple[str, str]]:
    """(name, the submodule that has it) of every import under `if TYPE_CHECKING`."""
    blocks = (node.body for node in ast.parse(text).body if isinstance(node, ast.If))
    imports = (node for block in blocks for node in block if isinstance(node, ast.ImportFrom))
    return [(name.name, node.module or "") for node in imports for name in node.names]
