"""One run, from a configuration to a finished folder, and the table a user sees at the end.

The folder is filled under a temporary name (`.<name>.partial`), from which an interrupted run resumes, and renamed when
everything is there, on the disk, with its hashes. A finished run is never overwritten; its page, where it is missing
after an interruption, is written by the same command.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn

from .build import build, check_names, require_config
from .checkpoint import drop_older, saved_in, trainable
from .config.data_files import KEY as DATA_FILES
from .config.data_files import data_hashes, require_same_data
from .config.naming import functions_of
from .config.run_config import RunConfig
from .deploy.peft import export
from .distributed import gathered, on_main, sharding_wanted
from .evaluation.evaluating import Evaluated, evaluate, predictions_file, with_members
from .evaluation.metrics import scores_of
from .evaluation.summary import of_fit, of_restart, predictions_table, summarize
from .files import REPORT, NotWritten, replace_text, require_whole, sync, sync_tree, write_sums, writing
from .models.names import commit_of
from .posterior.arviz import to_arviz
from .posterior.arviz_compat import concatenate, read, save
from .program import BayesianLoRA
from .progress import labelled, phase, silenced
from .report.terminal import show_run
from .run_lock import alone, claimed, same_folder
from .signals import Interrupted, heeded
from .tasks.batching import first_inputs
from .training.loop import Trained, fit
from .user_code import held

_PACKAGES = ("pyro-blora", "torch", "pyro-ppl", "transformers", "peft", "accelerate", "datasets", "arviz", "numpy")


def train_run(config: RunConfig, *, quiet: bool = False) -> Path:
    """Train, evaluate and save one run; returns its folder, which the main process writes when training has ended.

    quiet: show neither progress nor the result.
    Errors: FileExistsError for a finished run; ValueError for whatever in the configuration cannot work, and for a run
    that another process is training. Neither leaves anything behind. NotWritten for a full disk. Interrupted after
    SIGTERM, SIGINT or SIGHUP, with a sentence on what is kept.
    """
    require_config(config)
    folder = config.folder
    if folder.parent.exists() and not folder.parent.is_dir():
        raise ValueError(f"output_dir {config.output_dir!r} is a file: give a folder")
    with silenced(quiet):
        check_names(config)
    main = accelerate.PartialState(cpu=not torch.cuda.is_available()).is_main_process  # as fit's Accelerator is
    code = held(functions_of(dataclasses.asdict(config)))
    with code, heeded(), silenced(quiet), alone(folder) if main else contextlib.nullcontext():
        try:
            if folder.exists():
                _require_unfinished(folder, config, main)
            else:
                with claimed(_partial(folder), folder) if main else contextlib.nullcontext(_nothing) as still_there:
                    _complete(config, folder, still_there)
        except KeyboardInterrupt as interruption:
            signum = getattr(interruption, "signum", signal.SIGINT)
            raise Interrupted(signum, _kept(folder)) from None
    if main and not quiet:
        show_run(folder)
    return folder


def _nothing() -> None:
    pass


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _require_unfinished(folder: Path, config: RunConfig, main: bool) -> None:
    """Write the page that a finished run lacks.

    Errors: FileExistsError where it lacks nothing; ValueError where its data have changed since.
    """
    if gathered(_lacks_page(folder))[0]:  # as the main process sees it, before it writes the page
        if main:
            _write_page(folder)
        return
    if not (folder / "summary.json").is_file():
        raise FileExistsError(
            f"{folder} is there, but is no finished run (it has no summary.json): move it away, or give another "
            "--output_dir"
        )
    require_same_data(folder, config)
    raise FileExistsError(
        f"{folder} is a finished run already: look at it with `pyro-blora show {folder}`, or change --seed or "
        "--output_dir to run again"
    )


def _lacks_page(folder: Path) -> bool:
    """Whether a finished run was cut off before its page was written."""
    return (folder / "summary.json").is_file() and not (folder / REPORT).is_file()


def _kept(folder: Path) -> str:
    """What there is of a run that was interrupted."""
    if folder.exists():
        return f"the run is finished, {folder}, only its page is missing: the same command writes it"
    return saved_in(_partial(folder)) or "there was no checkpoint yet: the same command starts the run again"


def _complete(config: RunConfig, folder: Path, still_there: Callable[[], None] | None = None) -> None:
    """Train or resume the run and its restarts under a temporary name, and rename it when everything is there.

    still_there: refuses a temporary folder that has been removed.
    """
    partial, main = _partial(folder), accelerate.PartialState().is_main_process
    read = data_hashes(config) if main else {}
    restarts = [(one, partial / "restarts" / f"seed-{one.seed}") for one in each_restart(config)]
    for number, (one, place) in enumerate(restarts, 1):
        if not place.exists():
            with labelled(f"fit {number} of {config.fits}, seed {one.seed}"):
                _complete(one, place)
            continue
        on_main(functools.partial(require_same_data, place, one))  # its answers are averaged, row by row
        if main and _lacks_page(place):
            _write_page(place)
    with labelled(f"fit {config.fits} of {config.fits}, seed {config.seed}" if restarts else ""):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of this fit, not of the restarts before it
        trained, began = fit(config, folder=partial), time.perf_counter()
        check = still_there or (same_folder(partial) if main else lambda: None)
        evaluated = evaluate(trained.parts)  # by all processes
    if main:
        with writing(partial):
            summary = _write(trained, evaluated, partial, [place for _, place in restarts])
            summary["seconds"]["evaluation"] = round(time.perf_counter() - began, 2)
            summary |= {DATA_FILES: read} if read else {}
            check()
            machine = {"threads": torch.get_num_threads(), "processes": accelerate.PartialState().num_processes}
            written = config.to_json(versions=versions(trained.program.net.backbone), **machine)
            replace_text(partial / "config.json", written)
            replace_text(partial / "summary.json", json.dumps(summary, indent=2) + "\n")
            drop_older(partial / "checkpoints")
            write_sums(partial)
            sync_tree(partial)
            check()
            os.replace(partial, folder)
            sync(folder.parent)
        _write_page(folder)  # last: the run is complete without its page
    accelerate.PartialState().wait_for_everyone()


def _write_page(folder: Path) -> None:
    """The report of a finished run, which is not lost where what draws it is not installed.  Errors: NotWritten."""
    try:
        with phase("drawing the report"):
            from .report.page import write_report  # here, as charts need packages that a training does not

            write_report(folder)
    except ImportError as error:
        print(f"no report.html: {error}. Install it, then: pyro-blora report {folder}", file=sys.stderr)
    except NotWritten as error:
        raise NotWritten(f"{folder} is finished, but its page is not: {error}") from None


def each_restart(config: RunConfig) -> list[RunConfig]:
    """The further fits, each as a separate run: from another seed, with the same training rows.

    They are the restarts of a run, or the members of an ensemble.
    """
    rows = config.seed if config.data_seed is None else config.data_seed
    seeds = range(config.seed + 1, config.seed + config.fits)
    alone: dict[str, Any] = {"weights": config.weights_of_fits, "weights_settings": {}} if config.is_ensemble else {}
    return [dataclasses.replace(config, seed=seed, data_seed=rows, restarts=1, **alone) for seed in seeds]


def versions(backbone: nn.Module | None = None) -> dict[str, str]:
    """Of Python and packages, and the commit of a backbone that came from the hub."""
    found = {"python": platform.python_version()}
    if backbone is not None and (commit := commit_of(backbone)) is not None:
        found["backbone"] = commit
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found


def _write(trained: Trained, evaluated: Evaluated, folder: Path, restarts: list[Path]) -> dict:
    """Posterior, adapter and predictions into the folder; returns the summary.

    restarts: folders of finished runs, the further chains.
    """
    parts, program, config = trained.parts, trained.program, trained.parts.config
    for one, place in zip(each_restart(config), restarts, strict=True):
        require_whole(place)
        require_same_data(place, one)
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # of a run that was cut off while it was finishing
    with phase("saving the posterior"):
        data = to_arviz(
            program, evaluated.draws, evaluated.pairs["eval"][0], clipped=evaluated.beyond, theta=evaluated.theta,
            seed=config.seed,
        )  # fmt: skip
        if restarts:
            data = concatenate([data, *map(read, restarts)], [config.seed, *(one.seed for one in each_restart(config))])
        with writing(folder / "posterior.nc"):
            save(data, folder / "posterior.nc")
    with phase("exporting the adapter"), writing(folder / "adapter"):
        export(
            _unsharded(trained), folder / "adapter", rows=first_inputs(parts.tokens["train"], parts.collate),
            tokenizer=parts.tokenizer, config=config,
        )  # fmt: skip
    first = evaluated.pairs["eval"][0]  # of an ensemble its first member's
    if config.is_ensemble:
        pairs = {
            split: (with_members(averaged, split, restarts), at_mode)
            for split, (averaged, at_mode) in evaluated.pairs.items()
        }
        evaluated = evaluated._replace(pairs=pairs)
    with phase("scoring"):
        for split, pair in evaluated.pairs.items():
            with writing(folder / predictions_file(split)):
                predictions_table(parts, split, *pair).to_parquet(folder / predictions_file(split))
        summary = summarize(parts, evaluated, trained.seconds)
    if restarts:
        summary["restarts"] = [of_restart(place) for place in restarts]
    if config.is_ensemble:
        summary["first_fit"] = of_fit(summary | scores_of(parts.task, first))
    return summary


def _unsharded(trained: Trained) -> BayesianLoRA:
    """The trained program; of a sharded one a copy in this process's memory."""
    if not sharding_wanted():
        return trained.program
    copy = build(trained.parts.config).program
    with torch.no_grad():
        for mine, learned in zip(trainable(copy).values(), trainable(trained.program).values(), strict=True):
            mine.copy_(learned)
    return copy.eval()
