"""The table of GLUE beside published numbers: what its cells say of results, and what they say without any."""

import itertools
from pathlib import Path

import pandas as pd
import pytest

from experiments import glue_table
from experiments.glue_table import BEGIN, END, GRID, PUBLISHED, TASKS, glue_average, main, read, results_section
from experiments.grid import second_score
from experiments.studies.grid_file import read_grid

PAGE = Path(__file__).resolve().parents[2] / "benchmarks" / "deberta_glue.md"
SMALL = "base: {max_train: 64}\naxes:\n  task: [%s]\n  method: [lora, bayesian_lora]\n  seed: [0, 1]\n"


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "small.yaml"
    path.write_text(SMALL % ", ".join(TASKS))
    return path


def row(task, method, seed, score, second=None):
    adapted = 0.05 if method == "bayesian_lora" else 1.0
    return {"task": task, "method": method, "seed": seed, "metric": "accuracy", "score": score, "second_score": second,
            "bops_adapted": adapted, "bops_model": 0.8, "seconds": 3600.0}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """All of LoRA, and of the gates one seed of MNLI and both of QQP."""
    rows = [row(task, "lora", str(seed), 0.8 + 0.02 * seed, 0.7) for task, seed in itertools.product(TASKS, (0, 1))]
    rows += [row("mnli", "bayesian_lora", "1", 0.9, 0.8)]
    rows += [row("qqp", "bayesian_lora", str(seed), 0.9 + 0.04 * seed, 0.8 + 0.02 * seed) for seed in (0, 1)]
    pd.DataFrame(rows).to_parquet(tmp_path / "results.parquet", index=False)
    return tmp_path / "results.parquet"


def cells_of(section, name):
    (line,) = [line for line in section.splitlines() if line.startswith(f"| {name} |")]
    return dict(zip([*TASKS, "average", "adapted", "model"], [x.strip() for x in line.split("|")[2:-1]], strict=True))


def test_the_average_is_formed_as_the_published_one():
    average, scores = PUBLISHED["AdaLoRA (Zhang et al. 2023)"]
    assert round(glue_average(scores), 2) == average == 89.31
    assert glue_average({task: scores[task] for task in list(TASKS)[1:]}) is None


def test_cells_are_means_over_seeds_with_their_standard_error(grid, results):
    section = results_section(read_grid(grid), read(results))
    lora = cells_of(section, "`lora`")
    assert lora["sst2"] == lora["stsb"] == "81.00 ± 1.00"  # 80 and 82: deviation sqrt(2), over sqrt(2)
    assert lora["mnli"] == lora["qqp"] == "81.00 ± 1.00 / 70.00 ± 0.00"
    error = (6 * 1.0**2 + 2 * 0.5**2) ** 0.5 / 8
    assert lora["average"] == f"**{(6 * 81 + 2 * 75.5) / 8:.2f} ± {error:.2f}**"
    assert (lora["adapted"], lora["model"]) == ("100.0%", "80.0%")


def test_what_is_missing_says_so(grid, results):
    section = results_section(read_grid(grid), read(results))
    gated = cells_of(section, "`bayesian_lora`")
    assert gated["mnli"] == "90.00 / 80.00 (1 of 2)" and gated["qqp"] == "92.00 ± 2.00 / 81.00 ± 1.00"
    assert gated["cola"] == gated["average"] == "not run" and gated["adapted"] == "5.0%"
    assert section.endswith("19 of 32 runs are finished, 19.0 hours of training.")


def test_the_page_is_filled_between_its_marks_only(grid, results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    main([str(results), "--grid", str(grid), "--table", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Before\n{BEGIN}\n|") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert results_section(read_grid(grid), read(results)) in text
    results.with_suffix(".csv").write_text(pd.read_parquet(results).to_csv(index=False))
    main([str(results.with_suffix(".csv")), "--grid", str(grid), "--table", str(page)])
    assert page.read_text(encoding="utf-8") == text  # a table of either kind says the same, again and again


def test_mistakes_end_the_command_with_one_sentence(grid, results, tmp_path, refusal):
    table = pd.read_parquet(results)
    table.drop(columns="second_score").to_parquet(tmp_path / "older.parquet")
    pd.concat([table, table[:1]]).to_parquet(tmp_path / "twice.parquet")
    table.assign(method="qat_lora").to_parquet(tmp_path / "other.parquet")
    pd.DataFrame().to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "page.md").write_text("no marks")
    wrong = {
        "none.parquet": "does not exist: it is what experiments/grid.py writes",
        "older.parquet": "has no column 'second_score': give the command of its grid again",
        "empty.parquet": "has no column 'task'",
        "twice.parquet": "run mnli lora 0 is there twice",
        "other.parquet": "run mnli qat_lora 0 is not in the grid: give --grid the file",
        "results.parquet": "has no lines",
    }
    for name, message in wrong.items():
        assert message in refusal(main, tmp_path / name, "--grid", grid, "--table", tmp_path / "page.md")


def test_the_second_number_is_mismatched_accuracy_or_f1():
    mnli = {
        "metric": {"name": "accuracy"},
        "scores": {"accuracy": 0.9},
        "eval_mismatched": {"scores": {"accuracy": 0.8}},
    }
    assert second_score(mnli) == 0.8
    assert second_score({"metric": {"name": "accuracy"}, "scores": {"accuracy": 0.9, "f1": 0.7}}) == 0.7
    assert second_score({"metric": {"name": "accuracy"}, "scores": {"accuracy": 0.9}}) is None


def test_the_page_that_comes_along_has_the_grid_s_methods():
    text, cells = PAGE.read_text(encoding="utf-8"), read_grid(GRID)
    section = text.split(BEGIN)[1].split(END)[0]
    for method in {cell.labels["method"] for cell in cells}:
        assert cells_of(section, f"`{method}`")
    assert {cell.labels["task"] for cell in cells} == set(TASKS) and f"of {len(cells)} runs" in section
    assert glue_table.__doc__.split("\n\n")[1].strip() in text  # the command
