"""The page of a run and of a grid: its numbers, what it says of damage, and how a real browser shows it."""

import html
import io
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from urllib.parse import unquote

import altair
import numpy as np
import pandas as pd
import pytest
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.__main__ import _parser, main
from pyro_blora.bops import expected_bops
from pyro_blora.config import METHODS, RunConfig, load_preset, preset_names, run_fields, take_settings
from pyro_blora.config.command_line import command_line
from pyro_blora.files import SUMS
from pyro_blora.posterior import Posterior
from pyro_blora.posterior.arviz_compat import group, read
from pyro_blora.report import Link, RunFiles, Section, charts, headline, render, sections_of, vega, write_report
from pyro_blora.report.glossary import GLOSSARY
from pyro_blora.report.grid import grid_page
from pyro_blora.report.page import as_script, marked
from pyro_blora.report.run_folder import docs_link
from pyro_blora.report.sections.calibration import reliability_bins
from pyro_blora.report.terminal import next_steps, result_sentences, result_tables
from pyro_blora.report.warnings import FEW_DRAWS, in_words, warnings
from pyro_blora.run import train_run

pytestmark = pytest.mark.usefixtures("eager", "drawn")
TITLES = ["In plain words", "Gate map", "Ranks", "Calibration", "In detail", "Bit operations", "Training", "Restarts",
          "Confidently wrong", "Repeat this run", "Glossary"]  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):
    """A finished run with two restarts."""
    return train_run(tiny_config(backbone, draws=6, restarts=2, output_dir=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture(scope="module")
def plain(backbone, tmp_path_factory):
    """A finished run in which nothing is random."""
    return train_run(tiny_config(backbone, method="lora", output_dir=str(tmp_path_factory.mktemp("plain"))))


@pytest.fixture
def copy(run, tmp_path):
    """The same folder, to be damaged."""
    return without_sums(shutil.copytree(run, tmp_path / run.name))


def without_sums(folder):
    """The folder as if of an older version, whose files may be edited."""
    (Path(folder) / SUMS).unlink()
    return Path(folder)


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
    loaded = re.search(r"""\ssrc=["']|<link[^>]*href=["'](?!data:)""", re.sub(r"(?s)<script>.*?</script>", "", page))
    assert not loaded, "the page would need a network"


def test_the_script_of_the_charts_is_made_once_and_a_damaged_one_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setenv("PYRO_BLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(vega.vl_convert, "javascript_bundle", lambda: made.append(1) or "a('é');\r\nb()")
    script = vega.vega_script.__wrapped__  # without what this process remembers
    assert script() == script() == "a('é');\r\nb()" and len(made) == 1
    (path,) = (tmp_path / "vega").iterdir()
    kept = path.read_bytes()
    for damaged in (kept[:-3], kept.replace(b"b()", b"c()"), b""):
        path.write_bytes(damaged)
        assert script() == "a('é');\r\nb()" and path.read_bytes() == kept
    assert len(made) == 4
    monkeypatch.setenv("PYRO_BLORA_CACHE", str(path))  # no folder: nothing is kept
    assert script() == "a('é');\r\nb()"


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
        distribution = np.exp(
            constant["log_q_width"].sel(projection=projection, tensor=tensor).isel(chain=0).mean("component")
        )
        shown = [float(p) for p in re.findall(r": (\d\.\d\d)", cell["distribution"])]
        assert shown == pytest.approx(distribution.values, abs=0.0051)
        opened = constant["z_deployed"].sel(projection=projection, tensor=tensor).isel(chain=0).sum()
        assert cell["width"] == [2, 4, 8, 16, 32][int(opened)]
        assert cell["doubt"] == pytest.approx(1 - float(distribution[int(opened)]), abs=1e-5)


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
        *(
            RunConfig(task="files", task_settings={"data": "my data #2.csv", "text": text, "label": label})
            for text, label in (("#1 String,#2 String", "no"), ("-x", "007"), ("1e3", "None"), ("😀: x", "Unnamed: 0"))
        ),
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
    from pyro_blora.posterior.arviz_compat import container, group_names, save

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
    assert 'href="./one/report.html"' in page and len(specs_of(page)) == 1


def edited(folder, run, **changes):
    """A copy of the run in a grid, its summary changed."""
    without_sums(shutil.copytree(run, folder))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | changes))


def test_a_grid_compares_equal_seeds_only(run, tmp_path):
    """The lowest NLL of all is of a seed that the other prior has no run of."""
    for prior, seed, nll in (("a", 0, 0.50), ("b", 0, 0.45), ("a", 1, 0.10), ("b", 2, 0.60)):
        edited(tmp_path / f"{prior}-{seed}", run, prior=prior, seed=seed, nll=nll)
    first, second = (paragraphs := grid_page(tmp_path)[1][0].paragraphs)[0], " ".join(paragraphs[1:])
    assert "at seed 0: b, mean_field has the lowest NLL, 0.4500" in first
    assert "ahead of a, mean_field by 0.0500 ± 0.0000 over examples" in first
    assert "2 runs of other seeds are not in these sentences" in second
    shutil.rmtree(tmp_path / "b-0")
    assert "no seed has a result of every run" in grid_page(tmp_path)[1][0].paragraphs[0]
    for folder in tmp_path.glob("b-*"):
        shutil.rmtree(folder)
    assert "nothing to compare it with" in grid_page(tmp_path)[1][0].paragraphs[0]


def test_runs_of_a_grid_that_learned_nothing_are_named(run, tmp_path):
    empty = scored(json.loads((run / "summary.json").read_text()), 0.514, 0.509, 0.005)
    edited(tmp_path / "one", run, **empty)
    edited(tmp_path / "two", run, **scored(empty | {"seed": 1}, 0.9, 0.509, 0.005))
    (warning,) = grid_page(tmp_path)[1][0].warnings
    assert "not better than that of one answer for every example, 0.509: " in warning
    assert ("seed 0: 0.514" in warning) != ("seed 1" in warning)


NAMES = ["javascript:alert(1)", "java script:a", "a?b=c#d", "a%3Ab", "é & <b>", "..trick", "https:"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_folder_becomes_a_scheme(run, tmp_path, name):
    shutil.copytree(run, tmp_path / name)
    page = text_of(tmp_path).split("<script>")[0]
    (href,) = re.findall(r'<td[^>]*><a href="([^"]*)">', page)
    assert href.startswith("./") and href.endswith("/report.html") and ":" not in href
    assert (tmp_path / unquote(html.unescape(href))).is_file()


UNSAFE = ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", " javascript:x", "//x", "/etc"]


@pytest.mark.parametrize("href", UNSAFE)
def test_an_unsafe_link_is_a_text(href):
    table = pd.DataFrame({"a": [Link("here", href)]})
    page = render("t", "n", [], [Section("s", links=[Link("go", href)], tables=[("", table, True)])])
    assert "<a " not in page and "<td>here</td>" in page


def test_cells_that_are_lists_are_no_links():
    table = pd.DataFrame({"a": [["javascript:alert(1)", "x"], ("a", "b"), None], "b": [np.array(["u", "v"]), 1.5, "t"]})
    page = render("t", "n", [], [Section("s", tables=[("", table, True)])])
    assert "<a " not in page and "[&#39;javascript:alert(1)&#39;, &#39;x&#39;]" in page and "<td>None</td>" in page


def test_json_in_a_script_has_no_tag_and_no_comment():
    texts = ["</script>", "<!--<script>", "\u2028 & >", "<b>"]
    text = as_script({"x": texts})
    assert not set(text) & set("<>&\u2028") and json.loads(text) == {"x": texts}


def test_backticks_and_flags_are_code_and_the_rest_is_escaped():
    assert marked("`a<b` & --draws 15, --prior.rate, a--b") == (
        "<code>a&lt;b</code> &amp; <code>--draws</code> 15, <code>--prior.rate</code>, a--b"
    )


def test_no_page_shows_a_backtick(run, tmp_path):
    shutil.copytree(run, tmp_path / "grid" / "one")
    for folder in (run, tmp_path / "grid"):
        assert "`" not in text_of(folder).split("<script>")[0]


def test_a_page_leads_to_the_words_and_to_the_docs(run):
    page = text_of(run)
    assert "constant answer" in GLOSSARY and all(
        html.escape(meaning)[:30].split("`")[0] in page for meaning in GLOSSARY.values()
    )
    assert "docs/tutorial/reading-the-posterior.md" in page
    checkout = Path(__file__).resolve().parents[2]
    link = docs_link(checkout / "runs" / "mine")
    assert (checkout / "runs" / "mine" / link.href).resolve() == checkout / "docs/tutorial/reading-the-posterior.md"
    assert link.is_safe and (docs_link(Path("/")) is None or docs_link(Path("/")).is_safe)


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([8.0, 8.0], False),
        ([1.0, 1.0 + 1e-9], False),
        ([0.0, 0.0], False),
        ([3.0], True),
        ([], False),
        ([math.nan, 2.0], False),
    ],
)
def test_an_axis_of_equal_values_is_wider_than_a_rounding_error(values, log):
    low, high = charts._scale(values, log).to_dict()["domain"]
    inside = [x for x in values if math.isfinite(x)] or [1.0]
    assert low < min(inside) <= max(inside) < high and high - low >= 0.05 * max(map(abs, inside))
    assert "domain" not in charts._scale([1.0, 1.1], log).to_dict()


