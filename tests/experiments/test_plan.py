"""GPU-hours of a grid: computed by hand here, and the same in the comments of the grids that come along."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.plan import HEAD, STEPS, Plan, main
from experiments.studies.costs import GLUE, Kind, Nearest, Steps, cost_of, kind_of
from pyro_blora.config import RunConfig
from pyro_blora.tasks.glue import TASKS

ROOT = Path(__file__).resolve().parents[2]
MEASURED = Steps(
    card="a card", software="", backbone="b", batch=32, length=128, rank=8, other_s=36,
    kinds={"gated": Kind(recorded_ms=30, eager_ms=300), "PEFT AdaLoRA": Kind(eager_ms=150)},
    nearest={"lora": Nearest("gated", "the same layers"), "adalora": Nearest("PEFT AdaLoRA", "another loop"),
             "dylora": Nearest("gated", "ranks from the host", eager=True)},
)  # fmt: skip


def config(**changes):
    usual = {"task": "sst2", "backbone": "b", "batch_size": 32, "epochs": 2, "precision": "bf16", "draws": 9}
    return RunConfig(**{**usual, **changes})


def test_hours_are_steps_times_what_one_was_measured_to_take():
    cost = cost_of(config(max_length=128), MEASURED)
    steps = 2 * (67_349 // 32)
    assert (cost.steps, cost.ms, cost.source) == (steps, 30, "measured")  # shorter batches are not taken to be faster
    recording = 2 * 16 * 2 * 0.3  # both phases, 16 lengths up to 128, two steps of 300 ms each
    assert cost.training_s == pytest.approx(steps * 0.030 + recording)
    assert cost.evaluation_s == pytest.approx(14 * 10 * 0.1)  # 872 rows by 64, draws and deployed, a third of 300 ms
    assert cost.hours == pytest.approx((cost.training_s + cost.evaluation_s + 36) / 3600)


def test_longer_and_larger_batches_are_scaled_upwards():
    cost = cost_of(config(task="rte", max_length=256, batch_size=64, accumulation=3), MEASURED)  # 240 tokens
    factor = 2 * (240 / 128) ** 2
    assert cost.steps == 2 * (2_490 // 192) and cost.ms == pytest.approx(3 * 30 * factor)
    assert cost.source == f"measured, scaled x {factor:.2f}"
    assert cost.evaluation_s == pytest.approx(3 * 10 * 0.030 / 3 * 2 * factor)  # 277 rows by 128: now the kernels' time
    cut = cost_of(config(task="rte", max_length=100), MEASURED)
    assert cut.ms == 30  # longer inputs than 104 tokens do not occur


@pytest.mark.parametrize(
    ("method", "ms", "source"),
    [("lora", 30, "nearest: gated"), ("adalora", 150, "nearest: PEFT AdaLoRA (eager)"),
     ("dylora", 300, "nearest: gated (eager)")],
)  # fmt: skip
def test_what_was_not_measured_names_what_stands_for_it(method, ms, source):
    cost = cost_of(config(method=method), MEASURED)
    assert (cost.ms, cost.source) == (ms, source)


def test_where_nothing_is_random_there_is_one_forward():
    forwards = {method: cost_of(config(method=method), MEASURED).evaluation_s for method in MEASURED.nearest}
    assert forwards["lora"] == pytest.approx(14 * 0.1) and forwards["dylora"] == pytest.approx(14 * (10 + 8) * 0.1)
    assert forwards["adalora"] == pytest.approx(14 * 0.05 * 2)  # whose kernels' own time is not known: all of it scales


def test_fits_and_held_out_rows_count():
    one, two = (cost_of(config(restarts=n, validation=0.5), MEASURED) for n in (1, 2))
    assert one.steps == 2 * ((67_349 - 33_674) // 32) and two.hours == pytest.approx(2 * one.hours)
    assert one.evaluation_s > 30 * cost_of(config(), MEASURED).evaluation_s


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "acceptability"}, "plan tasks of GLUE"),
        ({"backbone": "demo"}, "measured with b, not with demo: give other --steps"),
        ({"scope": "encoder"}, r"kind 'gated, every projection' was measured: add it.*Known: gated"),
        ({"weights": "gaussian"}, "kind 'gated, weights gaussian'"),
        ({"precision": "float32"}, "kind 'gated, precision float32'"),
    ],
)
def test_what_nothing_is_known_about_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cost_of(config(**changes), MEASURED)


def test_sizes_are_of_all_tasks():
    assert set(GLUE) == set(TASKS)
    assert kind_of(config(share_inputs=True, scope="encoder")) == "gated, shared inputs, every projection"


# --- the files that come along ----------------------------------------------------------------------------------------


def test_the_comments_of_the_grids_say_what_is_computed():
    steps, grids = Steps.read(STEPS), sorted((ROOT / "experiments" / "grids").glob("deberta_*.yaml"))
    assert len(grids) >= 6
    for grid in grids:
        found = HEAD.search(grid.read_text(encoding="utf-8"))
        plan = Plan(grid, steps)
        assert found and found[0] == plan.head(), "python experiments/plan.py experiments/grids/deberta_*.yaml --write"
        assert f"{plan.runs} runs" in grid.read_text(encoding="utf-8").split("axes:")[0]


def test_a_table_of_cells_and_the_comment_are_written(tmp_path, capsys):
    grid = tmp_path / "small.yaml"
    base = "base: {preset: rte}\naxes:\n  method: [lora, dylora]\n  seed: [0, 1]\n"
    grid.write_text(
        f"# Two methods.\n# GPU-hours on a card of\n# two lines:\n#     python experiments/plan.py x\n{base}"
    )
    main([str(grid)])
    page = capsys.readouterr().out
    assert "4 runs" in page and "| lora | 2 | 3,850 |" in page and "- dylora: gated (eager), its rank is drawn" in page
    main([str(grid), "--write"])
    plan, text = Plan(grid, Steps.read(STEPS)), grid.read_text()
    assert text == f"# Two methods.\n{plan.head()}{base}"
    assert plan.hours == pytest.approx(2 * sum(cost.hours for _, _, cost in plan.lines))


def test_mistakes_end_the_command_with_one_sentence(tmp_path, refusal):
    good = json.loads(STEPS.read_text(encoding="utf-8"))
    grid = tmp_path / "small.yaml"
    grid.write_text("base: {preset: rte}\naxes:\n  seed: [0]\n")
    wrong = {
        "no.json": (None, "does not exist: give a file of measured steps"),
        "list.json": ([], "is no file of measured steps"),
        "more.json": ({**good, "colour": 1}, "is no file of measured steps"),
        "zero.json": ({**good, "batch": 0}, "0 is no positive number: correct it"),
        "empty.json": ({**good, "kinds": {**good["kinds"], "gated": {}}}, "kind 'gated' has no step"),
        "lost.json": ({**good, "kinds": {"gated": {"eager_ms": 1.0}}}, "has no step: correct it"),
    }
    for name, (values, message) in wrong.items():
        if values is not None:
            (tmp_path / name).write_text(json.dumps(values))
        assert message in refusal(main, grid, "--steps", tmp_path / name)
    assert "no comment that begins with" in refusal(main, grid, "--write")


def test_a_measured_forward_replaces_the_third_of_a_step():
    kinds = {"gated": dataclasses.replace(MEASURED.kinds["gated"], forward_ms=7)}
    cost = cost_of(config(), dataclasses.replace(MEASURED, kinds=kinds))
    assert cost.evaluation_s == pytest.approx(14 * 10 * 0.007 * 2)
