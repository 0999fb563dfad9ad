"""What every test may ask for: no network, one thread, and the public data where it is present."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import sys
from pathlib import Path

gc.disable()  # until the tests are collected: a million objects that stay would be looked through sixteen times
os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: nothing here may depend on the network

from pyro_blora.machine import spin_briefly

spin_briefly()  # before torch: the tests share the machine with each other

import pytest
import torch
from hypothesis import settings

from pyro_blora import run
from pyro_blora.files import REPORT
from pyro_blora.posterior.arviz_compat import arviz_itself
from pyro_blora.tasks.demo import acceptability
from pyro_blora.training import range_calibration

N_EVAL, CANDIDATES, WRITE_PAGE = acceptability.N_EVAL, range_calibration._CANDIDATES, run._write_page
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
arviz_itself()  # before any test's own import of ArviZ, which can fail beside another process

# The same examples everywhere, and a slow machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # the models are tiny: a second thread waits more than it works


def pytest_configure():
    """Signals that the shell ignores, for nohup or in the background, would stay ignored, as the package promises."""
    for signum, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, usual)


@pytest.fixture(scope="module", autouse=True)
def validated():
    """Distributions check their arguments in every module: torch.compile switches it off for the whole process."""
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public data, `PYRO_BLORA_DATA` or `../shared/data`; its README lists what it holds."""
    folder = Path(os.environ.get("PYRO_BLORA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no public data at {folder}: set PYRO_BLORA_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def glue_dir(data_dir: Path) -> Path:
    """The folder in the official GLUE layout."""
    folder = data_dir / "glue"
    if not folder.is_dir():
        pytest.skip(f"no GLUE release at {folder}")
    return folder


@pytest.fixture(scope="module")
def eager():
    """The quantizer without its compiler, for modules in which speed is not the point."""
    from pyro_blora.quantizer import fake_quantize

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYRO_BLORA_COMPILE", "0")  # of other processes
        patch.setattr(fake_quantize, "_kernels", lambda *_: fake_quantize._EAGER)  # what is compiled stays so
        yield


@pytest.fixture(scope="session", autouse=True)
def short():
    """Runs of the tests try few ranges and have few rows to predict: in eight steps nothing more would be learned.

    Nor do they wait for the disk, fifty times each: a process that is killed loses nothing that the system has taken.
    Their page is empty where no test of the module reads it: it takes a quarter of such a run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(range_calibration, "_CANDIDATES", range_calibration._CANDIDATES[::5])
        patch.setattr(acceptability, "N_EVAL", 120)
        patch.setattr(run, "_write_page", lambda folder: (folder / REPORT).touch())
        yield


@pytest.fixture(scope="module")
def as_shipped():
    """What `short` leaves out, for modules that are about it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_calibration, "_CANDIDATES", CANDIDATES)
        patch.setattr(acceptability, "N_EVAL", N_EVAL)
        yield


def _drawn():
    """The page of a run, which `short` leaves empty: for modules that read it, or that are about kinds of runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_write_page", WRITE_PAGE)
        yield


drawn, drawn_here = pytest.fixture(scope="module")(_drawn), pytest.fixture(_drawn)


@pytest.fixture
def forget():
    """Names that a test registers are taken out again; the package's own stay, whose modules are imported once."""
    from pyro_blora.registries import LISTED

    before = {kind: (dict(registry._functions), dict(registry._entries)) for kind, registry in LISTED.items()}
    yield
    for kind, registry in LISTED.items():
        for held, kept in zip((registry._functions, registry._entries), before[kind], strict=True):
            own = {name: x for name, x in held.items() if registry.has_own(name) and name not in kept}
            held.clear()
            held.update(kept | own)


@pytest.fixture(scope="module", params=["bert", "deberta-encoder", "rank-1"])
def layout(request):
    """Layouts of both scopes, with and without rank gates."""
    from models import tiny_bert, tiny_deberta

    from pyro_blora.layout import AdapterLayout

    if request.param == "bert":
        return AdapterLayout.of(tiny_bert(), rank=4, sequence_length=10)
    if request.param == "rank-1":
        return AdapterLayout.of(tiny_bert(), rank=1, scope="encoder", sequence_length=10)
    return AdapterLayout.of(tiny_deberta(), rank=3, scope="encoder", sequence_length=10)


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window; the test is skipped where there is none."""
    path = os.environ.get("PYRO_BLORA_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or set PYRO_BLORA_CHROMIUM to one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


# Long files first, so that neither of two processes waits for the other's last one.
LONG = ("test_examples", "test_grid", "test_ladder", "test_distributed", "test_xs", "test_run", "test_compare")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))  # stable: the others keep their order


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture
def param_store_stays_empty():
    """Nothing of ours is in Pyro's global store."""
    import pyro

    pyro.clear_param_store()
    yield
    assert not pyro.get_param_store().keys()


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs a script's main on these words, which must end with exit code 2 and one sentence; returns the sentence."""
    from experiments.studies.scripts import run_script

    def run(main, *words, script: str = "script.py") -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        said = capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if not re.match(r"\d\d:\d\d:\d\d ", line)]  # without the phases
        assert ended.value.code == 2 and line.startswith(f"{script}: error: ") and len(line) < 1000
        return line

    return run
