"""The seam of outcomes: what a kind is, is known in tasks/ alone; a user's own kinds go the whole way."""

import ast
import json
import re
from pathlib import Path

import kinds
import pandas as pd
import pytest
import transformers
from models import _SMALL
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import load
from pyro_blora.models import load_backbone, load_tokenizer
from pyro_blora.posterior.arviz_compat import group, read
from pyro_blora.run import train_run
from pyro_blora.tasks.likelihoods import LIKELIHOODS

pytestmark = pytest.mark.usefixtures("eager", "drawn")
PACKAGE = Path(__file__).resolve().parents[2] / "pyro_blora"
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "tasks"]
KINDS = {"categorical", "normal", "multi_label", "token_labels", "causal_lm", "multiple_choice", "spans"}
FILES = {"categorical", "normal", "multi_label", "token_labels", "causal_lm", "multiple_choice", "spans", "glue_metric"}
NAMED = re.compile(
    r"AutoModelFor\w+|ForSequenceClassification|SEQ_CLS|TOKEN_CLS|QUESTION_ANS|(single|multi)_label|is_classification|"
    r"(text|token)-classification|regression|DataCollator\w*|\bGlueScore\b|\bstsb\b"
)
OF_KINDS = r"Categorical|Normal\b|MultiLabel|TokenLabels|CausalLM|MultipleChoice|Spans"
OBJECTS = ("likelihood", "kind", "outcome", "task", "head")
ASKED = {"problem_type", "num_labels", "outputs", "classes", "names", "label_range", "title", "auto_class", "task_type"}


def faults(source):
    """Where a module asks which kind of outcome it has."""
    tree = ast.parse(source)
    prose = {id(node.body[0].value) for node in ast.walk(tree)
             if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and set((node.module or "").split(".")) & FILES:
            yield f"line {node.lineno} imports {node.module}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("tasks"):
            yield from (f"line {node.lineno} imports {x.name}" for x in node.names if x.name in FILES)
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if NAMED.search(name) or name in ("MultiLabel", "TokenLabels", "CausalLM", "MultipleChoice", "Spans"):
                yield f"line {node.lineno} names {name}"
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        if is_text and (NAMED.search(node.value) or node.value in KINDS - {"normal"}):  # which is a font's weight, too
            yield f"line {node.lineno} has {node.value!r}"
        for side in (node.left, *node.comparators) if isinstance(node, ast.Compare) else ():
            if isinstance(side, ast.Attribute) and side.attr in ASKED and ast.unparse(side.value).endswith(OBJECTS):
                yield f"line {node.lineno} compares {ast.unparse(node)}"
        is_asked = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and len(node.args) == 2
        if is_asked and re.search(OF_KINDS, ast.unparse(node.args[1])):
            yield f"line {node.lineno} asks {ast.unparse(node)}"


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_outside_tasks_asks_which_kind_of_outcome_it_is(path):
    assert not [*faults(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("source", [
    "from ..tasks.normal import Normal", "from .tasks import multi_label", "if kind.problem_type == 'x': pass",
    "if task.num_labels == 1: pass", "isinstance(program.likelihood, Normal)", "x = 'regression: none'",
    "transformers.AutoModelForTokenClassification", "if distribution.kind == 'multi_label': pass",
    "from .tasks.glue_metric import GlueScore", "while task.likelihood.outputs > 1: pass",
])  # fmt: skip
def test_every_way_to_ask_is_seen(source):
    assert [*faults(source)]


def test_the_kinds_of_the_package_are_registered():
    assert set(LIKELIHOODS.names()) >= KINDS


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(encoder, tmp_path_factory):
    """A Llama with a head over the encoder's vocabulary."""
    folder, tokenizer = tmp_path_factory.mktemp("decoder"), load_tokenizer(str(encoder))
    sizes = {**_SMALL, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "pad_token_id": 0}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["spans", "choices", "next"])
def run(request, encoder, decoder, tmp_path_factory):
    kinds.register()
    changes = {"task": request.param, "output_dir": str(tmp_path_factory.mktemp("runs")), "epochs": 6, "lr": 5e-3}
    if request.param == "next":
        return train_run(tiny_config(decoder, target_modules=("q_proj", "v_proj"), scope="encoder", **changes))
    return train_run(tiny_config(encoder, **changes))


def test_a_kind_of_a_users_own_goes_from_data_to_a_page_and_back(run):
    summary = json.loads((run / "summary.json").read_text())
    first, *_, last = (json.loads(line)["nll"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert last < first
    program, table = load(run), pd.read_parquet(run / "predictions.parquet")
    kind = next(task.likelihood for task in kinds.TASKS if task.name == summary["task"])
    assert program.likelihood == kind
    observed = group(read(run), "predictions_constant_data")[kind.observed]
    assert observed.dims == kind.dims[kind.observed] and observed.shape[0] == len(table)
    assert kind.read(table).shape[0] == len(table)
    assert len(program.predict(table.head(5))) == 5
    page = (run / "report.html").read_text()
    assert "Gate map" in page and summary["metric"]["name"] in page
    assert "registered by a script" in page and "import kinds  # registers task" in page and "train_run(" in page
    card = (run / "adapter" / "README.md").read_text()
    assert kind.head.auto_class in card


def test_the_head_of_a_language_model_stays_as_it_is_and_must_be_there(encoder, decoder, tmp_path):
    kind = kinds.NextTokens()
    model = load_backbone(str(decoder), kind)
    model.base_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head.weight is missing"):
        load_backbone(str(tmp_path), kind)
