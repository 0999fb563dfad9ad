"""Laws of the registry: names, files of the user's, and settings checked against a signature."""

import os
import sys
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_blora.config import RunConfig
from pyro_blora.elbos import GateELBO
from pyro_blora.guides.base import Guide
from pyro_blora.priors.base import Prior
from pyro_blora.registry import REQUIRED, Registry
from pyro_blora.weights import Weights


def bops(
    layout, *, rate: float = 1.0, ranks: int = 8, shared: bool = False, mode: str = "all", target: float | None = None
):
    """Cost in proportion to bit operations.

    A second paragraph that no list shows.
    """
    return rate, ranks, shared, mode, target


def fixed(layout, *, bits: Literal[2, 4, 8], name=None, **more):
    """A named bit width."""
    return bits


def nested(layout, gates, rate=2.0):
    return rate


@pytest.fixture
def priors():
    registry = Registry("prior")
    registry.register(bops)
    registry.register("fixed")(fixed)
    registry.register()(nested)
    return registry


def test_a_registered_name_resolves_to_its_function(priors):
    assert priors.resolve("bops") is bops and priors.resolve("fixed") is fixed
    assert priors.names() == ["bops", "fixed", "nested"]


def test_a_decorated_function_is_returned_unchanged():
    assert Registry("guide").register("other")(bops) is bops


def test_a_name_is_registered_once(priors):
    with pytest.raises(ValueError, match="prior 'bops' is registered already"):
        priors.register("bops")(fixed)
    assert priors.resolve("bops") is bops


def test_an_unknown_name_is_answered_with_the_nearest(priors):
    with pytest.raises(ValueError) as error:
        priors.resolve("bop")
    assert str(error.value) == "unknown prior 'bop': did you mean 'bops'? Known: bops, fixed, nested"


def test_an_empty_registry_says_so():
    with pytest.raises(ValueError, match=r"unknown guide 'any': Known: \(none\)"):
        Registry("guide").resolve("any")


