"""Bayesian-LoRA as a probabilistic program: low-rank adapters whose bit widths and ranks are random."""

import importlib

_PUBLIC = {
    "attach": "adapters",
    "fit": "training",
    "draw": "posterior",
    "predict": "posterior",
    "expected_bops": "bops",
    "to_arviz": "inference_data",
    "export": "exporting",
    "load": "exporting",
    "register_prior": "priors",
    "register_guide": "guides",
    "RunConfig": "config",
}
__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    """Names are imported when they are asked for, so that `pyro-blora --help` does not wait for torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
