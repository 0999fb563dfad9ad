"""Every Python block of README and docs/ runs: a page in one namespace, on a tiny network, in a fresh folder."""

import ast
import re

import pandas as pd
import pytest
import torch
import transformers
from pages import GUIDES, ROOT, blocks
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.run import train_run

pytestmark = pytest.mark.usefixtures("eager")
WITH_CODE = [page for page in GUIDES if blocks(page, "python")]
SMALLER = {  # what the pages show takes minutes: the same on a tiny network
    '"runs/acceptability-demo-bops-e4812fd6': '"RUN',
    '"runs/…': '"RUN',
    '"runs/priors': '"GRID',
    '"3.value"': '"1.value"',  # of two layers
    'backbone="demo"': 'backbone="TINY"',
    "epochs=5": "epochs=1, max_train=32, max_length=32",
    "epochs=2": "epochs=1, max_length=32",
    '"path/to/tokenizer"': '"TINY"',
}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """What the pages take as given: a backbone, a run, a grid's table."""
    folder = tmp_path_factory.mktemp("documentation")
    tiny = save_tiny_backbone(folder / "tiny", letters=True, max_position_embeddings=128)
    run = train_run(tiny_config(tiny, prior="bops", output_dir=str(folder / "runs")))
    (folder / "grid").mkdir()
    pd.DataFrame({"prior": ["nested"]}).to_parquet(folder / "grid" / "results.parquet")
    return {"TINY": str(tiny), "RUN": str(run), "GRID": str(folder / "grid")}


@pytest.fixture
def names(things):
    """Names that a page may use without making them, each of them described in its text."""
    backbone = transformers.AutoModelForSequenceClassification.from_pretrained(things["TINY"], num_labels=2)
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    return {"backbone": backbone, "batch": batch}


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_blocks_of_a_page_run(page, things, names, tmp_path, monkeypatch, forget):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "analysis").symlink_to(ROOT / "analysis")
    for number, block in enumerate(blocks(page, "python")):
        for shown, smaller in SMALLER.items():
            block = block.replace(shown, smaller)
        for word, thing in things.items():
            block = re.sub(rf'"{word}\b', f'"{thing}', block)
        for function in (node.name for node in ast.parse(block).body if isinstance(node, ast.FunctionDef)):
            (tmp_path / f"{function}.py").write_text(block, encoding="utf-8")  # as the page says: `late.py:late`
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)


def test_pages_with_code_are_found():
    assert {"README.md", "docs/tutorial/first-run.md", "docs/how-to/own-parts.md"} <= set(WITH_CODE)
