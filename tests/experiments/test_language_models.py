"""The study of language models: its cells, its page and its figure, on a tiny decoder."""

import json

import pytest
from tiny import save_tiny_decoder

from experiments import language_models

pytest.importorskip("sacrebleu", reason="texts are scored by packages of the extra `decoder`")
pytestmark = pytest.mark.usefixtures("eager")
STUDY = "E2E, SmolLM2"
METHODS = ("lora", "no_dropout", "bops", "nested", "ptq")


def test_cells_are_trained_once_and_the_page_compares_them(tmp_path, monkeypatch):
    decoder, data = save_tiny_decoder(tmp_path / "llama", "llama"), tmp_path / "data" / "e2e"
    data.mkdir(parents=True)
    for name in ("trainset.csv", "devset.csv"):
        rows = (f"name[{x}],{x} is a pub.\n" for x in ("Aromi", "Zizzi", "Cotto", "Strada"))
        (data / name).write_text("mr,ref\n" + "".join(rows))
    small = {"task": "e2e", "backbone": str(decoder), "rank": 2, "max_length": 64, "epochs": 2, "draws": 2,
             "batch_size": 2, "task_settings": {"drawn": 1, "longest": 4}}  # fmt: skip
    monkeypatch.setitem(language_models.STUDIES, STUDY, (METHODS, small))
    line = [
        "--data", str(tmp_path / "data"), "--studies", STUDY, "--output_dir", str(tmp_path / "runs"),
        "--keep", str(tmp_path / "cells"), "--report", str(tmp_path / "page.md"), "--figures", str(tmp_path),
    ]  # fmt: skip
    language_models.main(line)
    cells = {path.name: json.loads(path.read_text()) for path in (tmp_path / "cells").rglob("*.json")}
    assert {*cells} == {f"e2e-smollm2-0-{method}.json" for method in METHODS}
    assert all(str(tmp_path / "data") not in json.dumps(cell) for cell in cells.values())
    page = (tmp_path / "page.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| {STUDY}")]
    assert len(rows) == 5 + 2 + 5 and (tmp_path / "language_models.png").stat().st_size > 0
    (ptq,) = [row for row in rows if row[1] == "ptq" and len(row) > 10]
    assert ptq[8] == "6.2%" and ptq[10].startswith("8.0, 8.0")
    scores = {method: cells[f"e2e-smollm2-0-{method}.json"]["summary"]["deployed"]["nll"] for method in METHODS}
    assert float(ptq[6].split()[0]) == pytest.approx(scores["ptq"] - scores["lora"], abs=1e-3)
    assert float(ptq[7].split()[0]) == pytest.approx(scores["ptq"] - scores["no_dropout"], abs=1e-3)
    first = page
    language_models.main([*line, "--only_finished"])
    assert (tmp_path / "page.md").read_text() == first
