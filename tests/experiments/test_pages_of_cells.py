"""A page of benchmarks/ is what its command writes from the cells that are kept, digit by digit."""

import importlib
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("fewest_bops", "language_models", "levers", "ranks", "settling")


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_what_its_command_writes(page, tmp_path, monkeypatch):
    """Without data and models."""
    monkeypatch.chdir(ROOT)
    before = sorted(Path("benchmarks").rglob("*"))
    written = Path(f"benchmarks/{page}.md").read_text(encoding="utf-8")
    command = written.split("```sh\n")[1].split("```")[0].replace("\\\n", " ")
    _, script, *words = shlex.split(command)
    places = {"GLUE": str(tmp_path), "DATA": str(tmp_path), "benchmarks/figures": str(tmp_path)}
    words = [places.get(word, word).replace(f"benchmarks/{page}.md", str(tmp_path / f"{page}.md")) for word in words]
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    main([*words, "--only_finished", "--output_dir", str(tmp_path / "runs")])
    assert (tmp_path / f"{page}.md").read_text(encoding="utf-8") == written
    assert not (tmp_path / "runs").exists() and sorted(Path("benchmarks").rglob("*")) == before
