"""Memory and time of `pyro-blora predict` by the number of rows: a small encoder, so that reading and writing count.

python experiments/predict_memory.py --rows 10000 1000000
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import transformers

from experiments.studies.scripts import run_script
from pyro_blora import RunConfig, export, fit
from pyro_blora.models import load_tokenizer

_PROGRAM = """import resource, sys
from pyro_blora.__main__ import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)"""


def model_in(folder: Path) -> tuple[Path, Path]:
    """(backbone, exported adapter) of a training of one epoch on 64 rows."""
    tokenizer = load_tokenizer("demo")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    run = RunConfig(backbone=str(folder / "backbone"), max_train=64, epochs=1, rank=4, max_length=32)
    trained = fit(run, quiet=True)
    adapter = folder / "adapter"
    export(trained.program, adapter, config=run, tokenizer=trained.parts.tokenizer)
    return folder / "backbone", adapter


def measured(folder: Path, backbone: Path, adapter: Path, rows: int) -> tuple[float, float]:
    """(peak memory in MB, seconds) of one prediction of that many rows."""
    path, out = folder / f"{rows}.csv", folder / f"{rows}_answers.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("number,sentence\n")
        file.writelines(f'{i},"The soldier number {i} lost these cameras\nagain and again."\n' for i in range(rows))
    flags = ["--out", str(out), "--backbone", str(backbone), "--deployed", "--batch_size", "256", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "predict", str(adapter), str(path), *flags],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    with out.open(encoding="utf-8") as file:
        answered = sum(1 for _ in file) - 1
    assert answered == rows, f"{answered} rows were answered"
    return int(re.search(r"peak (\d+)", done.stderr)[1]) / 1024, seconds


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000], help="of the tables, one by one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        backbone, adapter = model_in(Path(name))
        print("| rows | peak memory | seconds |\n|---|---|---|")
        for rows in options.rows:
            memory, seconds = measured(Path(name), backbone, adapter, rows)
            print(f"| {rows:,} | {memory:,.0f} MB | {seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    run_script(main)
