"""`mkdocs build --strict` makes a site that loads nothing from elsewhere and whose references are complete."""

import dataclasses
import re
import socket

import pytest
from pages import ROOT, read

pytest.importorskip("material", reason="the site's generator is not installed: pip install -e '.[docs]'")

from mkdocs.commands.build import build
from mkdocs.config import load_config

from pyro_blora.config import RunConfig


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; it is built without a network."""

    def refuse(*_):
        raise AssertionError("the site's build asks the network")

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))  # raises for a warning
    return folder


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=\"?([^\s\">]+)", text)
        assert len(loaded) > 3, page.name
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], page.name


def test_the_reference_of_the_command_line_has_every_flag(site):
    page = (site / "reference/command-line.html").read_text(encoding="utf-8")
    flags = [field.name for field in dataclasses.fields(RunConfig) if not field.name.endswith("_settings")]
    assert [flag for flag in flags if not re.search(rf"<code>--{flag}[ <]", page)] == []
    assert "what-if" in page and "if_finished" in page


def test_what_can_be_named_is_printed_by_the_commands(site):
    page = (site / "reference/choices.html").read_text(encoding="utf-8")
    for name in ("prior.denominator", "guide.components", "weights.burn_in", "qat_lora", "matthews_correlation"):
        assert name in page


def test_every_module_is_in_the_reference(site):
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "pyro_blora").rglob("*.py")}
    internal = {"pyro_blora", "pyro_blora.__main__", "pyro_blora.lazily", "pyro_blora.old_names"}  # how names are found
    expected = {module.removesuffix(".__init__") for module in modules} - internal
    assert [module for module in sorted(expected) if f'id="{module}"' not in text] == []


def test_every_page_can_be_reached_from_the_navigation():
    listed = read("mkdocs.yml")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    pages += [path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.md")]
    assert [page for page in pages if page not in listed] == []
