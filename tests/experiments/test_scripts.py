"""How a script of experiments/ ends: one sentence, and the exit code of a signal."""

import signal
import sys

import pytest
from tiny import save_tiny_backbone, tiny_config

from experiments.studies.cells import trained
from experiments.studies.scripts import run_script
from pyro_blora.build import build
from pyro_blora.training.loop import _Loop


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs a script's main; returns its exit code and its last line on stderr."""

    def run(main):
        monkeypatch.setattr(sys, "argv", ["study.py"])
        with pytest.raises((SystemExit, KeyboardInterrupt)) as end:  # the latter would end pytest itself
            run_script(main)
        return end.value.code, *capsys.readouterr().err.splitlines()[-1:]

    return run


def test_ctrl_c_ends_a_script_with_a_sentence_and_its_code(ended):
    assert ended(lambda _: signal.raise_signal(signal.SIGINT)) == (130, "study.py: interrupted")
    assert ended(lambda _: 3) == (3,) and ended(lambda _: None) == (None,)


def test_a_study_that_is_ended_in_a_training_says_what_is_kept_and_goes_on_from_there(tmp_path, monkeypatch, ended):
    backbone = save_tiny_backbone(tmp_path / "backbone")
    lora = tiny_config(backbone, output_dir=str(tmp_path / "runs"), method="lora")
    n_train, steps, of_loop = build(lora).program.n_train, [], _Loop._optimizer_step

    def step(self, number, *arguments):
        of_loop(self, number, *arguments)
        steps.append(number)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(_Loop, "_optimizer_step", step)
    code, line = ended(lambda _: trained(lora, lora, n_train) and None)
    assert code == 143 and line.startswith("study.py: interrupted; step 3 of 8 is saved in ")
    assert ended(lambda _: trained(lora, lora, n_train) and None)[0] is None and steps == list(range(8))
