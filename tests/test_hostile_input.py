"""Input that nobody means well: a sentence that names what and where, exit code 2, soon, and no memory eaten."""

import copy
import dataclasses
import json
import math
import re
import resource

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import batch
from tiny import save_tiny_backbone, tiny_config

from experiments import grid
from pyro_blora import draw, fit, predict
from pyro_blora.__main__ import main
from pyro_blora.config import RANGES, RunConfig
from pyro_blora.models.targets import _matching
from pyro_blora.posterior import draw_weights
from pyro_blora.report import RunFiles, show_run, write_report
from pyro_blora.run import train_run
from pyro_blora.user_files import DEEPEST, compose_yaml, load_json, load_yaml, read_text

pytestmark = pytest.mark.usefixtures("eager")

LAUGHS = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)])  # fmt: skip
HUGE = "9" * 400


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs")
    return train_run(tiny_config(save_tiny_backbone(folder / "tiny"), output_dir=str(folder / "out"), epochs=1))


@pytest.fixture(autouse=True)
def memory_stays():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "KiB that no refusal takes"


def refused(capsys, *argv):
    """The one line that a mistake gets."""
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    sentence = [line for line in said.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]  # without the phases
    assert len(sentence) == 1 and "error: " in sentence[0] and len(sentence[0]) < 1000
    return said


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["restarts", "rank", "epochs", "batch_size", "accumulation", "draws", "max_length"])
def test_a_billion_is_refused_with_the_largest(capsys, field):
    said = refused(capsys, "train", f"--{field}", "1000000000")
    assert f"{field} must be from " in said and "got 1000000000" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--guide", "mixture", "--guide.components", "1000000000"), "takes at most 1000 components"),
        (("--prior", "hierarchical", "--prior.shape", "1e300"), "must be from 1e-06 to 1e+06, got 1e+300"),
        (("--prior", "hierarchical", "--prior.rate", "0"), "must be from 1e-06 to 1e+06"),
    ],
    ids=str,
)
def test_settings_beyond_what_can_be_computed_are_refused(capsys, words, message):
    assert message in refused(capsys, "train", *words)


def test_an_ensemble_of_a_billion_is_refused(capsys):
    said = refused(capsys, "train", "--weights", "ensemble", "--weights.members", "1000000000")
    assert "weights.members must be at most 1,000, got 1000000000" in said


NUMBERS = [x.name for x in dataclasses.fields(RunConfig) if x.name in RANGES and "str" not in str(x.type)]


@pytest.mark.parametrize("field", NUMBERS)
def test_numbers_of_hundreds_of_digits_are_refused_by_name(capsys, field):
    assert f"error: {field} must be " in refused(capsys, "train", f"--{field}", HUGE)
    with pytest.raises(ValueError, match=f"^{field} must be "):
        RunConfig(**{field: int(HUGE)})


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("setting", ["prior.rate", "guide.open_logit", "weights.rank"])
def test_settings_of_hundreds_of_digits_are_refused_by_name(capsys, setting, digits):
    assert f"--{setting}" in refused(capsys, "train", f"--{setting}", "9" * digits)


def test_settings_in_python_are_small(capsys):
    deep = []
    for _ in range(3000):
        deep = [deep]
    loops = {"a": 1}
    loops["b"] = loops
    for value, message in ((deep, "levels inside each other"), (int(HUGE), "18 digits"), (loops, "levels")):
        with pytest.raises(ValueError, match=f"prior_settings.*{message}"):
            RunConfig(prior_settings={"rate": value})
    with pytest.raises(ValueError, match="prior_settings has more than 10,000 values"):
        RunConfig(prior_settings={"rate": [[0] * 200] * 200})