def test_an_entry_has_the_first_line_and_the_defaults(priors):
    entry = priors.entry("bops")
    assert entry.line == "Cost in proportion to bit operations."
    assert entry.settings == {"rate": 1.0, "ranks": 8, "shared": False, "mode": "all", "target": None}
    assert priors.entry("fixed").settings == {"bits": REQUIRED, "name": None}
    assert (priors.entry("nested").line, priors.entry("nested").settings) == ("", {"rate": 2.0})


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("rate", 3, 3.0),
        ("rate", "1e-3", 0.001),
        ("rate", "inf", float("inf")),
        ("ranks", 4.0, 4),
        ("ranks", "4", 4),
        ("shared", "true", True),
        ("shared", False, False),
        ("mode", 32, "32"),
        ("target", None, None),
        ("target", "none", None),
        ("target", 1, 1.0),
    ],
)
def test_a_value_takes_the_type_of_the_annotation(priors, setting, value, expected):
    given_back = priors.settings(bops, {setting: value})[setting]
    assert given_back == expected and type(given_back) is type(expected)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("rate", "x", "prior 'bops': rate must be a number, got 'x'"),
        ("rate", None, "prior 'bops': rate must be a number, got None"),
        ("rate", True, "prior 'bops': rate must be a number, got True"),
        ("rate", float("nan"), "prior 'bops': rate must be a number, got nan"),
        ("ranks", 2.5, "prior 'bops': ranks must be a whole number, got 2.5"),
        ("ranks", float("inf"), "prior 'bops': ranks must be a whole number, got inf"),
        ("shared", 1, "prior 'bops': shared must be true or false, got 1"),
        ("mode", None, "prior 'bops': mode must be a word, got None"),
        ("target", "soon", "prior 'bops': target must be a number or none, got 'soon'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(priors, setting, value, message):
    with pytest.raises(ValueError) as error:
        priors.settings(bops, {setting: value})
    assert str(error.value) == message


def test_a_choice_is_one_of_its_choices(priors):
    assert priors.settings(fixed, {"bits": 4}) == {"bits": 4}
    with pytest.raises(ValueError, match="bits must be one of 2, 4, 8, got 3"):
        priors.settings(fixed, {"bits": 3})


def test_an_unknown_setting_is_answered_with_the_nearest(priors):
    with pytest.raises(ValueError, match="prior 'bops': unknown setting 'rat': did you mean 'rate'"):
        priors.settings(bops, {"rat": 3})


def test_a_setting_without_a_default_is_required(priors):
    with pytest.raises(ValueError, match=r"prior 'fixed': the setting 'bits' is required: give --prior\.bits VALUE"):
        priors.settings(fixed, {})


def test_a_function_that_takes_anything_is_given_anything(priors):
    assert priors.settings(fixed, {"bits": 2, "extra": [1]}) == {"bits": 2, "extra": [1]}


def test_what_the_library_fills_is_no_setting(priors):
    def lora(backbone, layout, start="default", /, *, alpha: float = 1.0):
        return start

    for function, filled in ((nested, "gates"), (lora, "start")):
        with pytest.raises(ValueError, match=f"unknown setting '{filled}'"):
            priors.settings(function, {filled: 1})
    assert priors.settings(lora, {"alpha": 2}) == {"alpha": 2.0}


def test_without_an_annotation_the_default_decides(priors):
    assert priors.settings(nested, {"rate": 3})["rate"] == 3.0
    with pytest.raises(ValueError, match="rate must be a number"):
        priors.settings(nested, {"rate": "x"})


@given(value=st.floats(allow_nan=False) | st.integers(-(2**53), 2**53))
def test_every_number_survives_being_written_down(value):
    registry = Registry("prior")
    assert registry.settings(bops, {"rate": repr(value)})["rate"] == float(value)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return f"{path}:law"


def test_a_function_comes_from_a_users_file(priors, tmp_path):
    name = write(
        tmp_path / "mine.py",
        "from __future__ import annotations\nimport dataclasses\n\n@dataclasses.dataclass\nclass Pair:\n    a: int\n\n"
        'def law(layout, *, rate: float = 3):\n    """Mine."""\n    return Pair(1).a * rate\n',
    )
    law = priors.resolve(name)
    assert law is priors.resolve(name), "a file is loaded once"
    assert (priors.entry(name).line, priors.entry(name).settings) == ("", {}), "without the decorator"
    assert law(None, **priors.settings(law, {"rate": 2})) == 2.0


def test_an_edited_file_is_loaded_again_and_may_register_its_name_again(priors, tmp_path, monkeypatch):
    """Within the same second and of the same size, where Python would take its bytecode of before."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    PRIORS[:] = [priors]
    text = f"from {__name__} import PRIORS\n\n@PRIORS[0].register('mine')\ndef law(layout):\n    return VALUE\n"
    for value in ("1", "2"):
        name = write(tmp_path / "mine.py", text.replace("VALUE", value))
        os.utime(tmp_path / "mine.py", (1e9, 1e9))
        assert priors.resolve(name)(None) == int(value)
        assert priors.resolve("mine")(None) == int(value)


PRIORS = []


@pytest.mark.parametrize(
    ("text", "attribute", "message"),
    [
        ("def laws(layout): ...", "law", "has no 'law': did you mean 'laws'"),
        ("law = 3", "law", "must be a function, got int"),
        ("1 / 0", "law", "fails to import: ZeroDivisionError: division by zero"),
        ("def law(:", "law", "fails to import: SyntaxError"),
        ("import no_such_module_anywhere", "law", "fails to import: ModuleNotFoundError"),
    ],
)
def test_a_users_file_is_refused_with_the_reason(priors, tmp_path, text, attribute, message):
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        priors.resolve(f"{tmp_path / 'mine.py'}:{attribute}")


def test_a_file_needs_to_exist_and_to_name_a_function(priors, tmp_path):
    with pytest.raises(ValueError, match=r"gone\.py does not exist"):
        priors.resolve(f"{tmp_path}/gone.py:law")
    with pytest.raises(ValueError, match=r"write path/to/file\.py:function"):
        priors.resolve(f"{tmp_path}/gone.py")
    with pytest.raises(ValueError, match=r"must end in \.py"):
        priors.resolve(write(tmp_path / "mine.txt", "def law(layout): ..."))


@pytest.mark.parametrize(
    ("base", "method", "arguments"),
    [
        (Guide, "distributions", (1.0, True)),
        (Prior, "forward", ()),
        (Weights, "distribution", ()),
        (GateELBO, "expected_nll", (None,)),
    ],
)
def test_a_part_without_what_it_must_have_says_which_and_where_it_is_described(base, method, arguments):
    mine, described = type("Mine", (base,), {}), rf"{base.__module__}.{base.__name__}.{method}"
    with pytest.raises(NotImplementedError, match=rf"^Mine does not define {method}\(\): {described} says what"):
        getattr(mine.__new__(mine), method)(*arguments)


USERS = """
import pyro_blora
MORE = {{"lr": 0.25}}

@pyro_blora.register_weights("mine", proposes={proposes}, sets={{"average_over": "dropout"}})
def law(weights, head):
    ...
"""


def test_what_a_decorator_declares_is_read_with_its_package_before_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USERS.format(proposes='{"lr": 0.25}'))
    config = RunConfig(weights=f"{path}:law")
    assert (config.lr, config.average_over) == (0.25, "dropout")


def test_what_a_decorator_declares_elsewhere_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USERS.format(proposes="MORE"))
    with pytest.raises(ValueError, match=r"mine.py, line 5: .* must be written out there, got proposes=MORE"):
        RunConfig(weights=f"{path}:law")
