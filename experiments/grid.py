"""Many runs from one grid file: tasks x priors x scopes x ranks x seeds, or whatever its axes are.

    python experiments/grid.py experiments/grids/priors.yaml --glue_dir GLUE

Finished runs are skipped and interrupted ones resumed, so the command can be killed and given again. Every run is a
process of its own, the same as `pyro-blora train` with its flags: one that fails costs its own cell, which is listed at
the end with the file of its output. The results are one table, results.parquet and results.csv, a line a finished run.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from tqdm.auto import tqdm

from experiments.studies.grid_file import Cell, read_grid
from pyro_blora.schedule import Schedule

_LOOK = 0.5  # seconds between two looks at the runs


@dataclasses.dataclass
class Running:
    """A cell and the process that trains it."""

    cell: Cell
    process: subprocess.Popen

    @property
    def step(self) -> int:
        """The last step that it has logged."""
        path = self.cell.folder.with_name(f".{self.cell.folder.name}.partial") / "metrics.jsonl"
        try:
            return json.loads(path.read_text("utf-8").splitlines()[-1])["step"]
        except (OSError, IndexError, ValueError, KeyError):  # nothing yet, or half a line
            return 0


def is_finished(cell: Cell) -> bool:
    return (cell.folder / "summary.json").is_file()


def log_file(cell: Cell) -> Path:
    return Path(cell.config.output_dir) / "logs" / f"{cell.folder.name}.txt"


def start(cell: Cell) -> Running:
    """`pyro-blora train` on the cell's own configuration; what it prints goes to its log file."""
    path = log_file(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = path.with_suffix(".json")
    config.write_text(cell.config.to_json(), encoding="utf-8")
    root = Path(__file__).resolve().parents[1]
    with open(path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.studies.one_run", str(config), str(os.getpid())],
            stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip
    return Running(cell, process)


def run_all(cells: list[Cell], processes: int) -> list[Cell]:
    """Train what is not finished, `processes` at a time; returns the cells that failed."""
    waiting = [cell for cell in cells if not is_finished(cell)]
    running: list[Running] = []
    failed: list[Cell] = []
    with tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run", dynamic_ncols=True) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    running.append(start(waiting.pop(0)))
                time.sleep(_LOOK)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    if not is_finished(one.cell):
                        failed.append(one.cell)
                        bar.write(f"failed: {one.cell.name}: {last_line(log_file(one.cell))}")
                    bar.update()
                bar.set_postfix_str(", ".join(f"{one.cell.name} step {one.step}" for one in running))
        finally:  # interrupted: a run that is told to stop resumes at its last checkpoint
            for one in running:
                one.process.terminate()
            for one in running:
                one.process.wait()
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
            "deployed_score": deployed["metric"]["value"], "nll": summary["nll"], "deployed_nll": deployed["nll"],
            "ece": summary["ece"]["value"], "brier": summary["brier"], "kl_z": summary["kl"]["z"],
            "kl_g": summary["kl"]["g"], "bops_adapted": bops["adapted_ratio"], "bops_model": bops["model_ratio"],
            "deployed_bops_adapted": bops["deployed"]["adapted_ratio"],
            "deployed_bops_model": bops["deployed"]["model_ratio"],
            **{f"bits_{role}": bits for role, bits in summary["expected_bits"].items()},
            **{f"rank_{kind}": rank for kind, rank in summary["expected_rank"].items()},
            "seconds": summary["seconds"]["training"], "folder": str(cell.folder),
        })  # fmt: skip
    return pd.DataFrame(rows)


def write_results(table: pd.DataFrame, folder: Path) -> None:
    """results.parquet and results.csv, each replaced in one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("results.parquet", table.to_parquet), ("results.csv", table.to_csv)):
        write(folder / f".{name}.partial", index=False)
        os.replace(folder / f".{name}.partial", folder / name)


def steps_of(cell: Cell) -> str:
    """Optimizer steps, where the file says how many examples there are."""
    return str(Schedule.of(cell.config, cell.config.max_train).steps) if cell.config.max_train else "all data"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="a YAML file; experiments/grids has some")
    parser.add_argument("--glue_dir", help="folder of the official TSV release, for runs that name none")
    parser.add_argument("--output_dir", help="folder of the runs, unless the file names one (default: runs/<grid>)")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--dry_run", action="store_true", help="check the file and list its runs")
    options = parser.parse_args(arguments)
    try:
        cells = read_grid(options.grid, options.output_dir, glue_dir=options.glue_dir)
        if options.processes < 1:
            raise ValueError(f"--processes must be at least 1, got {options.processes}")
    except ValueError as error:
        print(f"grid.py: error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        for cell in cells:
            print(f"{'finished' if is_finished(cell) else 'to do':9s} {cell.name} ({steps_of(cell)} steps)")
        return 0
    folder = Path(cells[0].config.output_dir)
    try:
        failed = run_all(cells, options.processes)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        write_results(results(cells), folder)
    print(f"{len(cells) - len(failed)} of {len(cells)} runs are finished: {folder / 'results.parquet'}")
    for cell in failed:
        print(f"failed: {cell.name}: {last_line(log_file(cell))} ({log_file(cell)})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