# --- YAML and JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 20,000 values when its aliases are written out"),
        ("seed: " + "[" * 3000 + "]" * 3000, f"line 1: more than {DEEPEST} levels inside each other"),
        ("seed: " + "{a: " * 3000 + "}" * 3000, f"line 1: more than {DEEPEST} levels inside each other"),
        ("\n".join("  " * i + "a:" for i in range(100)), f"line {DEEPEST + 1}: more than {DEEPEST} levels"),
        ("seed: &a [*a]", "line 1: an alias that holds itself"),
        (f"task: sst2\nseed: {HUGE}", "line 2: a whole number of 400 digits"),
        ("? [a, b]\n: 1", "line 1: "),
        ("? {a: b}\n: 1", "line 1: "),
        ("seed: 2020-13-45", "line 1: month must be in 1..12"),
        ("seed: [", "is not YAML: "),
        ("a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        ("x" * 300_000, "more than 262,144 characters"),
    ],
)
def test_a_preset_and_a_grid_say_what_is_wrong_and_where(tmp_path, capsys, refusal, text, message):
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    said = refused(capsys, "train", "--preset", file)
    assert message in said and str(file) in said
    said = refusal(grid.main, file, "--dry_run")
    assert str(file) in said and (message in said or "expected a table" in said or "a name must be a word" in said
                                  or "unknown key" in said)  # fmt: skip


@pytest.mark.parametrize("place", ["base", "axes"])
def test_grid_keys_are_words(tmp_path, refusal, place):
    file = tmp_path / "grid.yaml"
    text = {"base": "base:\n  [rank, seed]: 3\naxes:\n  seed: [0]\n", "axes": "axes:\n  ? [rank, seed]\n  : [0]\n"}
    file.write_text(text[place], encoding="utf-8")
    assert "line 2: a name must be a word, not a list or a table" in refusal(grid.main, file, "--dry_run")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x) |
                    st.dictionaries(st.text(), x), max_leaves=8))  # fmt: skip
@settings(max_examples=40)
def test_whatever_json_holds_makes_a_configuration_or_a_sentence(value):
    for values in (value, {"seed": value}, {"prior_settings": value}, {"prior_settings": {"rate": value}}):
        try:
            RunConfig.from_json(json.dumps(values))
        except ValueError as error:
            assert str(error)


@given(st.text("[]{}:,&*a1 \n-?!'\"|>#%@", max_size=60))
@settings(max_examples=300)
def test_whatever_yaml_holds_is_a_value_or_a_sentence(text):
    try:
        load_yaml(text, "own.yaml")
    except ValueError as error:
        assert "own.yaml" in str(error)


def test_deep_or_long_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json.*levels"):
        load_json("[" * 100_000 + "]" * 100_000, "config.json")
    with pytest.raises(ValueError, match=r"config.json is not JSON: Exceeds the limit"):
        load_json("9" * 5000, "config.json")
    with pytest.raises(ValueError, match="prior_settings has more than 20 levels"):
        RunConfig.from_json('{"prior_settings": {"rate": ' + "[" * 500 + "]" * 500 + "}}")


def test_plain_aliases_are_fine():
    text = "base: &b {rank: 4}\nother: *b\n"
    assert load_yaml(text, "own.yaml") == {"base": {"rank": 4}, "other": {"rank": 4}}
    assert compose_yaml("", "own.yaml") is None and load_yaml("", "own.yaml") is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("seed: 1".encode("utf-16"), "is UTF-16, not UTF-8 text: convert it: iconv -f UTF-16"),
        ("seed: 1".encode("utf-16-le"), "has NUL bytes"),
        ("seed: 1\ntask: café".encode("latin-1"), "line 2: byte 0xe9 is no UTF-8.* iconv -f WINDOWS-1252"),
        (b"\x1f\x8b\x08 zipped", "is compressed by gzip.* gunzip"),
        (b"PK\x03\x04 zipped", "is a ZIP archive or a spreadsheet"),
    ],
)
def test_what_is_no_utf8_says_how_to_convert_it(tmp_path, raw, message):
    file = tmp_path / "own.yaml"
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{file}.*{message}"):
        read_text(file)
    file.write_bytes("\ufeffseed: 1".encode())
    assert read_text(file) == "seed: 1"


