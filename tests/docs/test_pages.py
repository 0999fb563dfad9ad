"""README and docs/: their links lead somewhere, README is short, its numbers are those of the page it names."""

import posixpath
import re

import pytest
from pages import GUIDES, PAGES, ROOT, anchors, prose, read

LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"https://[\w.]+/", link):
            continue
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        is_there = (ROOT / target).exists() and not target.startswith("..")
        if not is_there or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", GUIDES)
def test_paths_in_sentences_are_there(page):
    paths = re.findall(r"`((?:pyro_blora|tests|experiments|benchmarks|analysis|docs)/[\w./]*)`", prose(page))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_links_are_found():
    assert sum(len(LINK.findall(prose(page))) for page in PAGES) > 150
    assert "estimators" in anchors("benchmarks/posterior.md")


def test_readme_has_at_most_150_lines():
    assert len(read("README.md").splitlines()) <= 150


def cells(line: str) -> list[str]:
    return [cell.strip(" `") for cell in line.split("|")[1:-1]]


def test_the_results_in_readme_are_those_of_their_page():
    lines = read("benchmarks/settling.md").splitlines()
    rows = [cells(line) for line in lines if line.startswith(("| sst2", "| stsb"))]
    source = {tuple(row[:3]): row for row in rows if len(row) == 10}  # the first table
    methods = {
        "LoRA": "lora", "dropout off": "no_dropout", "**`--prior budget`**": "start", "everywhere": "uniform",
        "Hessian": "hessian", "moves predictions": "greedy",
    }  # fmt: skip
    at = {"100 %": "32 bit", "5.7 %": "W4A8", "5.0 %": "W3A8", "4.2 %": "W4A4"}
    shown = [cells(line) for line in read("README.md").splitlines() if re.match(r"\| [\d.]+ %", line)]
    assert len(shown) == 13
    levers = [cells(line) for line in read("benchmarks/levers.md").splitlines() if re.match(r"\| (sst2|stsb) ", line)]
    everywhere = {tuple(row[:3]): row for row in levers if row[3] == "adapters" and len(row) == 8}
    for bops, what, sst2, stsb in shown:
        if "every map" in what:
            key = (at[bops], "lora" if bops == "100 %" else "start")
            assert [everywhere[task, *key][5] for task in ("sst2", "stsb")] == [sst2, stsb]
            continue
        (method,) = (name for word, name in methods.items() if word in what)
        for task, score in (("sst2", sst2), ("stsb", stsb)):
            row = source[task, at[bops], method]
            assert row[4] == score
            assert float(row[6].rstrip("%")) == pytest.approx(float(bops.rstrip("% ")), rel=0.03)


@pytest.mark.parametrize("page", ["README.md", "docs/explanation/findings.md"])
def test_the_fewest_bit_operations_that_are_told_are_those_of_their_page(page):
    text, opening = " ".join(read(page).split()), read("benchmarks/fewest_bops.md").split("```")[0]
    found = re.findall(r"(\w+): LoRA's score at (?:no more than )?([\d.]+)%.* ([-+.\d]+) \[(.+?), (.+?)\]\)", opening)
    assert len(found) >= 3
    for task, share, *interval in found:
        mean, low, high = (f"{float(x):.3f}" for x in interval)
        assert f"{mean} [{low}, {high}]" in text, task
        assert f"{float(share):.1f} %" in text, task


NUMBER = r"[-+]?\d*\.?\d+"
INTERVAL = re.compile(rf"(?:({NUMBER}) )?\[({NUMBER}), ({NUMBER})\]")  # 0.1 [0.0, 0.2], or the interval alone
DEVIATION = re.compile(rf"({NUMBER}) ± ({NUMBER})")


def is_told(mine: tuple[str, ...], pages: list[tuple[str, ...]]) -> bool:
    """Whether a page has what is quoted, to the digits of the quotation; turned round where it says "below by"."""
    near = 0.51 * 10 ** -max(len(x.partition(".")[2]) for x in mine)
    either = [each for theirs in pages for each in (theirs, turned(theirs))]
    return any(
        all(not x or (y and abs(float(x) - float(y)) <= near) for x, y in zip(mine, theirs, strict=True))
        for theirs in either
    )


def turned(interval: tuple[str, ...]) -> tuple[str, ...]:
    """The interval of the difference the other way round."""
    mean, high, low = (x and str(-float(x)) for x in interval)
    return mean, low, high


@pytest.mark.parametrize("page", ["README.md", "docs/explanation/findings.md"])
def test_every_interval_is_on_a_page_that_its_section_links_to(page):
    found = 0
    for section in re.split(r"\n(?=## )", read(page)):
        links = re.findall(r"benchmarks/[\w/]+\.md", section)
        text, source = (
            " ".join(x.replace("\N{MINUS SIGN}", "-").split()) for x in (section, " ".join(map(read, links)))
        )
        quoted, pages = ((INTERVAL.findall(x), DEVIATION.findall(x)) for x in (text, source))
        assert [x for x in quoted[0] if not is_told(x, pages[0])] == [], section.splitlines()[0]
        told = [(mean.lstrip("+"), deviation) for mean, deviation in pages[1]]
        assert [x for x in quoted[1] if x not in told] == [], section.splitlines()[0]
        found += len(quoted[0]) + len(quoted[1])
    assert found > 20


def test_old_addresses_lead_on():
    for page in ("docs/reading-the-posterior.md", "docs/scaling.md"):
        assert len(LINK.findall(read(page))) == 1
