"""What gates have learned is trained from the LoRA on, as every other allocation of the study."""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import pytest

from experiments import allocation
from experiments.studies import compare
from experiments.studies.allocation_page import differences, training_of
from experiments.studies.allocations import METHODS, Budget, Cells
from pyro_blora.config import RunConfig

KEPT = Path(__file__).resolve().parents[2] / "benchmarks" / "cells" / "allocation"
BUDGET = Budget("W4A4", 0.04, "fixed", {"bits": 4})
WIDTHS = {"0.query": {"base": 4, "input": 8, "rank": 2}}


def cells(folder):
    return Cells(argparse.Namespace(
        glue_dir="glue", backbone="demo", max_train=64, epochs=1, kl_warmup=0.4, draws=2, output_dir=str(folder),
        granularity="tensor", bit_widths=RunConfig().bit_widths, all_rows=[], bf16=[], twice=[], keep=folder, seeds=[0],
        only_finished=True,
    ))  # fmt: skip


def test_it_is_the_allocation_of_the_run_in_the_steps_of_the_others(tmp_path):
    study = cells(tmp_path)
    assert study.config("sst2", 0, "rewound", BUDGET) is None  # nothing has been learned
    path = study.path("sst2", 0, "rewound", BUDGET).with_suffix(".widths.json")
    path.write_text(json.dumps(WIDTHS))
    rewound, uniform = (study.config("sst2", 0, method, BUDGET) for method in ("rewound", "uniform"))
    assert (rewound.prior, rewound.prior_settings) == ("allocation", {"widths": WIDTHS})
    same = ("kl_warmup", "epochs", "seed", "gated_dropout", "settle", "scope", "max_train")
    assert all(getattr(rewound, name) == getattr(uniform, name) for name in same)
    learned, start = (study.config("sst2", 0, method, BUDGET) for method in ("budget", "start"))
    assert (learned.settle, start.settle) == (0.3, 0.6) and learned.prior_settings == start.prior_settings


def test_the_tasks_that_are_named_have_all_rows_bfloat16_and_twice_the_epochs(tmp_path):
    study = cells(tmp_path)
    given = study.options
    given.tasks, given.bf16 = ["sst2", "mrpc", "cola"], ["cola", "mrpc"]
    given.all_rows = given.twice = ["cola"]
    found = {task: study.config(task, 0, "uniform", BUDGET) for task in given.tasks}
    assert {task: (one.max_train, one.precision, one.epochs) for task, one in found.items()} == {
        "sst2": (64, "float32", 1), "mrpc": (64, "bf16", 1), "cola": (None, "bf16", 2),
    }  # fmt: skip
    assert study.lora("cola", 0).precision == "bf16" and study.lora("cola", 0).epochs == 2
    said = "at most 64 training examples (of cola all), mrpc, cola in bfloat16, 1 epochs (cola 2), gates start after"
    assert training_of(given) == f"{said} 40% of the steps, under a KL with weight 0.1"


def test_lora_without_dropout_has_none_where_the_others_are_quantized_and_no_budget(tmp_path):
    study = cells(tmp_path)
    control, lora, uniform = (study.config("sst2", 0, method, BUDGET) for method in ("no_dropout", "lora", "uniform"))
    assert (control.gated_dropout, lora.gated_dropout, uniform.gated_dropout) == (False, None, False)
    assert dataclasses.replace(control, gated_dropout=None) == lora


def test_the_page_compares_lora_without_dropout_with_lora():
    rows = []
    for method in ("lora", "no_dropout"):
        cell = json.loads((KEPT / f"sst2-0-full-{method}.json").read_text("utf-8"))
        names = {"task": "sst2", "seed": 0, "budget": None, "method": method, "share": 1.0}
        rows.append({**names, "cell": cell, **cell["summary"], **names})
    _, _, *lines = differences(rows).splitlines()
    accuracies = [row["deployed"]["metric"]["value"] for row in rows]
    assert len(lines) == 1 and lines[0].startswith(
        f"| sst2 | 32 bit | `no_dropout` | `lora` | 1 | {accuracies[1] - accuracies[0]:+.3f} ["
    )


@pytest.mark.parametrize(("named", "more"), [("lora", 0), ("exact_hessian", 1)])
def test_the_page_counts_the_cells_that_it_would_show(named, more, tmp_path, monkeypatch):
    """Those of every method, whichever are named: `--cells` chooses what is trained."""
    monkeypatch.setattr(compare, "BOOTSTRAP", 200)
    given = f"--tasks sst2 --seeds 0 --budgets W4A4 --cells {named} --only_finished --keep {KEPT} --glue_dir nowhere"
    allocation.main([*given.split(), "--report", str(tmp_path / "page.md"), "--figures", str(tmp_path)])
    text = (tmp_path / "page.md").read_text("utf-8")
    finished, every = map(int, re.search(r"(\d+) of (\d+) cells are finished", text).groups())
    shown = text.split("| E[BOPs] |")[1].split("Paired differences")[0]
    assert finished == shown.count("| sst2 |") > 1 and every == len(METHODS) + more
