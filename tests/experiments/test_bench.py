"""The benchmark: rivals compute what they are said to, ratios and goals are read the right way round."""

import json

import pytest
import torch

from experiments.bench import page, quantizers, sharing, subjects
from experiments.bench.networks import Setting, adalora_step, gated_step, lora_step, program_of, some_draws
from experiments.bench.timing import Row, compared, in_turn, spread
from pyro_blora.quantizer import quantize

pytestmark = pytest.mark.usefixtures("eager")
SMALL = {"layers": 1, "batch": 2, "length": 16, "rank": 4}


def test_the_ladder_and_the_quantizer_compute_the_same():
    x, value_range, gates, upstream = quantizers._inputs("cpu", torch.float64)
    x, upstream = x[:8].detach().requires_grad_(), upstream[:8]
    value_range, gates = (t.detach().double().requires_grad_() for t in (value_range, gates))
    inside = x.detach().abs() < 0.999 * value_range.detach()  # the benchmark's ladder clips at the range itself
    outs = quantize(x, value_range, gates), quantizers.residual_ladder(x, value_range, gates)
    torch.testing.assert_close(outs[0][inside], outs[1][inside], atol=1e-9, rtol=0)
    ours, theirs = (torch.autograd.grad((out * upstream)[inside].sum(), (x, value_range, gates)) for out in outs)
    for slope, expected in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(slope, expected, atol=1e-8, rtol=1e-8)
    later = torch.linalg.vector_norm(ours[2][1:] - theirs[2][1:])
    assert later < 1e-8  # the ladder's first gate multiplies nothing else


def test_every_function_runs_as_often_as_every_other_and_in_turn():
    order = []
    taken = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, seconds=0.0)
    rounds = len(taken["a"])
    assert rounds == len(taken["b"]) == 5 and len(order) == 2 * (rounds + 2)
    assert ["".join(order[i : i + 2]) for i in range(4, len(order), 2)] == ["ab", "ba", "ab", "ba", "ab"]


def test_a_ratio_is_that_of_each_round_and_a_goal_is_met_on_its_side():
    taken = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 8.0, 8.0]}
    row = compared("s", taken, "ours", "theirs", goal=0.6)
    assert row.ratio[0] == 0.5 and row.value[0] == 2000 and row.met
    assert compared("s", taken, "ours", "theirs", goal=0.4).met is False
    fast = compared("s", taken, "ours", "theirs", goal=1.9, faster=True)
    assert fast.figure[0] == 2.0 and fast.met and fast.figure[1] <= fast.figure[0] <= fast.figure[2]
    assert compared("s", taken, "ours", "theirs", goal=2.1, faster=True).met is False
    assert compared("s", taken, "ours", "theirs").met is None
    assert spread([3.0]) == (3.0, 3.0, 3.0)


def test_the_page_names_what_was_missed_and_not_taken(tmp_path):
    three = (2.0, 2.0, 2.0)
    rows = [
        Row("Training step", "gated", "PEFT LoRA", "ms", three, three, (1.0, 1.0, 1.0), goal=1.25),
        Row("Peak memory of training", "wide", "PEFT LoRA", "MiB", three, three, (1.5, 1.5, 1.5), goal=1.15),
        Row("Pyro's overhead", "36 projections", None, "ms", three, None, None, goal=1.0),
        Row("Step by layers", "gated", "PEFT LoRA", "ms", three, three, (1.0, 1.0, 1.0), at=6),
    ]
    page.write(tmp_path / "out", tmp_path / "b.md", tmp_path / "f", rows, page.machine("cpu"), ["a GPU"], "command")
    text = (tmp_path / "b.md").read_text()
    assert "1.25 ✓" in text and "1.15 ✗" in text and "](f/growth.png)" in text and (tmp_path / "f/growth.png").exists()
    missed = text.split("## Goals that were missed")[1]
    assert "wide against PEFT LoRA, peak memory of training" in missed and "gated" not in missed
    assert "- 36 projections, pyro's overhead: " in missed
    assert missed.split("## Not taken on this machine")[1].strip() == "- a GPU"
    assert [row["met"] for row in json.loads((tmp_path / "out/benchmark.json").read_text())["rows"]] == [
        True,
        False,
        False,
        None,
    ]


@pytest.mark.parametrize(("backbone", "precision"), [("minilm", "float32"), ("minilm", "bf16"), ("deberta", "bf16")])
def test_every_kind_of_step_runs_on_either_backbone(backbone, precision):
    """DeBERTaV3 in bfloat16 is what a GPU gets: the same code, on fewer layers."""
    setting = Setting(backbone=backbone, precision=precision, **SMALL)
    shared = gated_step(setting, share_inputs=True)
    for step in (gated_step(setting), shared, lora_step(setting), adalora_step(setting)):
        step()
        step()


def test_draws_of_few_distinct_allocations_are_few_forwards(monkeypatch):
    program = program_of(Setting(**SMALL))
    gates, forwards = some_draws(program, 7, distinct=3), []
    inner = program.net.forward
    monkeypatch.setattr(program.net, "forward", lambda **batch: forwards.append(1) or inner(**batch))
    subjects.predict(program, [Setting(**SMALL).examples()], gates=gates)
    assert len(gates.z) == 7 and len(forwards) == 3


def test_a_step_is_timed_in_the_process_that_shares_the_machine(capsys):
    sharing.one_process(2)
    assert [float(line) > 0 for line in capsys.readouterr().out.split()] == [True, True]
