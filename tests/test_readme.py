"""What README and docs/ show of one's own prior, guide and backbone works as it stands."""

import re
from pathlib import Path

import pytest
from contracts import check_guide
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import fit
from pyro_blora.run import train_run
from pyro_blora.testing import check_prior, example_layout

ROOT = Path(__file__).resolve().parents[1]


def functions(page):
    """The Python blocks of a page that define a function, by its name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return {name: block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
            for name in re.findall(r"^def (\w+)", block, re.MULTILINE)}  # fmt: skip


BLOCKS = functions("docs/how-to/own-parts.md")


@pytest.fixture
def written(tmp_path):
    """A function of README in a file of its own, as `file.py:function`, with words replaced."""

    def write(name, **changed):
        text = BLOCKS[name]
        for old, new in changed.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        return f"{tmp_path / name}.py:{name}"

    return write


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def test_readme_shows_the_same_prior():
    assert functions("README.md")["late"] == BLOCKS["late"]


def test_a_prior_takes_ten_lines():
    assert 0 < len([line for line in BLOCKS["late"].splitlines() if line.strip()]) <= 11


def test_the_prior_passes_the_contract_and_trains(written, backbone):
    name = written("late")
    check_prior(name)
    one, two = (fit(tiny_config(backbone, prior=name, prior_settings={"rate": rate}), quiet=True) for rate in (0.1, 50))
    assert one.metrics[-1]["bops_adapted"] > two.metrics[-1]["bops_adapted"]


def test_the_guide_passes_the_contract_and_has_one_law_for_all_layers(written, backbone):
    name = written("tied")
    check_guide(name, example_layout(), "nested")
    z = fit(tiny_config(backbone, guide=name), quiet=True).program.gate_guide.posterior().z.log_probs
    assert z.std(0).max() == 0 and z.std() > 0


def test_the_backbone_is_trained_from_its_file(written, backbone, tmp_path):
    name = written("small", **{"path/to/tokenizer": str(backbone)})
    folder = train_run(tiny_config(name, output_dir=str(tmp_path / "runs")))
    assert folder.name.startswith("acceptability-small.py_small-bops-")


def test_a_backbone_that_is_none_is_refused(tmp_path):
    (tmp_path / "wrong.py").write_text("def wrong(num_labels):\n    return num_labels\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"wrong' must return \(model, tokenizer\).*got int"):
        fit(tiny_config(f"{tmp_path}/wrong.py:wrong"), quiet=True)
    with pytest.raises(ValueError, match=r"no function 'other'|has no"):
        fit(tiny_config(f"{tmp_path}/wrong.py:other"), quiet=True)


def test_the_task_of_the_contributors_page_trains(tmp_path, forget):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    backbone = save_tiny_backbone(tmp_path, letters=True)  # it spells the words
    assert len(fit(tiny_config(backbone, task="films", max_train=None, batch_size=10), quiet=True).metrics) == 8


def test_what_the_contributors_page_names_is_there():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 10 and [link for link in links if not (ROOT / link).exists()] == []
