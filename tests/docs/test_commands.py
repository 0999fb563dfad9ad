"""Every command that README and docs/ show can be typed: flags, settings, scripts and make targets are there."""

import contextlib
import io
import re
import runpy
import shlex
import sys

import pytest
from pages import GUIDES, ROOT, blocks, prose

from pyro_blora.__main__ import COMMANDS as COMMAND_NAMES
from pyro_blora.__main__ import _parser
from pyro_blora.build import check_names
from pyro_blora.config import OWNERS, RunConfig
from pyro_blora.config.command_line import run_fields, take_settings


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every line of a shell block and of every command inside a sentence, comments left out."""
    found = []
    for page in GUIDES:
        lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`((?:python experiments/|pyro-blora )[^`]+)`", " ".join(prose(page).split()))
        for line in lines:
            if words := shlex.split(line.replace("…", "..."), comments=True):
                found.append((page, words))
    return found


COMMANDS = commands()
OURS = [(page, words[words.index(name) + 1 :]) for page, words in COMMANDS for name in words
        if name in ("pyro-blora", ".venv/bin/pyro-blora", "pyro_blora")]  # fmt: skip
SCRIPTS = [(page, words[words.index("python") + 1 :]) for page, words in COMMANDS
           if "python" in words and words[words.index("python") + 1].startswith("experiments/")]  # fmt: skip


def test_commands_are_found():
    assert len(OURS) > 30 and len(SCRIPTS) > 10


@pytest.mark.parametrize(("page", "words"), OURS, ids=[" ".join(words)[:60] for _, words in OURS])
def test_a_command_line_is_understood(page, words):
    if len(words) == 1 or "--help" in words:  # a sentence about the command
        assert words[0] in COMMAND_NAMES
        return
    settings, rest = take_settings(words) if words[0] == "train" else ({}, words)
    arguments, unknown = _parser().parse_known_args(rest)
    assert unknown == []
    settings = {name: x for name, x in settings.items() if name not in ("prior.file", "prior.run")}  # of the reader's
    if arguments.command == "train" and "prior.costs" not in settings:  # a table of the reader's machine
        config = RunConfig(**run_fields(arguments, settings))
        of_the_reader = [getattr(config, kind) for kind in OWNERS] + [f"{config.task_settings.get('data')}:"]
        if "choice_dir" not in config.task_settings and not any(
            ".py:" in name or ".csv:" in name for name in of_the_reader
        ):  # files that the reader has
            check_names(config)


@pytest.mark.parametrize(("page", "words"), SCRIPTS, ids=[" ".join(words)[:60] for _, words in SCRIPTS])
def test_a_script_has_the_flags_that_are_shown(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [words[0], "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    shown = set(re.findall(r"--\w+", printed.getvalue()))
    assert {word for word in words if word.startswith("--")} <= shown
    files = [word for word in words[1:] if re.match(r"(experiments|analysis)/", word) and "*" not in word]
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_targets_of_make_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {words[1] for _, words in COMMANDS if words[0] == "make"}
    assert {"run", "test", "docs"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
