"""One run, from a configuration to a finished folder, and the table a user sees at the end.

The folder is filled under a temporary name (`.<name>.partial`), from which an interrupted run resumes, and renamed when
everything is there. A finished run is never overwritten.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import accelerate
import filelock
import torch

from .arviz_data import concatenate, read, save
from .build import build, check_names
from .checkpoint import trainable
from .config import RunConfig
from .evaluation import Evaluated, evaluate, predictions_file, with_members
from .exporting import export
from .inference_data import to_arviz
from .processes import sharding_wanted
from .program import BayesianLoRA
from .show import show_run
from .summary import of_restart, predictions_table, summarize
from .training import Trained, fit

_PACKAGES = ("pyro-blora", "torch", "pyro-ppl", "transformers", "peft", "accelerate", "datasets", "arviz", "numpy")


def train_run(config: RunConfig) -> Path:
    """Train, evaluate and save one run; returns its folder, which the main process writes when training has ended.

    Errors: FileExistsError for a finished run; ValueError for whatever in the configuration cannot work, and for a run
    that another process is training. Neither leaves anything behind.
    """
    folder = config.folder
    check_names(config)
    with _alone(folder):
        if folder.exists():
            raise FileExistsError(
                f"{folder} is a finished run already: look at it with `pyro-blora show {folder}`, or change --seed or "
                "--output_dir to run again"
            )
        _complete(config, folder)
    if accelerate.PartialState().is_main_process:
        show_run(folder)
    return folder


@contextlib.contextmanager
def _alone(folder: Path):
    """Hold the run's lock, which the system lets go of however this process ends.

    Errors: ValueError where another process holds it.
    """
    path = folder.with_name(f".{folder.name}.lock")
    if not accelerate.PartialState(cpu=not torch.cuda.is_available()).is_main_process:  # as fit's Accelerator is
        yield
        return
    missing = [place for place in path.parents if not place.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=0)
    with contextlib.suppress(NotImplementedError):  # file systems without locks
        try:
            lock.acquire()
        except filelock.Timeout:
            raise ValueError(
                f"{folder} is being trained by another process: wait for it, or change --seed or --output_dir"
            ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
        with contextlib.suppress(OSError):  # what a refused run would leave; others are not empty
            for place in missing:
                place.rmdir()


def _complete(config: RunConfig, folder: Path) -> None:
    """Train or resume the run and its restarts under a temporary name, and rename it when everything is there."""
    partial = folder.with_name(f".{folder.name}.partial")
    restarts = [(one, partial / "restarts" / f"seed-{one.seed}") for one in each_restart(config)]
    for one, place in restarts:
        if not place.exists():
            _complete(one, place)
    trained, began = fit(config, folder=partial), time.perf_counter()
    evaluated = evaluate(trained.parts)  # by all processes
    if accelerate.PartialState().is_main_process:
        summary = _write(trained, evaluated, partial, [place for _, place in restarts])
        summary["seconds"]["evaluation"] = round(time.perf_counter() - began, 2)
        (partial / "config.json").write_text(config.to_json(versions=versions()), encoding="utf-8")
        (partial / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder)
        _write_page(folder)
    accelerate.PartialState().wait_for_everyone()


def _write_page(folder: Path) -> None:
    """The report of a finished run, which is not lost where what draws it is not installed."""
    try:
        from .report import write_report  # here, as charts need packages that a training does not

        write_report(folder)
    except ImportError as error:
        print(f"no report.html: {error}. Install it, then: pyro-blora report {folder}", file=sys.stderr)


def each_restart(config: RunConfig) -> list[RunConfig]:
    """The further fits, each as a run of its own: from another seed, with the same training rows.

    They are the restarts of a run, or the members of an ensemble.
    """
    rows = config.seed if config.data_seed is None else config.data_seed
    seeds = range(config.seed + 1, config.seed + config.fits)
    alone = {"weights": config.law_of_fits, "weights_settings": {}} if config.weights == "ensemble" else {}
    return [dataclasses.replace(config, seed=seed, data_seed=rows, restarts=1, **alone) for seed in seeds]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
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
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # of a run that was cut off while it was finishing
    data = to_arviz(
        program, evaluated.draws, evaluated.pairs["eval"][0], labels=parts.task.labels, clipped=evaluated.beyond,
        theta=evaluated.theta, seed=config.seed,
    )  # fmt: skip
    if restarts:
        data = concatenate([data, *map(read, restarts)], [config.seed, *(one.seed for one in each_restart(config))])
    save(data, folder / "posterior.nc")
    export(_unsharded(trained), folder / "adapter")
    if config.weights == "ensemble":
        pairs = {
            split: (with_members(averaged, split, restarts), at_mode)
            for split, (averaged, at_mode) in evaluated.pairs.items()
        }
        evaluated = evaluated._replace(pairs=pairs)
    for split, pair in evaluated.pairs.items():
        predictions_table(parts, split, *pair).to_parquet(folder / predictions_file(split))
    summary = summarize(parts, evaluated, trained.seconds)
    if restarts:
        summary["restarts"] = [of_restart(place) for place in restarts]
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
