"""Vega's JavaScript, which draws the charts of a page: every page carries it and needs no network."""

import contextlib
import functools
import hashlib
import importlib.metadata

import vl_convert

from ..files import replace
from ..machine import cache_folder


@functools.cache
def vega_script() -> str:
    """The script, from the cache where it is there and whole: making it takes more than a second."""
    path = cache_folder() / "vega" / f"{importlib.metadata.version('vl-convert-python')}.js"
    with contextlib.suppress(OSError):
        head, _, script = path.read_bytes().partition(b"\n")
        if head == _head(script):
            return script.decode()
    made: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # a default that is not declared
    script = made.encode()
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, lambda partial: partial.write_bytes(_head(script) + b"\n" + script))
    return made


def _head(script: bytes) -> bytes:
    return f"// sha256 of what follows: {hashlib.sha256(script).hexdigest()}".encode()
