"""What is done with a run, or before one: the commands whose libraries are imported when they are asked for."""

import argparse
from collections.abc import Callable
from pathlib import Path

from .config.export_flags import export_options, require_together
from .config.measure_flags import measure_options
from .config.predict_flags import predict_options
from .config.push_flags import push_options
from .config.serve_flags import serve_options
from .machine import keep_freed_memory
from .progress import importing, phase, prepare, silenced
from .signals import heeded


def predict(arguments: argparse.Namespace) -> None:
    prepare(quiet=arguments.quiet)
    with heeded(), silenced(arguments.quiet):
        with importing():
            from .deploy.predict_file import predict_file

        keep_freed_memory()
        predict_file(**predict_options(arguments))
    if arguments.out:
        print(arguments.out)


def export(arguments: argparse.Namespace) -> None:
    options = export_options(arguments)
    require_together(**options)
    prepare(quiet=arguments.quiet)
    with silenced(arguments.quiet):
        with importing():
            from .deploy.exporting import export_run

        folder, measured = export_run(options.pop("run"), **options)
    if measured is not None and not arguments.quiet:
        print(f"{measured}.")
    print(folder)


def push(arguments: argparse.Namespace) -> None:
    prepare(quiet=arguments.quiet)
    with silenced(arguments.quiet):
        with importing():
            from .deploy.pushing import push as push_model

        address = push_model(**push_options(arguments))
    print(address)


def serve(arguments: argparse.Namespace) -> None:
    options, serving = serve_options(arguments)
    prepare(quiet=arguments.quiet)
    with heeded(), silenced(arguments.quiet):
        with importing():
            from .serve.server import serve as serve_model

        keep_freed_memory()
        serve_model(options.pop("run"), serving, **options)


def measure_costs_of(arguments: argparse.Namespace) -> None:
    prepare(quiet=arguments.quiet)
    with silenced(arguments.quiet):
        with importing():
            from .deploy.measuring import measure_costs

        print(measure_costs(**measure_options(arguments)))


def report(arguments: argparse.Namespace) -> None:
    prepare(quiet=arguments.quiet)
    with silenced(arguments.quiet):
        with phase("importing what draws"):
            from .report.page import write_report

        for folder in arguments.folders:
            with phase(f"drawing the report of {folder}"):
                path = write_report(Path(folder), sections=arguments.section)
            print(path)


AFTER: dict[str, Callable[[argparse.Namespace], None]] = {
    "predict": predict, "export": export, "push": push, "serve": serve, "measure-costs": measure_costs_of,
    "report": report,
}  # fmt: skip
