"""A packed folder that is damaged or hostile ends in one sentence or changes nothing, and runs no code."""

import json
import shutil

import pytest
import torch
import transformers
from damage import damage_and_read
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, tiny_bert
from packed_models import allocated
from tiny import save_tiny_backbone

from pyro_blora.deploy import pack
from pyro_blora.deploy.manifest import SUM, _sum_of
from pyro_blora.deploy.packed import MANIFEST, WEIGHTS, load_packed

pytestmark = pytest.mark.usefixtures("eager")
INPUTS = batch(2, 7)[0]
BASE = {"name": "someone/tiny", "revision": None, "tensors": ["bert.x.weight"], "sha256": "0" * 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    program = allocated(lambda dropout: tiny_bert(num_hidden_layers=1), scope="encoder", smoothing=True)
    words = transformers.AutoTokenizer.from_pretrained(save_tiny_backbone(tmp_path_factory.mktemp("words")))
    return pack(program, tmp_path_factory.mktemp("packed") / "model", tokenizer=words)


def answer(folder):
    with torch.no_grad():
        return load_packed(folder)(**INPUTS).logits


def sentence(folder):
    """The one with which a folder is refused."""
    with pytest.raises(ValueError) as refused:
        load_packed(folder)
    said = str(refused.value)
    assert "\n" not in said and said.count(": ") <= 6 and len(said) < 700
    return said


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "README.md", "tokenizer.json"])
def test_damaged_bytes_end_in_a_sentence_or_change_nothing(name, folder, tmp_path):
    damage_and_read(shutil.copytree(folder, tmp_path / "copy"), name, answer, examples=30)


def leaves(value, path=()):
    """(path, value) of everything inside tables and lists."""
    if isinstance(value, dict | list):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inside, (*path, key))
    yield path, value


def sealed(copy, content):
    """Written with a hash that is right, as by somebody who means harm."""
    content.pop(SUM, None)
    (copy / MANIFEST).write_text(json.dumps({**content, SUM: _sum_of(content)}))


def test_a_description_with_a_right_hash_is_checked_by_its_schema(folder, tmp_path):
    copy, whole = shutil.copytree(folder, tmp_path / "copy"), (folder / MANIFEST).read_text()
    paths = [path for path, _ in leaves(json.loads(whole)) if path and path[0] != SUM]
    value = st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.text(max_size=4), st.just([]), st.just({}))

    @given(path=st.sampled_from(paths), value=value)
    @settings(max_examples=40, deadline=None)
    def edited(path, value):
        content = json.loads(whole)
        inside = content
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value
        sealed(copy, content)
        try:
            load_packed(copy)
        except ValueError as error:
            assert "\n" not in str(error)

    edited()


def changed(copy, *path, to):
    content = json.loads((copy / MANIFEST).read_text())
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = to
    sealed(copy, content)


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("version",), 3, "has version '3' of packed, this package reads 1 to 2: install a newer one"),
        (("version",), 0, "has version '0' of packed"),
        (("schema",), "other", "is no description of a model by packed"),
        (("architecture", "class"), "os", "architecture/class: \"os\" is not as version 2 of packed has it (pattern"),
        (("architecture", "class"), "Trainer", "has no model 'Trainer'"),
        (("architecture", "attention"), "kernels-community/flash", "architecture/attention"),
        (("architecture", "config", "auto_map"), {"AutoModel": "x--y.Z"}, "architecture/config"),
        (("architecture", "config", "hidden_size"), 48, "is not a packed model that can be built"),
        (("files", "../secret"), {"bytes": 1, "sha256": "0" * 64}, "lists a file '../secret', which is no plain name"),
        (("base",), {**BASE, "name": "../x"}, 'base/name: "../x" is not as version 2 of packed has it (pattern'),
        (("files", "more.json"), {"bytes": 1, "sha256": "0" * 64}, "more.json is missing"),
        (("projections", "bert.x"), {"shape": [1, 1], "bits": {"base": 2, "input": 2}}, "has no tensor bert.x.base"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(copy, path, to, said):
    changed(copy, *path, to=to)
    assert said in sentence(copy)


def test_smoothing_that_is_not_as_described_is_named(copy):
    entries = json.loads((copy / MANIFEST).read_text())["projections"]
    name, entry = sorted(entries.items())[0]
    changed(copy, "projections", name, to={key: x for key, x in entry.items() if key != "smoothed"})
    assert f"has unexpected keys: {name}.smoothing" in sentence(copy)


def test_a_file_that_is_missing_or_short_is_named(copy):
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-1])
    assert f"{copy / WEIGHTS} has" in sentence(copy)
    (copy / WEIGHTS).unlink()
    assert f"{copy / WEIGHTS} is missing" in sentence(copy)
