"""`pyro-blora serve`: a folder in, a server of uvicorn until a signal, which ends it after the last answer."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config.serve_flags import Serving
from ..deploy.hub_names import is_hub_name
from ..deploy.opening import load_to_predict
from ..progress import phase
from ..signals import ENDING
from .desk import Desk

if TYPE_CHECKING:
    import uvicorn

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")  # the extra
_CONNECTIONS = 1024  # at a time; more get 503


def serve(
    run: str | Path, serving: Serving | None = None, *, allow_code: Iterable[str] = (), backbone: str | None = None,
    revision: str | None = None, **options: Any,
) -> None:  # fmt: skip
    """Answer texts over HTTP until SIGTERM, SIGINT or SIGHUP. The address goes to stdout when it is ready.

    run: any folder that predicts on texts, or a name on the hub. allow_code, backbone, revision: as in `load`. options:
    as in `Model.predict`.
    Errors: ValueError without the extra `serve`, for an address that is taken, and those of `load` and `predict`.
    """
    serving = serving or Serving()
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'pyro-blora[serve]'")
    with contextlib.closing(bound(serving)) as address:
        with phase(f"loading {run}"):
            model = load_to_predict(run, allow_code=allow_code, backbone=backbone, revision=revision)
            if torch.cuda.is_available():
                model.to("cuda")
            desk = Desk(model, str(run) if is_hub_name(run) else Path(run).expanduser().resolve().name, **options)
        for remark in desk.answers.remarks:
            _say(remark)
        if not serving.is_loopback:
            _say(f"{serving.host} can be reached from other machines, without a password and without encryption: put a "
                 "proxy that has both before it, or leave --host out")  # fmt: skip
        server = server_of(desk, serving)
        host = f"[{serving.host}]" if ":" in serving.host else serving.host
        address.listen()  # who calls from now on is answered
        print(f"http://{host}:{address.getsockname()[1]}", flush=True)
        server.run(sockets=[address])


def server_of(desk: Desk, serving: Serving) -> uvicorn.Server:
    """What serves: `run(sockets=[...])` returns when `should_exit` is set, or after a signal in the main thread."""
    import uvicorn

    from .app import app_of

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Uvicorn's own raises the signal again when all is answered, as if the work had been cut off."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {each: signal.signal(each, self.handle_exit) for each in ENDING}
            try:
                yield
            finally:
                for each, handler in before.items():
                    signal.signal(each, handler)

    return Server(
        uvicorn.Config(
            app_of(desk, serving), log_config=None, access_log=False, server_header=False, proxy_headers=False,
            ws="none", lifespan="on", limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=math.ceil(serving.timeout),
        )
    )  # fmt: skip


def bound(serving: Serving) -> socket.socket:
    """Before the model is loaded, so that a port that is taken is said at once.

    Its protocol is named: asyncio sets TCP_NODELAY on connections of such a socket only, and without it an answer's
    body waits for the acknowledgement of its head, 40 ms.
    """
    family = socket.AF_INET6 if ":" in serving.host else socket.AF_INET
    address = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address.bind((serving.host, serving.port))
    except OSError as error:
        address.close()
        raise ValueError(
            f"{serving.host}, port {serving.port}: {error.strerror or error}: give another --port, 0 for a free one, "
            "or another --host"
        ) from None
    return address


def _say(sentence: str) -> None:
    print(f"pyro-blora: {sentence}", file=sys.stderr)