def test_charts_are_valid_vega_lite(run, plain, tmp_path):
    """As Altair has its schema, which it does not ask while it makes them."""
    shutil.copytree(run, tmp_path / "one")
    shutil.copytree(plain, tmp_path / "two")
    specs = [spec for folder in (run, plain, tmp_path) for spec in specs_of(text_of(folder)).values()]
    assert len(specs) > 10
    for spec in specs:
        altair.utils.schemapi.validate_jsonschema(spec, altair.load_schema())


def test_a_run_without_gates_has_no_empty_chart(plain):
    """Its KL is 0 throughout, which a logarithmic axis cannot show, and nothing is saved."""
    sections = {section.title: section for section in sections_of(RunFiles(plain))}
    assert "as they are 0 throughout: kl_z, kl_g." in sections["Training"].paragraphs[1]
    assert (
        len(sections["Bit operations"].charts) == 1 and "Nothing is saved" in sections["Bit operations"].paragraphs[-1]
    )
    for section in sections.values():
        for spec, _ in section.charts:
            rows = (
                spec["data"]["values"]
                if "data" in spec
                else [x for layer in spec["layer"] for x in layer["data"]["values"]]
            )
            assert rows


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
    summary = scored(json.loads((run / "summary.json").read_text()), 0.845, 0.509, 0.02)
    assert "temperature" not in " ".join(in_words(summary))
    summary["deployed"]["nll"] = plain
    summary |= {"nll": 0.5, "weights": {"law": "swag", "random": 96, "stored": 1152, "std": 0.012}}
    assert "--validation 0.1 holds out" in " ".join(warnings(summary, None))
    summary["calibration"] = {"deployed": {"temperature": 1.25, "scaled": {"nll": scaled}}}
    said = " ".join(in_words(summary))
    assert verdict in said and "At 1.25, the temperature" in said and f"has an NLL of {scaled:.3f}" in said
    assert "96 weights of the adapter are random, by distribution swag, with a standard deviation of 0.012" in said
    assert "--validation" not in " ".join(warnings(summary, None))
    assert "at the edge of the values tried" not in " ".join(warnings(summary, None))
    summary["calibration"]["deployed"]["temperature"] = math.exp(4.9999)
    summary["weights"]["prior_precision"] = math.exp(-4.99)
    said = [line for line in warnings(summary, None) if "at the edge of the values tried" in line]
    assert len(said) == 2 and "temperature, 148" in said[0] and "prior precision, 0.0068" in said[1]


