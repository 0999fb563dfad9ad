"""What a script says that refuses its command."""

import sys

import pytest

from experiments.studies.scripts import run_script


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs a script's main on these words, which must end with exit code 2 and one sentence; returns the sentence."""

    def run(main, *words, script: str = "script.py") -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert ended.value.code == 2 and line.startswith(f"{script}: error: ")
        return line

    return run
