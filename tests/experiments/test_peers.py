"""What peers allocate by is measured of the runs that are then trained, with a lever as without."""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_backbone

from experiments.studies import greedy, peers
from experiments.studies.allocations import uniform_budget
from experiments.studies.integer_program import cheapest
from experiments.studies.levers import NONE, LeverCells
from pyro_blora.bops import expected_bops
from pyro_blora.config import RunConfig
from pyro_blora.testing import example_layout

pytestmark = pytest.mark.usefixtures("eager")
KEPT = Path(__file__).resolve().parents[2] / "benchmarks/cells/allocation"
SEVEN = (2, 3, 4, 6, 8, 16, 32)


def share(layout, gates):
    return expected_bops(layout, *gates).model_ratio.item()


@pytest.fixture(scope="module")
def options(glue_dir, tmp_path_factory):
    """Of small runs: trunks are shared, and so is what is measured at them."""
    folder = tmp_path_factory.mktemp("levers")
    return argparse.Namespace(
        glue_dir=str(glue_dir), backbone=str(save_tiny_backbone(folder / "tiny", letters=True)), max_train=64,
        all_rows=[], bf16=[], twice=[], epochs=1, kl_warmup=0.4, draws=2, output_dir=str(folder / "runs"),
        keep=folder / "kept", without=folder / "without", seeds=[0], granularity="tensor", bit_widths="2,4,8,16,32",
        only_finished=False,
    )  # fmt: skip


@pytest.mark.parametrize("lever", ["rungs", "granularity", "all"])
def test_peers_measure_the_runs_of_a_lever_at_the_lora_of_all(lever, options):
    cells = LeverCells(options, lever)
    layout, _ = cells.layout_and_rows("wnli")
    budget = cells.uniform("wnli", "W4A8")
    cell = cells.cell("wnli", 0, "hessian", budget)
    assert cell["summary"]["bops"]["deployed"]["model_ratio"] <= budget.share
    assert len([*Path(options.output_dir).glob(".trunk-*")]) == 1
    known = json.loads((cells.folder / "wnli-0-hessian.measured.json").read_text())
    of_ladders = ("bit_widths", "granularity", "smoothing")
    assert [known["lora"][name] for name in of_ladders] == [cell["config"][name] for name in of_ladders]
    found = torch.tensor(known["sensitivities"])[layout.z_mask]
    assert found.shape[-1] == len(layout.ladder) and bool((found[..., 0] >= found[..., -2]).all())


def test_smoothing_and_ranges_of_channels_are_measured(options):
    """Other errors of base weights at 2 bit than without a lever, from the same LoRA."""
    found = []
    for lever in (NONE, "granularity", "smoothing"):
        cells = LeverCells(options, lever)
        peers.measure("hessian", cells.opened("wnli", 0), cells.lora("wnli", 0), cells.folder, "wnli-0")
        known = json.loads((cells.folder / "wnli-0-hessian.measured.json").read_text())
        found.append(torch.tensor(known["sensitivities"])[:, 1, 0])
    assert all(bool((a != b).all()) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("method", ["hessian", "greedy"])
def test_what_was_measured_with_other_rungs_is_refused(method):
    five = example_layout()
    seven = dataclasses.replace(five, ladder=SEVEN)
    increments = {m: 1.0 / (1 + m.depth) for m in greedy.closings(five)}
    path = greedy.closing_path(five, dict(increments))
    with pytest.raises(ValueError, match=r"measure (them|it) with .*bit widths,? 2,3,4,6,8,16,32"):
        if method == "hessian":
            cheapest(seven, torch.rand(*five.z_shape[:2], 5), 0.5)
        else:
            greedy.allocation_at(seven, path, increments, 0.5)


def test_what_is_kept_of_no_lever_is_still_read(tmp_path, options):
    """The repository's files; the greedy table of one that is made again is the one that is kept."""
    usual = {
        "glue_dir": "nowhere", "backbone": RunConfig().backbone, "max_train": 4000, "epochs": 2.0,
        "all_rows": ["cola"], "twice": ["cola"], "bf16": ["mrpc", "cola"],
    }  # fmt: skip
    cells = LeverCells(argparse.Namespace(**{**vars(options), **usual, "without": KEPT}), NONE)
    files = sorted(KEPT.glob("*.measured.json"))
    assert files
    for path in files:
        task, seed, method = path.name.split(".")[0].split("-")
        tables = sorted(KEPT.glob(f"{task}-{seed}-W*-{method}.widths.json"))
        assert tables
        for table in tables:
            kept, budget = json.loads(table.read_text()), cells.uniform(task, table.name.split("-")[2])
            assert cells.config(task, int(seed), method, budget).prior_settings == {"widths": kept}
        if method == "greedy":
            (tmp_path / path.name).symlink_to(path)
            cells.folder = tmp_path
            assert cells.config(task, int(seed), method, budget).prior_settings == {"widths": kept}
            cells.folder = KEPT


def test_the_smallest_budget_has_the_lowest_widths():
    layout = example_layout()
    least = uniform_budget("W2A2", layout).share
    for bops in (least, least * (1 + 1e-7)):
        gates = cheapest(layout, torch.rand(*layout.z_shape[:2], 5), bops)
        assert bool((gates.z == 0).all()) and bool((gates.g == 1).all())
        assert share(layout, gates) <= bops
    above = cheapest(layout, torch.rand(*layout.z_shape[:2], 5), least * 1.001)
    assert least < share(layout, above) <= least * 1.001


def test_a_program_without_a_solution_in_time_is_one_sentence(monkeypatch):
    layout = example_layout()
    monkeypatch.setattr("experiments.studies.integer_program.SECONDS", 0.0)
    with pytest.raises(ValueError, match="give a larger budget"):
        cheapest(layout, torch.rand(*layout.z_shape[:2], 5), uniform_budget("W4A8", layout).share)