def scored(summary, metric, constant, gain_error, nll=0.69, nll_constant=0.693):
    """The summary of a run with these scores, of 872 examples."""
    name = summary["metric"]["name"]
    own = {"constant": constant, "standard_error": 0.017, "gain_error": gain_error}
    of_nll = {"constant": nll_constant, "standard_error": 0.001, "gain_error": 0.002}
    chance = {"chance": {"mean": 0.028, "high": 0.042}}
    summary |= {"nll": nll, "beside": {name: own, "nll": of_nll, "brier": of_nll, "ece": chance}, "calibration": {}}
    summary["metric"]["value"], summary["ece"]["value"] = metric, 0.009
    summary["deployed"]["metric"]["value"] = metric + 0.03
    summary["deployed"]["difference_error"] = 0.001
    return summary


def shown_in_terminal(summary):
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    for part in (*result_tables(summary), *result_sentences(summary)):
        console.print(part, markup=False)
    return " ".join(console.export_text().split())


def test_nothing_learned_is_said_and_nothing_is_recommended(run):
    """0.514 where one answer for all has 0.509."""
    summary = scored(json.loads((run / "summary.json").read_text()), 0.514, 0.509, 0.005)
    said = " ".join([*in_words(summary), *warnings(summary, None)])
    assert "Nothing was learned: accuracy is 0.514 ± 0.017, and one answer for every example has 0.509" in said
    assert "off by" not in said and "quote the one" not in said
    assert "nothing was learned" in headline(summary)[0][2] and "constant answer 0.5090" in headline(summary)[0][2]
    terminal = shown_in_terminal(summary)
    assert "0.5140 ± 0.0170" in terminal and "0.5090" in terminal and "Nothing was learned: accuracy is" in terminal
    only_decisions = scored(summary, 0.514, 0.509, 0.005, nll=0.6)
    assert "Decisions are not better than a constant answer" in warnings(only_decisions, None)[0]
    learned = scored(summary, 0.845, 0.509, 0.02, nll=0.37)
    said = " ".join([*in_words(learned), *warnings(learned, None)])
    assert "othing was learned" not in said and "constant answer:" not in said
    assert "off by 0.009 on average (ECE). For comparison" in said and "quote the one that you will use" in said
    learned["deployed"]["difference_error"] = 0.02  # the same gap, within noise
    assert "quote the one" not in " ".join(warnings(learned, None))


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_of_an_error_less_is_better(run, unit):
    """An rmse of 0.6 where one answer for all has 1.4; what is deployed has 0.63, which is 2.1 % of that more."""
    summary = json.loads((run / "summary.json").read_text())
    summary["metric"]["name"] = summary["deployed"]["metric"]["name"] = "rmse"
    learned = scored(summary, 0.6 * unit, 1.4 * unit, 0.02 * unit, nll=0.37)
    learned["deployed"] |= {"metric": {"name": "rmse", "value": 0.63 * unit}, "difference_error": 0.001 * unit}
    said = " ".join(warnings(learned, None))
    assert "othing was learned" not in said and f"is worse by {0.03 * unit:.3f} in rmse" in said
    learned["deployed"]["metric"]["value"] = 0.57 * unit
    assert f"is better by {0.03 * unit:.3f} in rmse" in " ".join(warnings(learned, None))
    learned["deployed"]["metric"]["value"] = 0.61 * unit
    assert "is better by" not in (said := " ".join(warnings(learned, None))) and "is worse by" not in said
    none = scored(summary, 1.39 * unit, 1.4 * unit, 0.02 * unit)
    assert "Nothing was learned: rmse is" in warnings(none, None)[0]
    worse = scored(summary, 2.0 * unit, 1.4 * unit, 0.02 * unit)
    assert "Nothing was learned: rmse is" in warnings(worse, None)[0]


