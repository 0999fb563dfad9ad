"""The noise of what gates learned: after how many steps it is half of what decides, and whose runs are refused."""

import pytest
import torch
from tiny import save_tiny_backbone, tiny_config

from experiments.gate_noise import Noise, main, noise_of
from pyro_blora.checkpoint import read_tensors
from pyro_blora.run import train_run
from pyro_blora.training.natural_gradient import standard_error

pytestmark = pytest.mark.usefixtures("eager")


def test_the_error_falls_with_the_square_root_of_the_steps():
    noise = Noise("input", "2 to 4 bit", 100, factor=5.0, learned=4.0, price=3.0, distance=2.0, error=2.0)
    assert noise.enough == 400  # a half of the error, which is then half of the distance
    assert noise._replace(error=1.0).enough == 100


def test_it_is_read_from_a_runs_checkpoint_and_refused_where_gates_did_not_learn(tmp_path):
    backbone = save_tiny_backbone(tmp_path / "backbone")
    folder = train_run(tiny_config(backbone, output_dir=str(tmp_path)))
    found = noise_of(folder)
    kept = read_tensors(folder / "checkpoints" / "state.safetensors")[0]
    state = {key: kept[f"{key}/gate_guide.z_evidence"] for key in ("step", "start", "mean", "variance")}
    first = found[0]
    assert (first.tensor, first.rung, first.steps) == ("input", "2 to 4 bit", int(state["step"]))
    assert first.error == pytest.approx(standard_error(state)[0, :, 0, 0].median().item())
    assert first.factor == pytest.approx(state["start"][0, :, 0, 0].median().item())
    assert all(torch.tensor(noise[3:]).isfinite().all() for noise in found)
    with pytest.raises(ValueError, match="no averages of natural gradients"):
        noise_of(train_run(tiny_config(backbone, prior="budget", output_dir=str(tmp_path))))


def test_a_run_that_is_not_there_is_one_sentence(refusal, tmp_path):
    assert "none" in refusal(main, tmp_path / "none")
