"""Steps without a finite gradient: left out on the device, counted, and a stop that names the batch."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_backbone, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_blora.report import write_report
from pyro_blora.run import train_run
from pyro_blora.tasks.batching import epoch_order
from pyro_blora.training import fit
from pyro_blora.training.loop import _Loop
from pyro_blora.training.non_finite import FiniteSteps

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def poisoned(monkeypatch):
    """Make the gradient of some steps (from 0) not finite, on its way to one parameter."""
    step_of, chosen = _Loop._optimizer_step, {}

    def step(self, number, *arguments):
        value, which = chosen.get(number, (1.0, "head"))
        target = self.program.net.head_parameters()[-1] if which == "head" else self.program.net.log_range
        hook = target.register_hook(lambda gradient: gradient * value)
        step_of(self, number, *arguments)
        hook.remove()

    monkeypatch.setattr(_Loop, "_optimizer_step", step)
    return chosen


def states(folder):
    return [load_file(folder / "checkpoints" / f"state{name}.safetensors") for name in (".previous", "")]


@pytest.mark.parametrize(("which", "value"), [("head", math.nan), ("ranges", math.inf)])
def test_a_step_without_a_finite_gradient_changes_nothing_that_is_learned(backbone, tmp_path, poisoned, which, value):
    poisoned[4] = value, which
    left = fit(tiny_config(backbone, checkpoint_steps=1), folder=tmp_path, quiet=True, until=5)
    before, after = states(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(x, after[key]) for key, x in before.items())
    assert [line.get("skipped_steps", 0) for line in left.metrics] == [0, 0, 0, 0, 1]
    assert math.isfinite(left.metrics[4]["grad_norm"]) == (which == "ranges")
    lines = fit(tiny_config(backbone, checkpoint_steps=1), folder=tmp_path, quiet=True).metrics
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    before, after = states(tmp_path)
    assert any(not torch.equal(x, after[key]) for key, x in before.items())


def test_a_resumed_run_remembers_what_was_left_out(backbone, tmp_path, poisoned):
    poisoned[1] = math.nan, "head"
    config = tiny_config(backbone)
    whole = fit(config, folder=tmp_path / "whole", quiet=True)
    fit(config, folder=tmp_path / "cut", quiet=True, until=4)
    fit(config, folder=tmp_path / "cut", quiet=True)
    assert whole.metrics[-1]["skipped_steps"] == 1
    one, two = (states(tmp_path / name)[1] for name in ("whole", "cut"))
    assert all(torch.equal(x, two[key]) for key, x in one.items())
    logs = [
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert str(logs[0]) == str(logs[1])  # nan is not equal to itself


def test_too_many_in_a_row_stop_a_training_that_keeps_its_last_good_state(backbone, tmp_path, poisoned):
    """Ten are tolerated by default, and at most a quarter of all steps."""
    config = tiny_config(backbone)
    poisoned.update({number: (math.inf, "head") for number in range(3, 8)})
    rows = ", ".join(str(i) for i in epoch_order(64, 16, 1, 0, 0)[3])
    with pytest.raises(ValueError, match="diverged at step 3") as found:
        fit(config, folder=tmp_path, quiet=True)
    text = str(found.value)
    assert "not finite for 3 steps from there on, and at most 2 are left out" in text
    assert f"training rows {rows}." in text
    assert "Lower --lr" in text and f"Step 3 of 8 is saved in {tmp_path}" in text
    state = load_file(tmp_path / "checkpoints" / "state.safetensors")
    assert all(bool(x.isfinite().all()) for x in state.values())
    poisoned.clear()
    assert fit(config, folder=tmp_path, quiet=True).metrics[-1]["step"] == 8


def test_parameters_that_are_not_finite_are_not_saved(backbone, tmp_path, monkeypatch):
    step_of = _Loop._optimizer_step

    def step(self, number, *arguments):
        step_of(self, number, *arguments)
        if number == 5:
            with torch.no_grad():
                self.program.net.head_parameters()[0][0] = math.inf

    monkeypatch.setattr(_Loop, "_optimizer_step", step)
    with pytest.raises(ValueError, match=r"diverged at step 5: parameter of .*classifier.* is not finite.*Step 3 of 8"):
        fit(tiny_config(backbone), folder=tmp_path, quiet=True)
    state = load_file(tmp_path / "checkpoints" / "state.safetensors")
    assert all(bool(x.isfinite().all()) for x in state.values())


def test_the_allocator_of_adalora_does_not_see_it(backbone, tmp_path, poisoned):
    poisoned[2] = math.nan, "head"
    config = tiny_config(backbone, method="adalora", guide_settings={"target_rank": 2})
    fit(config, folder=tmp_path, quiet=True)
    state = states(tmp_path)[1]
    assert sum("exp_avg_ipt" in key for key in state) and all(bool(x.isfinite().all()) for x in state.values())


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(backbone, monkeypatch):
    """From the gates' start on, in which all terms of the loss count."""
    step_of, reads = _Loop._optimizer_step, []

    def step(self, *arguments):
        with HostReads() as mode:
            step_of(self, *arguments)
        reads.append(mode.count)

    monkeypatch.setattr(_Loop, "_optimizer_step", step)
    fit(tiny_config(backbone), quiet=True)
    begin = {0, 2}  # steps that begin a phase: distributions check what they get, once
    assert len(reads) == 8
    assert all(n <= 1 for step, n in enumerate(reads) if step not in begin)  # transformers asks its mask


def test_the_longest_row_and_its_first_step_are_counted():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    finite = FiniteSteps(3, 100, torch.device("cpu"))
    for step, value in enumerate([1, math.nan, 1, math.inf, math.nan, math.nan, 1, math.nan]):
        parameter.grad = torch.full((2,), float(value))
        with HostReads() as mode:
            finite.step(optimizer, step, parameter.grad.norm(), [])
        assert mode.count == 0
    assert finite.read() == (5, 3, 3) and bool(parameter.isfinite().all())
    other = FiniteSteps(3, 100, torch.device("cpu"))
    other.restore(finite.state)
    assert other.read() == finite.read() and other.state == finite.state
    assert FiniteSteps(10, 8, torch.device("cpu")).tolerated == 2


def test_the_report_warns_of_gradients_that_were_not_finite(backbone, tmp_path, poisoned):
    poisoned[4] = math.inf, "head"
    folder = train_run(tiny_config(backbone, output_dir=str(tmp_path)))
    page = write_report(folder).read_text("utf-8")
    assert "Gradients were not finite: 1 optimizer steps were left out, and 1 of 8 logged lines" in page
    assert "NaN" not in page.split("<script", 1)[0] and "norm" in page


@pytest.mark.parametrize(("value", "left_out"), [(1e30, False), (math.inf, True), (math.nan, True)])
def test_a_large_gradient_is_no_infinite_one(value, left_out):
    """Beside the clipped ones; the square of 1e30 is beyond float32."""
    parameter, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    parameter.grad, other.grad = torch.ones(2), torch.full((2,), value)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    bad = FiniteSteps(10, 100, torch.device("cpu")).step(optimizer, 0, torch.tensor(1.0), [other])
    assert bool(bad) == left_out and bool((parameter == 0).all()) == left_out