def test_an_ece_is_read_beside_chance(run):
    summary = scored(json.loads((run / "summary.json").read_text()), 0.845, 0.509, 0.02, nll=0.37)
    for ece, verdict in ((0.041, "no evidence of miscalibration"), (0.043, "so evidence of miscalibration")):
        summary["ece"]["value"] = ece
        assert f"below 0.042 in 95% of the cases: {verdict}" in " ".join(in_words(summary)).replace(
            "more than chance, ", ""
        )
        assert verdict in shown_in_terminal(summary) and "0.0420" in shown_in_terminal(summary)
    assert "by chance up to 0.0420" in headline(summary)[2][2]


def test_a_run_has_what_its_scores_are_read_beside(run):
    summary = json.loads((run / "summary.json").read_text())
    table = pd.read_parquet(run / "predictions.parquet")
    share = (table["label"] == 1).mean()
    for scores in (summary, summary["deployed"], *summary["restarts"]):
        assert scores["beside"]["accuracy"]["constant"] == pytest.approx(max(share, 1 - share))
        assert scores["beside"]["accuracy"]["standard_error"] == pytest.approx(0.045, abs=0.004)  # of 120 rows
        assert 0 < scores["beside"]["nll"]["standard_error"] < 0.1
        assert 0 < scores["beside"]["ece"]["chance"]["mean"] < scores["beside"]["ece"]["chance"]["high"] < 0.2
    page = text_of(run)
    assert page.count("±") > 20 and "constant answer" in page


