"""Completion in a shell: flags, choices, names and settings of what is chosen, without torch."""

import os
import subprocess
import sys

import pytest

from pyro_blora.__main__ import COMMANDS
from pyro_blora.config import METHODS
from pyro_blora.config.checks import CHOICES


def completed(line, folder=None):
    """What a shell is offered at the end of a line, asked as argcomplete's script for bash asks; and the imports."""
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
        "COMP_LINE": line, "COMP_POINT": str(len(line)),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pyro_blora"],
        env={**os.environ, **asked}, capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pyro_blora.config.completion" in done.stderr
    assert " torch" not in done.stderr and " transformers" not in done.stderr
    return {word.strip() for word in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pyro-blora ", {*COMMANDS}),
        ("pyro-blora tr", {"train"}),
        ("pyro-blora train --lr", {"--lr", "--lr_head", "--lr_gates", "--lr_ranges"}),
        ("pyro-blora train --prior b", {"bops", "budget"}),
        ("pyro-blora train --preset d", {"demo"}),
        ("pyro-blora train --method bayesian_", {name for name in METHODS if name.startswith("bayesian_")}),
        ("pyro-blora train --scope=e", {"--scope=encoder", "--scope=encoder+head"}),
        ("pyro-blora train --choose_epoch t", {"true"}),
        ("pyro-blora train --lr 1", set()),
        ("pyro-blora train --prior.r", {"--prior.rate", "--prior.rank_rate"}),
        ("pyro-blora train --prior budget --prior.b", {"--prior.bops"}),
        ("pyro-blora train --preset blora_xs --weights.b", {"--weights.burn_in"}),
        ("pyro-blora train --preset nothing --prior.ra", {"--prior.rate", "--prior.rank_rate"}),
        ("pyro-blora train --prior.g d", {"depth"}),
        ("pyro-blora what-if runs/x 0.query.base.8 o", {"open"}),
        ("pyro-blora train --if_finished s", {"show"}),
    ],
)
def test_a_line_is_completed(line, offered):
    found = completed(line)
    assert offered <= found if line.endswith(" ") else found == offered


def test_every_choice_is_offered():
    assert set(CHOICES["average_over"]) <= completed("pyro-blora train --average_over ")


def test_folders_and_files_are_completed(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "rule.py").touch()
    (tmp_path / "films.csv").touch()
    assert completed("pyro-blora train --data f", tmp_path) == {"films.csv"}
    assert completed("pyro-blora show r", tmp_path) == {"runs/"}
    assert completed("pyro-blora train --output_dir r", tmp_path) == {"runs/"}
    assert completed("pyro-blora train --prior ru", tmp_path) == {"rule.py", "runs/"}
