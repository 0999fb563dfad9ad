"""The study of levers: what a lever changes, which LoRA its runs go on from, and what is compared."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from experiments.studies.allocations import Budget
from experiments.studies.levers import ALL, ALONE, BEFORE, LEVERS, NONE, LeverCells
from experiments.studies.levers_page import compared, figure, table, to_lora

OPTIONS = argparse.Namespace(
    glue_dir="glue", backbone="demo", max_train=64, all_rows=[], bf16=[], twice=[], epochs=1, kl_warmup=0.7, draws=2,
    output_dir="runs", keep=Path("kept"), without=Path("without"), seeds=[0], granularity="tensor",
    bit_widths="2,4,8,16,32",
)  # fmt: skip
BUDGET = Budget("W4A4", 0.04, "fixed", {"bits": 4, "activation_bits": 4})


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_changes_what_it_says_and_nothing_else(lever):
    with_lever, without = (LeverCells(OPTIONS, name).config("sst2", 1, "budget", BUDGET) for name in (lever, NONE))
    for field in without.__dataclass_fields__:
        expected = LEVERS[lever].get(field, getattr(without, field))
        assert getattr(with_lever, field) == expected, field


def test_runs_with_any_lever_go_on_from_the_same_lora():
    plain = LeverCells(OPTIONS, NONE).lora("sst2", 1)
    same = {*LEVERS} - {"adapters", "rank"}
    assert all(LeverCells(OPTIONS, lever).lora("sst2", 1) == plain for lever in same)
    assert {LeverCells(OPTIONS, lever).path("sst2", 1, "lora").parent for lever in same} == {Path("without")}
    own = LeverCells(OPTIONS, "adapters")  # another network from its first step on
    assert own.lora("sst2", 1) == dataclasses.replace(plain, target_modules="all-linear")
    assert own.path("sst2", 1, "lora").parent == own.folder != Path("without")
    assert LeverCells(OPTIONS, "rank").lora("sst2", 1) == dataclasses.replace(plain, rank=24, alpha=48.0)
    assert {field for changes in ALONE.values() for field in changes} == {*LEVERS[ALL], *BEFORE}


def test_cells_without_a_lever_are_those_of_the_allocation_study():
    paths = [LeverCells(OPTIONS, lever).path("sst2", 1, "budget", BUDGET) for lever in (NONE, "smoothing")]
    assert paths == [Path("without/sst2-1-W4A4-budget.json"), Path("kept/smoothing/sst2-1-W4A4-budget.json")]


def row(lever, seed, decisions, nll):
    """A cell of four examples, labelled 0, 1, 1, 1."""
    examples = {"label": [0, 1, 1, 1], "deployed_decision": decisions, "deployed_log_likelihood": [-nll] * 4}
    score = sum(a == b for a, b in zip(decisions, [0, 1, 1, 1], strict=True)) / 4
    return {
        "task": "sst2", "budget": "W4A4", "method": "uniform", "lever": lever, "seed": seed,
        "cell": {"examples": examples}, "metric": {"name": "accuracy"},
        "deployed": {"metric": {"value": score}, "nll": nll}, "bops": {"deployed": {"model_ratio": 0.04}},
    }  # fmt: skip


def test_a_difference_is_paired_with_the_same_seed_without_a_lever(tmp_path):
    rows = [row(NONE, 0, [0, 1, 1, 0], 0.5), row(NONE, 1, [0, 0, 0, 0], 0.9), row("smoothing", 0, [0, 1, 1, 1], 0.4)]
    told = compared(rows).splitlines()
    assert len(told) == 3 and told[-1].startswith("| sst2 | W4A4 | `uniform` | smoothing | 1 | +0.250 [")
    assert told[-1].endswith("| -0.100 [-0.100, -0.100] |")
    assert "| sst2 | W4A4 | `uniform` | none | 2 | 0.500 ± 0.354 | 0.700 ± 0.283 | 4.00% |" in table(rows)
    loras = [
        row(NONE, 0, [0, 1, 1, 1], 0.1) | {"method": "no_dropout", "budget": None},
        row("smoothing", 0, [0, 0, 1, 1], 0.1) | {"method": "lora", "budget": None},
    ]
    plain, smoothed = to_lora([*rows, *loras]).splitlines()[2:]
    assert plain.startswith("| sst2 | W4A4 | `uniform` | none | 2 | -0.250 [") and plain.endswith("] |  |")
    assert smoothed.startswith("| sst2 | W4A4 | `uniform` | smoothing | 1 | +0.000 [+0.000, +0.000] | +0.250 [")
    figure(rows, tmp_path / "levers.png")
    assert (tmp_path / "levers.png").stat().st_size > 1000


def cells_of(glue_dir, keep, **changes):
    return LeverCells(argparse.Namespace(**{
        **vars(OPTIONS), "glue_dir": str(glue_dir), "without": keep, "only_finished": False, **changes,
    }), NONE)  # fmt: skip


def test_the_layout_that_is_kept_is_that_of_the_model(glue_dir, tmp_path):
    mine = cells_of(glue_dir, tmp_path, max_train=4000)
    assert mine.layout_and_rows("sst2") == (
        found := cells_of(glue_dir, tmp_path, max_train=4000).layout_and_rows("sst2")
    )
    kept = cells_of("nowhere", Path(__file__).resolve().parents[2] / "benchmarks/cells/allocation", max_train=4000)
    kept.options.epochs, kept.options.kl_warmup = 2.0, 0.4
    assert kept.layout_and_rows("sst2") == found


def test_the_layout_of_another_run_is_not_taken(glue_dir, tmp_path):
    cells_of(glue_dir, tmp_path).layout_and_rows("rte")
    before = (tmp_path / "rte.layout.json").read_text()
    layout, rows = cells_of(glue_dir, tmp_path, max_train=32, bit_widths="4,8,32").layout_and_rows("rte")
    assert rows == 32 and layout.ladder == (4, 8, 32)
    assert (tmp_path / "rte.layout.json").read_text() == before
    assert cells_of("nowhere", tmp_path, seeds=[1]).layout_and_rows("rte")[1] == 64
    cells_of(glue_dir, tmp_path, only_finished=True).layout_and_rows("mrpc")
    assert not (tmp_path / "mrpc.layout.json").exists()