# --- regular expressions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [r"(?:(?:x|xx)+)+[yz]", r"(.|..|...)+\d"])
def test_a_regular_expression_that_takes_for_ever_is_refused(pattern):
    with pytest.raises(ValueError, match=r"target_modules .* takes more than 1 s to match one name.* list the names"):
        _matching(pattern, ["query", "x" * 2000])


@pytest.mark.parametrize("pattern", ["(" * 5000, "a{99999999999999999999}", "[", "(?P<a>.)(?P<a>.)"])
def test_what_is_no_regular_expression_is_refused_by_name(pattern):
    with pytest.raises(ValueError, match=r"target_modules .* is no regular expression"):
        RunConfig(target_modules=pattern)


# --- torch's default dtype --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{}, {"weights": "gaussian"}, {"weights": "low_rank"}, {"adapter": "xs"}, {"weights": "laplace", "rank": 1}],
    ids=lambda values: " ".join(map(str, values.values())) or "plain",
)
def test_a_default_dtype_of_float64_leaves_the_network_in_float32(run, values):
    config = tiny_config(run.parents[1] / "tiny", epochs=1, **values)
    torch.set_default_dtype(torch.float64)
    try:
        program = fit(config, quiet=True).program
        found = predict(program, [batch()], gates=draw(program, 2), weights=draw_weights(program, 2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert bool(found.mean.isfinite().all())
    assert {p.dtype for p in program.net.peft_model.parameters()} == {torch.float32}


# --- edited run folders -----------------------------------------------------------------------------------------------

JUNK = st.sampled_from([None, True, -1, 0, 3.5, math.nan, math.inf, 10**400, "", "x", "[/b]", "<b>", [], [1], ["x"], {},
                        {"a": 1}, [[1, 2], [3]]])  # fmt: skip


def places(tree, path=()):
    """Every path of a JSON tree."""
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*path, key))


def changed(tree, path, value, *, dropped):
    if not path:
        return value
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if dropped:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return tree


def answers(action, folder):
    """It does, or it says with a ValueError that names the folder why not."""
    try:
        action(folder)
    except ValueError as error:
        assert str(folder) in str(error)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_show_of_an_edited_summary_is_a_table_or_a_sentence(run, tmp_path, data):
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    path = data.draw(st.sampled_from(list(places(summary))))
    edited = changed(summary, path, data.draw(JUNK), dropped=data.draw(st.booleans()))
    (tmp_path / "summary.json").write_text(json.dumps(edited), encoding="utf-8")
    answers(show_run, tmp_path)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_report_of_edited_files_is_a_page_or_a_sentence(run, tmp_path, data):
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("posterior.nc", "predictions.parquet", "config.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    for name, tree in (("summary.json", summary), ("metrics.jsonl", lines)):
        for _ in range(data.draw(st.integers(0, 2))):
            path = data.draw(st.sampled_from(list(places(tree))[1:]))
            tree = changed(tree, path, data.draw(JUNK), dropped=data.draw(st.booleans()))
        text = json.dumps(tree) if name == "summary.json" else "\n".join(map(json.dumps, tree))
        (tmp_path / name).write_text(text, encoding="utf-8")
    answers(write_report, tmp_path)


@pytest.mark.parametrize("text", ["[1]", "null", "3", '"x"', "[" * 5000, "{", "", "\0"])
def test_a_summary_of_another_kind_is_a_sentence(tmp_path, capsys, text):
    (tmp_path / "summary.json").write_text(text, encoding="utf-8")
    for command in ("show", "report"):
        assert "is not a finished run" in refused(capsys, command, tmp_path)


@pytest.mark.parametrize("text", ["[1]", "null", "3\n4", '{"step": "x"}', '{"loss": [1]}', "\0", "[" * 5000])
def test_a_log_of_another_kind_is_said_in_its_place(run, tmp_path, text):
    for file in run.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        RunFiles(tmp_path).log  # noqa: B018 (the access is the test)


def test_a_grid_lists_a_run_whose_summary_was_edited(run, tmp_path):
    (tmp_path / "run").mkdir()
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"nll": "low"}), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "nll must be a finite number, got &#39;low&#39;" in page