def test_scores_of_an_older_run_are_completed_from_its_predictions(run, copy):
    summary = json.loads((copy / "summary.json").read_text())
    whole = {
        name: summary[name].pop("beside") if name in summary else summary.pop("beside") for name in ("deployed", "")
    }
    summary["deployed"].pop("difference_error")
    (copy / "summary.json").write_text(json.dumps(summary))
    found = RunFiles(copy).summary
    for name, value in whole[""].items():
        assert found["beside"][name] == {key: pytest.approx(x, rel=1e-4) for key, x in value.items()}
    assert found["deployed"]["beside"]["accuracy"] == whole["deployed"]["accuracy"]
    (copy / "predictions.parquet").unlink()
    assert "beside" not in RunFiles(copy).summary
    assert "±" not in text_of(copy).split("<h2>Gate map</h2>")[0] and main(["show", str(copy)]) == 0


@pytest.mark.parametrize("name", preset_names())
def test_no_preset_and_no_default_has_few_draws(name):
    assert min(load_preset(name).get("draws", FEW_DRAWS), RunConfig().draws) >= FEW_DRAWS


def test_warnings_name_what_is_wrong(backbone, plain, tmp_path):
    def said(**changes):
        folder = train_run(tiny_config(backbone, output_dir=str(tmp_path), **changes))
        files = RunFiles(folder)
        return " ".join(warnings(files.summary, files.posterior))

    collapsed = said(prior="nested", prior_settings={"rate": 200.0})
    assert "Collapsed" in collapsed and "2 bit" in collapsed and "One fit" in collapsed and "Few draws: 3" in collapsed
    files = RunFiles(plain)
    of_plain = " ".join(warnings(files.summary, files.posterior))
    assert "No gate is random" in of_plain and "Few draws" not in of_plain  # nothing is averaged
    dominated = said(prior="depth", seed=1)
    assert "Prior-dominated" in dominated and "Collapsed" not in dominated
    still = {"prior": "budget", "prior_settings": {"bops": 0.5}, "guide": "point", "lr_gates": 0.0}
    missed = said(**still, guide_settings={"open_logit": 9.0})
    assert "asked for 50.00% of the bit operations" in missed and "the gates expect 100.00%" in missed


def test_a_target_that_was_missed_is_told_in_the_terminal(plain):
    summary = RunFiles(plain).summary
    assert "missed" not in summary and result_sentences({**summary, "missed": "It was missed."})[-1] == "It was missed."


def test_gates_that_rest_where_they_started_are_told(backbone, plain, tmp_path):
    def summary(name, **changes):
        folder = train_run(tiny_config(backbone, output_dir=str(tmp_path / name), prior="budget", **changes))
        return RunFiles(folder).summary

    rested = summary("rested", kl_warmup=0.5)
    assert "rest where they started" in rested["rested"] and "--rest 0.3 --settle 0" in rested["rested"]
    assert rested["rested"] in " ".join(in_words(rested)) and rested["rested"] in result_sentences(rested)
    for other in (summary("learned", rest=0.25), RunFiles(plain).summary):
        assert "rested" not in other and not any("rest where" in x for x in in_words(other))


