"""The benchmark of deployed models: what it says of its numbers, and that finished rows are kept."""

import json

import pytest

pytest.importorskip("onnxruntime")
from experiments.bench import deployed_page, proxies
from experiments.bench.artefacts import FP32, STATIC, STATIC_OURS, Studied
from experiments.bench.deployed import SIZES, Measuring, Row, Timed
from experiments.bench.proxies import Allocated

SYSTEMS = {FP32: 1.0, STATIC: 0.5, STATIC_OURS: 0.4, "ours, W8A8": 0.41, "ours, latency": 0.6, "ours, packed": 1.1}


def row(system, nll):
    ours = system.startswith("ours")
    kind = "packed" if "packed" in system else "onnx"
    return Row("sst2", system, kind, ours, 30 if ours else 90, 0.1, 200, 100, "accuracy", 0.80, nll, 0.802, 3)


def timed(system, ratio):
    return [Timed(system, 1, batch, length, ratio / 100, ratio / 90, ratio) for batch, length in SIZES]


def allocated(i, name="random"):
    bops, seconds = (i + 1) / 10, [0.3, 0.1, 0.2, 0.4][i]
    predicted = {"bops": bops, "bytes": 100.0 * i, "latency 1 x 32": seconds, "latency 8 x 128": 2 * seconds}
    return Allocated(f"{name} {i}", predicted, {"1 x 32": seconds, "8 x 128": 5 * seconds}, 100 * i + 7)


def test_the_page_says_which_targets_are_met(tmp_path):
    rows = [row(system, 0.45 if "W8A8" in system else 0.5) for system in SYSTEMS]
    times = [x for system, ratio in SYSTEMS.items() for x in timed(system, ratio)]
    told = dict.fromkeys(["hardware", "date", "commit", "epochs", *deployed_page._PACKAGES], "1")
    told |= {"rows": 64, "load": 0.2}
    every = [*(allocated(i) for i in range(4)), allocated(1, "W8A8")]
    page, figures = tmp_path / "pages" / "deployed.md", tmp_path / "figures"
    profiles = {"ours, W8A8": [("MatMul", 3.0, 6), ("others", 1.0, 9)]}
    deployed_page.write(page, figures, rows, times, profiles, every, told, "python x")
    text = page.read_text(encoding="utf-8")
    assert {path.name for path in figures.iterdir()} == {"deployed.png", "proxies.png"}
    lines = {line for line in text.splitlines() if line.startswith("|")}
    for line in (
        f"| ours, W8A8: at no size more than 5% slower than {STATIC} | at most 0.82 of its time | met |",
        f"| ours, latency: at no size more than 5% slower than {STATIC} | at most 1.20 of its time | missed |",
        "| ours, W8A8: at 1 x 32 ≤ 0.40 of fp32 onnxruntime's time | 0.41 | missed |",
        f"| sst2, ours, W8A8: NLL below that of {STATIC} | 0.4500, there 0.5000 | met |",
        "| sst2, ours, packed: ≤ 0.30 of fp32's bytes | 0.33 | missed |",
        "| latency 1 x 32 | time at 1 x 32 | 1.00 | 1.00 |",
        "| bops | bytes of the packed file | 1.00 | 1.00 |",
        "| MatMul | 3.0 | 6 |",
        "| bops | time at 8 x 128 | 0.40 | 0.40 |",
    ):
        assert line in lines
    assert "## On a GPU" in text and "Not tried: larger" in text


def test_correlations_are_of_the_random_allocations_alone():
    found = proxies.correlations([*(allocated(i) for i in range(4)), allocated(0, "W8A8")])
    assert found == proxies.correlations([allocated(i) for i in range(4)])


def test_what_is_finished_is_read_and_not_measured_again(tmp_path):
    measuring = Measuring(Studied("none", tmp_path, 64, 1, (0.1,)), tmp_path / "kept", 1.0, (1,))
    assert measuring._kept("a.json", lambda: {"x": 1}) == {"x": 1}
    assert measuring._kept("a.json", lambda: pytest.fail("measured twice")) == {"x": 1}
    assert json.loads((tmp_path / "kept" / "a.json").read_text()) == {"x": 1}
