"""The page of a run and of a grid: its numbers, what it says of damage, and how a real browser shows it."""

import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.__main__ import _parser, main
from pyro_blora.arviz_data import group, read
from pyro_blora.bops import expected_bops
from pyro_blora.config import RunConfig
from pyro_blora.diagnostics import Posterior
from pyro_blora.findings import in_words, warnings
from pyro_blora.flags import command_line, run_fields, take_settings
from pyro_blora.methods import METHODS
from pyro_blora.report import write_report
from pyro_blora.run import train_run
from pyro_blora.run_files import RunFiles
from pyro_blora.sections import reliability_bins, sections_of

pytestmark = pytest.mark.usefixtures("eager")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TITLES = ["In plain words", "Gate map", "Ranks", "Calibration", "Bit operations", "Training", "Restarts",
          "Confidently wrong", "Repeat this run"]  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):
    """A finished run with two restarts."""
    return train_run(tiny_config(backbone, draws=6, restarts=2, output_dir=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def copy(run, tmp_path):
    """The same folder, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / run.name))


def text_of(folder):
    return write_report(folder).read_text(encoding="utf-8")


def titles_of(page):
    return re.findall(r"<h2>(.*?)</h2>", page.split("<script>")[0])  # Vega's own text has some


def specs_of(page):
    return json.loads(re.search(r"^const specs = (.*);$", page, re.MULTILINE)[1])


def test_a_run_ends_with_its_page(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert titles_of(page) == TITLES
    assert 'class="missing"' not in page
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page), "the page would need a network"


def test_headline_numbers_are_those_of_the_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    cards = re.findall(r"<div>(.*?)<strong>(.*?)</strong>", (run / "report.html").read_text())
    shown = dict(cards)
    assert float(shown["accuracy"]) == pytest.approx(summary["metric"]["value"], abs=5e-5)
    assert float(shown["NLL"]) == pytest.approx(summary["nll"], abs=5e-5)
    assert float(shown["ECE"]) == pytest.approx(summary["ece"]["value"], abs=5e-5)
    assert float(shown["E[BOPs]"].rstrip("%")) / 100 == pytest.approx(summary["bops"]["adapted_ratio"], abs=5e-5)
    assert shown["adapter"] == f"{summary['adapter_parameters']:,}"


def test_bins_give_the_ece_of_the_summary(run):
    files = RunFiles(run)
    bins = reliability_bins(files)
    ece = (bins["examples"] * (bins["accuracy"] - bins["confidence"]).abs()).sum() / bins["examples"].sum()
    assert ece == pytest.approx(files.summary["ece"]["value"], abs=1e-6)
    assert bins["examples"].sum() == files.summary["n_eval"]


def test_what_is_spent_and_what_is_saved_add_up(run):
    sections = {section.title: section for section in sections_of(RunFiles(run))}
    (spent, _), (saved, _) = sections["Bit operations"].charts
    rows = spent["data"]["values"] if "values" in spent["data"] else next(iter(spent["datasets"].values()))
    ratio = json.loads((run / "summary.json").read_text())["bops"]["adapted_ratio"]
    assert sum(row["share"] for row in rows) == pytest.approx(ratio, rel=1e-5)
    assert sum(row["saving_adapted"] for row in saved["data"]["values"]) == pytest.approx(1 - ratio, rel=1e-5)


def test_the_gate_map_shows_every_tensor_with_its_exact_law(run):
    data = read(run)
    values = [
        layer["data"]["values"] if "data" in layer else None for layer in specs_of(text_of(run))["chart-1-0"]["layer"]
    ]
    cells = next((v for v in values if v), None) or specs_of(text_of(run))["chart-1-0"]["data"]["values"]
    constant = group(data, "constant_data")
    assert len(cells) == int(constant["z_marginal"].isel(chain=0, rung=0).notnull().sum())
    for cell in cells:
        projection, tensor = cell["tensor"].rsplit(".", 1)
        law = np.exp(constant["log_q_width"].sel(projection=projection, tensor=tensor).isel(chain=0).mean("component"))
        assert [float(p) for p in re.findall(r": (\d\.\d\d)", cell["law"])] == pytest.approx(law.values, abs=0.0051)
        opened = constant["z_deployed"].sel(projection=projection, tensor=tensor).isel(chain=0).sum()
        assert cell["width"] == [2, 4, 8, 16, 32][int(opened)]
        assert cell["doubt"] == pytest.approx(1 - float(law[int(opened)]), abs=1e-5)


def test_bops_of_the_page_are_those_of_the_draws(run):
    posterior = Posterior(read(run))
    drawn = group(posterior.data, "posterior")
    z, g = (np.nan_to_num(drawn[site].values[0], nan=1.0) for site in "zg")
    import torch

    brute = expected_bops(posterior.layout, torch.tensor(z), torch.tensor(g)).adapted_ratio
    assert np.allclose(brute, drawn["bops_adapted"].values[0])


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(prior="nested", prior_settings={"rate": 3, "g": "depth"}, target_modules=("query", "value")),
        RunConfig(task="sst2", glue_dir="a folder/glue", guide="mixture", guide_settings={"components": 4}),
        RunConfig(prior_settings={"z": "off"}, gradient_checkpointing=True, kl_warmup=1, target_modules=".*query"),
        RunConfig(lr=3e-5, restarts=3, data_seed=2, tracker="tensorboard", output_dir="elsewhere"),
        *(RunConfig(method=name) for name in METHODS),
    ],
    ids=lambda config: config.folder_name,
)
def test_the_printed_command_is_the_run(config):
    line = shlex.split(command_line(config))
    assert line[:2] == ["pyro-blora", "train"]
    settings, rest = take_settings(line[1:])
    assert RunConfig(**run_fields(_parser().parse_args(rest), settings)) == config


def test_the_command_is_on_the_page(run):
    config = RunConfig.from_json(run / "config.json")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert command_line(config).replace("'", "&#39;") in page


def test_texts_of_examples_cannot_break_the_page(copy):
    table = pd.read_parquet(copy / "predictions.parquet")
    table["sentence"] = "</script><script>alert(1)</script><b>bold</b>"
    table.to_parquet(copy / "predictions.parquet")
    page = text_of(copy)
    assert "<b>bold</b>" not in page and "alert(1)</script>" not in page and "&lt;b&gt;bold" in page


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "posterior.nc").unlink(), "posterior.nc does not exist"),
        (lambda f: (f / "posterior.nc").write_bytes((f / "posterior.nc").read_bytes()[:5000]), "cut short"),
        (lambda f: (f / "posterior.nc").write_text("hello"), "cannot be read"),
        (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl cannot be read"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "no curves"),
        (lambda f: (f / "metrics.jsonl").write_text('{"step": 1'), "metrics.jsonl cannot be read"),
        (lambda f: (f / "predictions.parquet").write_bytes(b"PAR1"), "predictions.parquet cannot be read"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    ],
    ids=["no-posterior", "cut-posterior", "text-posterior", "no-log", "empty-log", "cut-log", "cut-table", "no-config"],
)
def test_what_is_damaged_gets_a_sentence_and_the_rest_its_page(copy, damage, said):
    damage(copy)
    page = text_of(copy)
    assert said in page
    assert titles_of(page) == TITLES
    assert len(specs_of(page)) > 1


def test_a_foreign_posterior_and_one_without_draws_get_a_sentence(copy):
    import xarray

    data = read(copy)
    xarray.Dataset({"x": 1.0}).to_netcdf(copy / "posterior.nc", group="posterior", engine="h5netcdf")
    assert "is not of this version of pyro_blora" in text_of(copy)
    from pyro_blora.arviz_data import container, group_names, save

    emptied = {name: group(data, name) for name in group_names(data)}
    emptied = {name: d.isel(draw=slice(0, 0)) if "draw" in d.dims else d for name, d in emptied.items()}
    (copy / "posterior.nc").unlink()
    save(container(emptied), copy / "posterior.nc")
    assert "has no draws" in text_of(copy)


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "neither a finished run nor a grid" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text('{"task": ')
    assert main(["report", str(tmp_path)]) == 2
    assert "not a finished run" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_grid_with_a_failed_cell_has_its_page(run, tmp_path, capsys):
    grid = tmp_path / "grid"
    shutil.copytree(run, grid / "one")
    shutil.copytree(run, grid / "two")
    (grid / "two" / "summary.json").write_text("{}")
    (grid / "logs").mkdir()
    for name, said in (("one", "fine\n"), ("three", "step 1\nerror: the training diverged at step 3\n")):
        (grid / "logs" / f"{name}.json").write_text("{}")
        (grid / "logs" / f"{name}.txt").write_text(said)
    assert main(["report", str(grid)]) == 0
    page = (grid / "report.html").read_text()
    assert "2 runs of this grid have no result" in page and "the training diverged at step 3" in page
    assert 'href="one/report.html"' in page and len(specs_of(page)) == 1


@pytest.mark.parametrize(
    ("scaled", "plain", "verdict"),
    [
        (0.55, 0.6, "averaging is better by 0.050"),
        (0.45, 0.6, "does not beat"),
        (0.45, 0.5, "nothing was averaged"),
        (0.7, 0.6, "that temperature is of no use here, and averaging gains +0.100"),
    ],
)
def test_words_set_random_weights_beside_a_temperature(run, scaled, plain, verdict):
    summary = json.loads((run / "summary.json").read_text())
    assert "temperature" not in " ".join(in_words(summary))
    summary["deployed"]["nll"] = plain
    summary |= {"nll": 0.5, "weights": {"law": "swag", "random": 96, "stored": 1152, "std": 0.012}}
    assert "--validation 0.1 holds out" in " ".join(warnings(summary, None))
    summary["calibration"] = {"deployed": {"temperature": 1.25, "scaled": {"nll": scaled}}}
    said = " ".join(in_words(summary))
    assert verdict in said and "At 1.25, the temperature" in said and f"has an NLL of {scaled:.3f}" in said
    assert "96 weights of the adapter are random, by law swag, with a standard deviation of 0.012" in said
    assert "--validation" not in " ".join(warnings(summary, None))
    assert "at the end of what was tried" not in " ".join(warnings(summary, None))
    summary["calibration"]["deployed"]["temperature"] = math.exp(4.9999)
    summary["weights"]["prior_precision"] = math.exp(-4.99)
    said = [line for line in warnings(summary, None) if "at the end of what was tried" in line]
    assert len(said) == 2 and "temperature, 148" in said[0] and "prior precision, 0.0068" in said[1]


def test_warnings_name_what_is_wrong(backbone, tmp_path):
    def said(**changes):
        folder = train_run(tiny_config(backbone, output_dir=str(tmp_path), **changes))
        files = RunFiles(folder)
        return " ".join(warnings(files.summary, files.posterior))

    collapsed = said(prior="nested", prior_settings={"rate": 200.0})
    assert "Collapsed" in collapsed and "2 bit" in collapsed and "One fit" in collapsed and "Few draws: 3" in collapsed
    assert "No gate is random" in said(method="lora")
    assert "Prior-dominated" in said(prior="depth", seed=1) and "Collapsed" not in said(prior="depth", seed=2)


def test_the_calibration_section_has_the_scores_of_the_summary(backbone, tmp_path):
    config = tiny_config(backbone, method="lora", weights="dropout", validation=0.25, output_dir=str(tmp_path))
    folder = train_run(config)
    found = json.loads((folder / "summary.json").read_text())["calibration"]
    (section,) = (x for x in sections_of(RunFiles(folder)) if x.title == "Calibration")
    caption, table, shown = section.tables[0]
    assert shown and "dropout masks" in caption
    table = table.set_index("")
    assert list(table) == ["averaged", "averaged, scaled", "deployed", "deployed, scaled"]
    for column, scores in (("averaged", found["averaged"]), ("deployed, scaled", found["deployed"]["scaled"])):
        assert table[column]["NLL"] == round(scores["nll"], 4) and table[column]["ECE, 20 bins"] == round(
            scores["ece_20"], 4
        )
        assert table[column]["accuracy on the surest 80%"] == round(scores["selective_accuracy"]["0.8"], 4)
    assert table["averaged"]["temperature"] == 1 != table["averaged, scaled"]["temperature"]
    assert "averaged, scaled" in text_of(folder)


def test_what_if_is_answered_on_the_line(run, capsys):
    assert main(["what-if", str(run), "1.value.base.8", "closed"]) == 0
    text = capsys.readouterr().out
    found = Posterior(read(run)).what_if("1.value.base.8", False)
    assert f"{found.bops_adapted:.3%}" in text and f"{-found.elbo_loss:+.3f}" in text
    assert main(["what-if", str(run), "1.value.base.7", "closed"]) == 2
    assert "1.value.base.8" in capsys.readouterr().err


# --- a real browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    path = os.environ.get("PYRO_BLORA_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or set PYRO_BLORA_CHROMIUM to one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, path, **settings):
    """The page at that path, drawn, and what the console said."""
    page = browser.new_context(**settings).new_page()
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(Path(path).resolve().as_uri())
    page.wait_for_function(
        "document.querySelectorAll('.chart').length == document.querySelectorAll('.chart svg').length"
    )
    return page, said


@pytest.mark.parametrize("width", [390, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_renders_at_every_width_without_a_word_on_the_console(chromium, run, width, scheme):
    page, said = opened(chromium, run / "report.html", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rights = page.evaluate("[...document.querySelectorAll('.chart svg')].map(x => x.getBoundingClientRect().right)")
    assert len(rights) >= 10 and max(rights) <= width
    style = "getComputedStyle(document.body)"
    ink, paper = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) == (scheme == "dark") and abs(bright[0] - bright[1]) > 400


def test_the_gate_map_answers_to_hover_and_to_touch(chromium, run):
    for touch in (False, True):
        page, _ = opened(chromium, run / "report.html", viewport={"width": 1000, "height": 900}, has_touch=touch)
        square = page.locator("#chart-1-0 .mark-rect path").nth(3)
        square.scroll_into_view_if_needed()
        box = square.bounding_box()
        at = box["x"] + box["width"] / 4, box["y"] + box["height"] / 4
        page.touchscreen.tap(*at) if touch else page.mouse.move(*at)
        tip = page.locator("#vg-tooltip-element.visible")
        tip.wait_for(timeout=5000)
        shown = tip.inner_text()
        assert re.search(r"\d\.\w+\.\w+", shown) and "KL to prior" in shown and "32: " in shown


def test_every_chart_has_words_and_the_gate_map_a_table(chromium, run):
    page, _ = opened(chromium, run / "report.html")
    for chart in page.locator(".chart svg").all():
        assert chart.get_attribute("aria-label") or chart.locator("[aria-label]").count()
    page.locator("summary", has_text="The gate map as a table").click()
    assert page.locator("td", has_text="0.query.lora_A").first.is_visible()


def test_paper_is_white(chromium, run):
    page, _ = opened(chromium, run / "report.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(page.pdf()) > 20_000


def test_the_grids_page_renders(chromium, run, tmp_path):
    shutil.copytree(run, tmp_path / "grid" / "one")
    page, said = opened(chromium, write_report(tmp_path / "grid"), viewport={"width": 390, "height": 800})
    assert said == [] and page.evaluate("document.documentElement.scrollWidth") <= 390
