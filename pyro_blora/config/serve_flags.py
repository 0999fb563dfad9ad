"""The command `pyro-blora serve`, its flags, and the limits that they set."""

import argparse
import ipaddress
from dataclasses import dataclass, field, fields
from typing import Any

from .command_parser import add_command


def _limit(default: Any, metavar: str, text: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": text})


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Where a model is served, how requests share a forward pass, and what one client may ask.

    Errors: ValueError for a value that is none, naming its flag.
    """

    host: str = _limit("127.0.0.1", "ADDRESS", "to listen on; any but a loopback one is open to the network")
    port: int = _limit(8000, "PORT", "to listen on, 0 for any free one")
    allowed_hosts: tuple[str, ...] = _limit((), "NAMES", "by which clients may call it, separated by commas: those of "
        "the loopback where it listens there, else any")  # fmt: skip
    wait_ms: float = _limit(2.0, "MS", "milliseconds in which a text waits for others to share its forward pass")
    max_queue: int = _limit(512, "TEXTS", "that wait at most; more are refused with 503")
    max_texts: int = _limit(64, "TEXTS", "in a request")
    max_characters: int = _limit(20_000, "CHARACTERS", "in a text")
    max_bytes: int = _limit(1_000_000, "BYTES", "in the body of a request")
    rate: float = _limit(6000.0, "REQUESTS", "of one address in a minute, 0 for any number")
    timeout: float = _limit(30.0, "SECONDS", "in which a request is read, and in which it is answered")

    def __post_init__(self):
        least = {"port": 0, "wait_ms": 0, "rate": 0, "timeout": 0.1}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int | float) and not least.get(each.name, 1) <= value < float("inf"):
                raise ValueError(f"--{each.name} must be at least {least.get(each.name, 1)}, got {value}")
        if self.port > 65535:
            raise ValueError(
                f"--port must be at most 65535, got {self.port}: leave it out for 8000, or 0 for a free one"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def names(self) -> tuple[str, ...]:
        """By which clients may call it; () for any."""
        if self.allowed_hosts or not self.is_loopback:
            return self.allowed_hosts
        return ("localhost", "127.0.0.1", "::1", self.host)


def add_serve_command(commands: Any, help_column: int) -> None:
    """The command with its flags, to the commands of a parser."""
    parser = add_command(
        commands,
        "serve",
        help_column,
        help="answer texts over HTTP, with a page to try it",
        usage="pyro-blora serve FOLDER [--port PORT] [--FLAG VALUE ...]",
        description="Answer texts over HTTP: POST /predict, a page at /, /health, and /metrics for Prometheus. "
        "Requests that come together share a forward pass. Ctrl-C or SIGTERM ends it, when what has come is answered.",
    )
    model, server = parser.add_argument_group("model"), parser.add_argument_group("server")
    add = model.add_argument
    add("run", metavar="FOLDER", help="a packed or ONNX model; or a run, whose draws then answer; or a name on the hub")
    add("--deployed", action="store_true", help="of a run: the one allocation that is exported, not draws")
    add("--draws", metavar="DRAWS", type=int, help="of a run: of gates and random weights (default: the run's)")
    add("--seed", metavar="SEED", type=int, help="of the draws (default: the run's)")
    add("--abstain", metavar="ACCURACY", type=float, help="of a run: answer as many texts as can be with this "
        "accuracy, by its held-out rows")  # fmt: skip
    add("--confidence", metavar="P", type=float, help="answer texts of this probability or more")
    add("--coverage", metavar="SHARE", type=float, help="of a run: sets, or intervals, that hold the label of this "
        "share of new texts, by its held-out rows")  # fmt: skip
    add(
        "--batch_size", metavar="TEXTS", type=int, help="in a forward pass at most (default: as predict); 1: each alone"
    )
    add("--revision", metavar="REVISION", help="of a name on the hub: branch, tag or commit")
    add("--backbone", metavar="PATH", help="where the backbone is now, if not where it was")
    add("--allow_code", metavar="FILE.PY:NAME", action="append", default=[], help="a function in a file that the run "
        "names and that may run; repeatable")  # fmt: skip
    for each in fields(Serving):
        kind, shown, metavar = type(each.default), each.metadata["help"], each.metadata["metavar"]
        if kind is tuple:
            server.add_argument(f"--{each.name}", metavar=metavar, default="", help=shown)
        else:
            shown = f"{shown} (default: {each.default:g})" if kind is float else f"{shown} (default: {each.default})"
            server.add_argument(f"--{each.name}", metavar=metavar, type=kind, default=each.default, help=shown)
    server.add_argument("--quiet", action="store_true", help="print the address, warnings and errors alone")


def serve_options(arguments: argparse.Namespace) -> tuple[dict[str, Any], Serving]:
    """(what `serve.serve` takes of them for the model, the rest)."""
    values = {name: value for name, value in vars(arguments).items() if name not in ("command", "quiet")}
    values["allowed_hosts"] = tuple(name.strip() for name in values["allowed_hosts"].split(",") if name.strip())
    of_server = {each.name: values.pop(each.name) for each in fields(Serving)}
    return values, Serving(**of_server)