def test_the_calibration_section_has_the_scores_of_the_summary(backbone, tmp_path):
    config = tiny_config(backbone, method="lora", weights="dropout", validation=0.25, output_dir=str(tmp_path))
    folder = train_run(config)
    found = json.loads((folder / "summary.json").read_text())["calibration"]
    (section,) = (x for x in sections_of(RunFiles(folder)) if x.title == "Calibration")
    caption, table, shown = section.tables[0]
    assert shown and "dropout masks" in caption
    table = table.set_index("")
    assert list(table) == [
        "averaged", "averaged, scaled", "deployed", "deployed, scaled", "constant answer", "by chance, 95 %"
    ]  # fmt: skip
    for column, scores in (("averaged", found["averaged"]), ("deployed, scaled", found["deployed"]["scaled"])):
        errors = scores["errors"]
        for line, value, error in (
            ("NLL", scores["nll"], errors["nll"]), ("Brier score", scores["brier"], errors["brier"]),
            ("accuracy on the most confident 80%",
             *(x["selective_accuracy"]["0.8"] for x in (scores, errors))),
        ):  # fmt: skip
            assert table[column][line] == f"{value:.4f} ± {error:.4f}" and error > 0
        assert table[column]["ECE, 20 bins"] == f"{scores['ece_20']:.4f}"
    chance = found["averaged"]["chance"]["ece_15"]
    assert table["by chance, 95 %"]["ECE, 15 bins"] == f"{chance['mean']:.4f}, {chance['high']:.4f}"
    assert table["averaged"]["temperature"] == "" != table["averaged, scaled"]["temperature"]
    assert "averaged, scaled" in text_of(folder)


def test_no_word_of_scaling_without_a_temperature(run):
    page = text_of(run).split("<h2>Calibration</h2>")[1].split("</section>")[0]
    assert "caled" not in page and "emperature" not in page and "constant answer" in page


def test_what_if_is_answered_on_the_line(run, capsys):
    assert main(["what-if", str(run), "1.value.base.8", "closed"]) == 0
    text = capsys.readouterr().out
    found = Posterior(read(run)).what_if("1.value.base.8", False)
    assert f"{found.bops_adapted:.3%}" in text and f"{-found.elbo_loss:+.3f}" in text
    assert main(["what-if", str(run), "1.value.base.7", "closed"]) == 2
    assert "1.value.base.8" in capsys.readouterr().err


@pytest.mark.parametrize("widths", ["4,16,32", "8,32"])
def test_the_gate_of_the_line_that_is_shown_is_one_of_the_run(backbone, tmp_path, widths, capsys):
    folder = train_run(tiny_config(backbone, bit_widths=widths, output_dir=str(tmp_path)), quiet=True)
    (line,) = (how for purpose, how in next_steps(RunFiles(folder)) if purpose == "ask what forcing a gate costs")
    assert main(shlex.split(line)[1:]) == 0


# --- a real browser -------------------------------------------------------------------------------------------------


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


_TEXTS = """
() => {
  const found = [], box = x => x.getBoundingClientRect();
  for (const chart of document.querySelectorAll('.chart')) {
    const view = box(chart.querySelector('svg'));
    for (const text of chart.querySelectorAll('svg text')) {
      const r = box(text);
      if (getComputedStyle(text).opacity == 0 || !r.width) continue;
      if (r.left < view.left - 1 || r.right > view.right + 1 || r.top < view.top - 1 || r.bottom > view.bottom + 1)
        found.push(`${chart.id}: "${text.textContent}" is cut`);
      if (text.textContent.endsWith('…')) found.push(`${chart.id}: "${text.textContent}" is shortened`);
    }
    for (const group of chart.querySelectorAll('.role-axis-label, .role-legend-label')) {
      const labels = [...group.querySelectorAll('text')].filter(x => getComputedStyle(x).opacity != 0 && x.textContent);
      labels.forEach((one, i) => labels.slice(i + 1).forEach(other => {
        const a = box(one), b = box(other);
        if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
          found.push(`${chart.id}: "${one.textContent}" and "${other.textContent}" collide`);
      }));
    }
    for (const title of chart.querySelectorAll('.role-axis-title text'))
      for (const label of chart.querySelectorAll('.role-axis-label text')) {
        const a = box(title), b = box(label);
        if (getComputedStyle(label).opacity != 0 && label.textContent
            && a.left + 1 < b.right && b.left + 1 < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom)
          found.push(`${chart.id}: title "${title.textContent}" is over "${label.textContent}"`);
      }
  }
  for (const text of document.querySelectorAll('h1, h2, .caption, figcaption, .cards *'))
    if (text.scrollWidth > text.clientWidth + 1 && text.clientWidth) found.push(`"${text.textContent}" is cut`);
  return found;
}
"""


