"""Many runs from one grid file: tasks x priors x scopes x ranks x seeds, or whatever its axes are.

    python experiments/grid.py experiments/grids/priors.yaml --glue_dir GLUE

Finished runs are skipped and interrupted ones resumed, so the command can be killed and given again. Every run is a
process of its own, the same as `pyro-blora train` with its flags: one that fails costs its own cell, which is listed at
the end with the file of its output. The results are one table, results.parquet and results.csv, a line a finished run;
cells.json beside it has the labels of all runs that the file asks for.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import pandas as pd

from experiments.studies.grid_file import CELLS, Cell, read_grid
from experiments.studies.launchers import Cluster, Processes
from experiments.studies.scripts import run_script
from pyro_blora.config.data_files import require_same_data
from pyro_blora.files import REPORT, replace, replace_text
from pyro_blora.progress import phase
from pyro_blora.report import write_report
from pyro_blora.signals import Interrupted, heeded
from pyro_blora.training import Schedule
from pyro_blora.user_files import load_yaml

_LOOK = 0.5  # seconds between two looks at the runs
COLUMNS = (
    "metric", "score", "second_score", "deployed_score", "nll", "deployed_nll", "ece", "brier", "seconds", "folder",
)  # fmt: skip


def is_finished(cell: Cell) -> bool:
    return (cell.folder / "summary.json").is_file()


def log_file(cell: Cell) -> Path:
    return cell.config.folder.parent / "logs" / f"{cell.folder.name}.txt"


def step(cell: Cell) -> int:
    """The last step that a run in progress has logged."""
    path = cell.folder.with_name(f".{cell.folder.name}.partial") / "metrics.jsonl"
    try:
        return json.loads(path.read_text("utf-8").splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError):  # nothing yet, or half a line
        return 0


def start(cell: Cell, launcher):
    """Start the run on the cell's own configuration."""
    log = log_file(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    config = log.with_suffix(".json")
    config.write_text(cell.config.to_json(), encoding="utf-8")
    return launcher.start(config, log)


def run_all(cells: list[Cell], launcher, at_a_time: int) -> list[Cell]:
    """Train what is not finished, some at a time; returns the cells that failed."""
    waiting = [cell for cell in cells if not is_finished(cell)]
    running, failed = [], []
    with phase("training the grid", len(cells), unit="runs", first=len(cells) - len(waiting)) as shown:
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    cell = waiting.pop(0)
                    try:
                        running.append((cell, start(cell, launcher)))
                    except (OSError, RuntimeError) as error:  # the cluster does not take it
                        log_file(cell).write_text(f"not started: {' '.join(str(error).split())}\n", encoding="utf-8")
                        failed.append(cell)
                        shown.advance()
                time.sleep(_LOOK)
                for cell, run in [(cell, run) for cell, run in running if run.ended()]:
                    running.remove((cell, run))
                    if not is_finished(cell):
                        failed.append(cell)
                        print(f"failed: {cell.name}: {last_line(log_file(cell))}", file=sys.stderr)
                    shown.advance()
                shown.advance(0, note=", ".join(f"{cell.name} step {step(cell)}" for cell, _ in running))
        finally:  # interrupted: a run that is stopped goes on from the checkpoint that it then writes
            for _, run in running:
                run.stop()
            for _, run in running:
                run.wait()
    return failed


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def results(cells: list[Cell]) -> pd.DataFrame:
    """A line for each finished run: its labels, its scores, what the gates learned, what it cost, its folder."""
    rows = []
    for cell in filter(is_finished, cells):
        summary = json.loads((cell.folder / "summary.json").read_text(encoding="utf-8"))
        bops, deployed = summary["bops"], summary["deployed"]
        rows.append({
            **cell.labels, "metric": summary["metric"]["name"], "score": summary["metric"]["value"],
            "second_score": second_score(summary), "deployed_score": deployed["metric"]["value"],
            "nll": summary["nll"], "deployed_nll": deployed["nll"],
            "ece": summary["ece"]["value"], "brier": summary["brier"], "kl_z": summary["kl"]["z"],
            "kl_g": summary["kl"]["g"], "bops_adapted": bops["adapted_ratio"], "bops_model": bops["model_ratio"],
            "deployed_bops_adapted": bops["deployed"]["adapted_ratio"],
            "deployed_bops_model": bops["deployed"]["model_ratio"],
            **{f"bits_{role}": bits for role, bits in summary["expected_bits"].items()},
            **{f"rank_{kind}": rank for kind, rank in summary["expected_rank"].items()},
            "seconds": summary["seconds"]["training"], "folder": str(cell.folder),
        })  # fmt: skip
    return pd.DataFrame(rows)


def second_score(summary: dict) -> float | None:
    """The number that is tabulated beside the headline: MNLI's mismatched accuracy, or the metric's other one (F1)."""
    name = summary["metric"]["name"]
    if "eval_mismatched" in summary:
        return summary["eval_mismatched"]["scores"][name]
    return next((value for key, value in summary.get("scores", {}).items() if key != name), None)


def write_results(cells: list[Cell], folder: Path) -> None:
    """results.parquet and results.csv of what is finished, cells.json of all; each replaced in one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    table = results(cells)
    replace_text(folder / CELLS, json.dumps([cell.labels for cell in cells], indent=1) + "\n")
    for name, write in (("results.parquet", table.to_parquet), ("results.csv", table.to_csv)):
        replace(folder / name, functools.partial(write, index=False))


def write_pages(cells: list[Cell], folder: Path) -> None:
    """The table and the page of the grid, and the pages of finished runs that were cut off before theirs."""
    for cell in filter(is_finished, cells):
        if not (cell.folder / REPORT).is_file():
            write_report(cell.folder)
    write_results(cells, folder)
    if any(map(is_finished, cells)):
        print(f"report: {write_report(folder)}")


def job_settings(given: list[str]) -> dict:
    """NAME=VALUE words as a table; values are YAML."""
    if wrong := [word for word in given if "=" not in word]:
        raise ValueError(f"--job takes NAME=VALUE, got {wrong[0]!r}")
    return {name: load_yaml(value, f"--job {name}") for name, value in (word.split("=", 1) for word in given)}


def steps_of(cell: Cell) -> str:
    """Optimizer steps, where the file says how many examples there are."""
    config = cell.config
    return f"{Schedule.of(config, config.max_train).steps} steps" if config.max_train else "all data"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="a YAML file; experiments/grids has some")
    parser.add_argument("--glue_dir", help="folder of the official TSV release, for runs that name none")
    parser.add_argument("--output_dir", help="folder of the runs, unless the file names one (default: runs/<grid>)")
    parser.add_argument("--at_a_time", type=int, help="runs at a time (default: 1; all of them on Slurm)")
    parser.add_argument("--cluster", choices=("slurm", "local"), help="send the runs there as jobs, through submitit")
    parser.add_argument(
        "--job",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="parameters of a job, as submitit calls them: slurm_partition=gpu gpus_per_node=1",
    )
    parser.add_argument("--dry_run", action="store_true", help="check the file and list its runs")
    options = parser.parse_args(arguments)
    cells = read_grid(options.grid, options.output_dir, options.glue_dir, taken=COLUMNS)
    for cell in filter(is_finished, cells):
        require_same_data(cell.folder, cell.config)
    at_a_time = len(cells) if options.cluster == "slurm" else 1
    at_a_time = at_a_time if options.at_a_time is None else options.at_a_time
    if at_a_time < 1:
        raise ValueError(f"--at_a_time must be at least 1, got {at_a_time}")
    if options.dry_run:
        for cell in cells:
            print(f"{'finished' if is_finished(cell) else 'to do':9s} {cell.name} ({steps_of(cell)})")
        return 0
    if options.job and not options.cluster:
        raise ValueError("--job is for the jobs of a cluster: add --cluster slurm")
    folder, job = cells[0].config.folder.parent, job_settings(options.job)
    launcher = Cluster(options.cluster, folder / "jobs", job) if options.cluster else Processes()
    interrupted = None
    try:
        with heeded():
            failed = run_all(cells, launcher, at_a_time)
    except Interrupted as interruption:
        interrupted = interruption
    write_pages(cells, folder)
    if interrupted:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return interrupted.exit_code
    print(f"{len(cells) - len(failed)} of {len(cells)} runs are finished: {folder / 'results.parquet'}")
    for cell in failed:
        print(f"failed: {cell.name}: {last_line(log_file(cell))} ({log_file(cell)})")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
