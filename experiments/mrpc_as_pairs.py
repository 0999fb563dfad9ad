"""MRPC in the CSV format of task `pairs`, to try the protein-interaction preset on data that is at hand.

python experiments/mrpc_as_pairs.py --glue_dir GLUE --output_dir runs/mrpc_pairs --max_train 400
pyro-blora train --preset protein_pairs --backbone demo --glue_dir runs/mrpc_pairs
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.scripts import run_script
from pyro_blora.tasks.glue import load_glue
from pyro_blora.tasks.pairs import COLUMNS, LABELS


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue_dir", required=True, help="folder of the official TSV release")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/mrpc_pairs"), help="a new folder")
    parser.add_argument("--max_train", type=int, default=None, help="training pairs to keep; none: all")
    options = parser.parse_args(arguments)
    if options.output_dir.exists():
        raise ValueError(f"{options.output_dir} exists: give another --output_dir")
    splits = load_glue("mrpc", glue_dir=options.glue_dir, n_train=options.max_train)
    options.output_dir.mkdir(parents=True)
    for split, name in (("train", "train.csv"), ("eval", "dev.csv")):
        with (options.output_dir / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*COLUMNS, "label"])
            for row in splits[split]:
                writer.writerow([row["sentence1"], row["sentence2"], LABELS[row["label"]]])
    print(f"{options.output_dir}: {len(splits['train'])} pairs to train on, {len(splits['eval'])} to evaluate")


if __name__ == "__main__":
    run_script(main)