def cut_or_colliding(page):
    """Texts of a drawn page that leave their chart, are shortened, or lie over each other."""
    return page.evaluate(_TEXTS)


@pytest.mark.parametrize("width", [390, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_renders_at_every_width_without_a_word_on_the_console(chromium, run, width, scheme):
    page, said = opened(chromium, run / "report.html", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rights = page.evaluate("[...document.querySelectorAll('.chart svg')].map(x => x.getBoundingClientRect().right)")
    assert len(rights) >= 10 and max(rights) <= width
    assert cut_or_colliding(page) == []
    strokes = page.evaluate(
        "[...document.querySelectorAll('.chart .mark-rect.role-mark path')].map(x => getComputedStyle(x).stroke)"
    )
    assert page.evaluate("getComputedStyle(document.body).color") in strokes  # bars have an outline in the page's ink
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
    edited(tmp_path / "grid" / "javascript:document.title='pwned'", run, prior="other </script><script>", seed=0)
    page, said = opened(chromium, write_report(tmp_path / "grid"), viewport={"width": 390, "height": 800})
    assert said == [] and page.evaluate("document.documentElement.scrollWidth") <= 390
    assert cut_or_colliding(page) == []
    page.locator("td a", has_text="javascript").click()
    page.wait_for_url("**/report.html")
    assert page.title() != "pwned" and "javascript%3A" in page.url


def test_a_page_without_a_range_and_the_stored_run_render(chromium, plain, tmp_path):
    stored = Path(shutil.copytree(Path(__file__).parents[2] / "analysis" / "example" / "bops", tmp_path / "bops"))
    write_report(stored)
    for folder, width, scheme in ((plain, 390, "dark"), (stored, 390, "light"), (stored, 1440, "dark")):
        place = folder / "report.html"
        page, said = opened(chromium, place, viewport={"width": width, "height": 900}, color_scheme=scheme)
        assert said == [] and cut_or_colliding(page) == [], (folder.name, width)


def test_bars_have_a_row_for_each_part_not_for_every_gate():
    gates = pd.DataFrame({"tensor": ["base", "input"] * 500, "gates": ["4 bit"] * 600 + ["8 bit"] * 400, "saved": 1e-4})
    spec = charts.bars(gates, "tensor", "saved", "gates", "saved")
    rows = spec["data"]["values"]
    assert {(row["tensor"], row["gates"]): round(row["saved"], 6) for row in rows} == {
        ("base", "4 bit"): 0.03, ("input", "4 bit"): 0.03, ("base", "8 bit"): 0.02, ("input", "8 bit"): 0.02,
    }  # fmt: skip
    assert len(rows) == 4


def test_a_map_of_many_ranks_has_marks_where_there_is_something_to_see():
    probability = np.zeros((2, 256))
    probability[0, [6, 7, 8]], probability[1, [0, 200]] = [0.001, 0.9986, 0.0004], [0.25, 0.75]
    table = pd.DataFrame([
        {"projection": name, "rank": r + 1, "probability": p, "mean": 8.0, "interval": "8 to 8"}
        for name, row in zip("ab", probability, strict=True) for r, p in enumerate(row)
    ])  # fmt: skip
    spec = charts.rank_map(table)
    found = {(row["projection"], row["rank"]): row["probability"] for row in spec["data"]["values"]}
    assert found == {("a", 7): 0.001, ("a", 8): 0.9986, ("b", 1): 0.25, ("b", 201): 0.75}
    assert spec["encoding"]["x"]["scale"]["domain"] == [*range(1, 257)]
