"""The command line: parsing only, the work is in `run`.

torch and transformers are imported when a command needs them, so that `--help` and a misspelt flag answer at once.
"""

import argparse
import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from .commands import AFTER
from .config.command_line import called_elsewhere, run_fields, take_settings
from .config.completion import complete
from .config.data_files import require_same_data
from .config.export_flags import add_export_command
from .config.flags import add_run_flags
from .config.lists import LISTS, choices, print_list, print_methods
from .config.measure_flags import add_measure_command
from .config.predict_flags import add_predict_command
from .config.push_flags import add_push_command
from .config.run_config import RunConfig
from .config.serve_flags import add_serve_command
from .machine import is_main, keep_freed_memory, spin_briefly
from .progress import importing, prepare, silenced
from .registries import LISTED
from .signals import Interrupted, asked, heeded
from .user_code import place_of
from .user_values import nearest, suggest

COMMANDS = ("train", *AFTER, "show", "what-if", "methods", *LISTED, "doctor")
_LAUNCHERS_PATIENCE = 1.0  # seconds in which torchrun ends the processes beside one that has failed
_HELP_COLUMN = 34  # of `train --help`: beside most flags with their values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake or a full disk (one line on stderr).

    143, 130 and 129 after SIGTERM, SIGINT and SIGHUP.
    """
    spin_briefly()
    code = _main(sys.argv[1:] if argv is None else argv)
    if argv is None and os.environ.get("WORLD_SIZE", "1") != "1" and "torch" in sys.modules:
        from .distributed import leave

        leave(code)  # torchrun's processes end together
    return code


def _main(argv: list[str]) -> int:
    try:
        code = _command(argv)
        sys.stdout.flush()
        return code
    except (ValueError, OSError, ImportError) as error:
        ours = isinstance(error, ImportError) and (error.name or "").startswith("pyro_blora")
        if isinstance(error, BrokenPipeError) and argv[:1] != ["train"]:  # nobody reads on, as behind `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        if ours or os.environ.get("PYRO_BLORA_TRACEBACK") == "1":
            raise
        if not is_main():  # where the main process fails, too, its sentence is enough
            time.sleep(_LAUNCHERS_PATIENCE)
        remedy = ": `pyro-blora doctor` lists what is missing" if isinstance(error, ImportError) else ""
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"pyro-blora: error: {' '.join(said.split())}{remedy}", file=sys.stderr)
        return 2
    except Exception as error:
        place = place_of(error)
        if place is None or os.environ.get("PYRO_BLORA_TRACEBACK") == "1":
            raise
        said = f"{place}: {type(error).__name__}: {' '.join(str(error).split())}"
        print(f"pyro-blora: error: {said}: correct it; PYRO_BLORA_TRACEBACK=1 shows the traceback", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        if is_main():
            kept = f"; {interruption}" if str(interruption) else ""
            print(f"pyro-blora: interrupted{kept}", file=sys.stderr)
        return getattr(interruption, "exit_code", 130)


def _command(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise ValueError(f"unknown command {argv[0]!r}: {suggest(argv[0], COMMANDS)}")
    settings, rest = take_settings(argv) if argv[:1] == ["train"] else ({}, argv)
    parser = _parser()
    complete(parser)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    arguments, unknown = parser.parse_known_args(rest)
    if unknown:
        (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        flags = [flag for action in commands[arguments.command]._actions for flag in action.option_strings[-1:]]
        given = unknown[0].partition("=")[0]
        remedy = called_elsewhere(given) or nearest(given, flags) or suggest(given, flags)
        raise ValueError(f"unknown argument {unknown[0]!r}: {remedy}")
    if arguments.command == "train":
        return _train(arguments, settings)
    if arguments.command in AFTER:
        AFTER[arguments.command](arguments)
        return 0
    if arguments.command == "show":
        from .report.terminal import show_run

        show_run(Path(arguments.run))
        return 0
    if arguments.command == "what-if":
        from .report.terminal import show_what_if

        show_what_if(Path(arguments.run), arguments.gate, arguments.state == "open")
        return 0
    if arguments.command == "methods":
        print_methods()
        return 0
    if arguments.command == "doctor":
        from .doctor import show

        show()
        return 0
    print_list(arguments.command)
    return 0


def _train(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    config, quiet = RunConfig(**run_fields(arguments, settings)), arguments.quiet
    config.require_known()
    folder = config.folder
    if arguments.if_finished == "show" and (folder / "summary.json").is_file():
        require_same_data(folder, config)
        if quiet:
            print(folder)
            return 0
        from .report.terminal import show_run

        print(f"finished already: {folder}")
        show_run(folder)
        return 0
    prepare(quiet=quiet)
    with heeded():
        try:
            with silenced(quiet), importing():
                from .distributed import leave
                from .run import train_run
        except BaseException:  # whatever a library has made of an interruption
            if not asked():
                raise
        if signum := asked():  # also where a library has caught it
            raise Interrupted(signum, "nothing had begun: the same command starts the run")
        keep_freed_memory()
        folder = train_run(config, quiet=quiet)
    if is_main():  # torchrun starts one process a device: one of them speaks
        print(folder)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        leave()
    return 0


def _parser() -> _Parser:
    purpose = "Bayesian low-rank adapters: Pyro learns their precision and rank with their weights."
    epilog = "PYRO_BLORA_TRACEBACK=1 in the environment shows the traceback of an error."
    parser = _Parser(prog="pyro-blora", description=purpose, epilog=epilog, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pyro-blora {sys.modules[__package__].__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    train = commands.add_parser(
        "train",
        help="train, or resume, one run",
        description="Train one run, or resume it: a flag overrides the preset, the preset overrides the defaults.",
        usage="pyro-blora train [--preset NAME] [--FLAG VALUE ...] [--prior.SETTING VALUE ...]",
        epilog=choices(),
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=_HELP_COLUMN),
        allow_abbrev=False,
    )
    output = add_run_flags(train)["output"]
    output.add_argument(
        "--if_finished",
        choices=("error", "show"),
        default="error",
        help="what to do when this very run is finished already: refuse, or show its result (default: error)",
    )
    output.add_argument("--quiet", action="store_true", help="print nothing but the run's folder, warnings and errors")
    add_predict_command(commands, _HELP_COLUMN)
    add_export_command(commands, _HELP_COLUMN)
    add_push_command(commands, _HELP_COLUMN)
    add_serve_command(commands, _HELP_COLUMN)
    add_measure_command(commands, _HELP_COLUMN)
    commands.add_parser("methods", help="list the methods to compare and what each one sets", allow_abbrev=False)
    for name, what in LISTS.items():
        commands.add_parser(name, help=f"list the {what}", allow_abbrev=False)
    commands.add_parser(
        "doctor",
        help="list what this machine has for a training, and how to install what is missing",
        allow_abbrev=False,
    )
    show = commands.add_parser("show", help="print the result table of a finished run", allow_abbrev=False)
    show.add_argument("run", help="the run's folder")
    report = commands.add_parser(
        "report", help="write report.html into runs, or into a grid's folder", allow_abbrev=False
    )
    report.add_argument("--quiet", action="store_true", help="print nothing but the paths of the pages")
    report.add_argument("folders", nargs="+", metavar="FOLDER", help="a finished run, or the folder of a grid's runs")
    report.add_argument(
        "--section", action="append", default=[], metavar="FILE.PY:FUNCTION", help="a section of your own; repeatable"
    )
    what_if = commands.add_parser(
        "what-if", help="predict what forcing one gate would cost and save", allow_abbrev=False
    )
    what_if.add_argument("run", help="the run's folder")
    what_if.add_argument(
        "gate", help="PROJECTION.TENSOR.BITS or PROJECTION.rank.NUMBER: 3.value.base.8, 3.value.rank.5"
    )
    what_if.add_argument("state", choices=("open", "closed"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
