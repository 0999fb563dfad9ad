"""MACs of DeBERTa's positional stream are those of the formula, and differences have the sign that the page says."""

import pytest
import torch
import transformers
from models import deberta_v3_base, tiny_bert, tiny_deberta

from experiments.demo_deberta import counts, differences, differences_table
from experiments.studies.positions import by_formula, counted, model_table, projections_table, streams
from pyro_blora.models import backbone_path
from pyro_blora.models.deberta_from_bert import deberta_from_bert


@pytest.mark.parametrize("length", [1, 10, 33])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_counted_is_the_formula(length, batch_size):
    config = tiny_deberta().config
    assert counted(config, length, batch_size) == by_formula(config, length, batch_size)


def test_counted_is_the_formula_of_the_converted_minilm_and_of_deberta_v3_base():
    with torch.device("meta"):
        base = deberta_v3_base().config
    for config in (transformers.AutoConfig.from_pretrained(backbone_path("demo-deberta")), base):
        found = counted(config, 128)
        assert found == by_formula(config, 128)
        assert found.vectors == {"query": 16, "key": 16, "value": 0}
        assert found.share("query") == found.share("key") == 16 / 144 and found.share("value") == 0
    assert config.relative_attention  # what was counted is left as it was


def test_tables_have_a_line_for_each_kind_and_model():
    rows = streams({"tiny": tiny_deberta().config}, (8,))  # 8 tokens and 16 positions, of 2 layers of 32 x 32
    first = projections_table(rows).splitlines()[2]
    assert first == "| tiny | 8 | query | 0.5 | 0.5 | 16,384 | 1,024 | 1,024 | 5.9% | 11.1% | 66.7% |"
    products = 2 * 2 * 8 * 16 * 32
    assert f"| {products:,} | {products:,} |" in model_table(rows).splitlines()[2]


def test_what_a_converted_bert_projects_of_positions_is_zero_and_comes_out_as_the_biases():
    deberta, seen = deberta_from_bert(tiny_bert().bert), []
    attention = deberta.encoder.layer[1].attention.self
    for projection in (attention.query_proj, attention.key_proj):
        projection.register_forward_hook(lambda module, args, output: seen.append((args[0], output - module.bias)))
    with torch.no_grad():
        deberta(torch.arange(10)[None])
    shifts = [(given.abs().max(), shift.abs().max()) for given, shift in seen if given.shape == (1, 512, 32)]
    assert shifts == [(0, 0)] * 2 and len(seen) == 4


def cell(backbone, method, decision, log_likelihood):
    examples = {"label": [0, 1, 1, 1], "decision": decision, "log_likelihood": log_likelihood}
    return {"task": "sst2", "backbone": backbone, "method": method, "examples": examples}


def test_differences_are_of_the_first_less_the_second():
    cells = [
        cell("demo-deberta", "LoRA", [0, 1, 1, 1], [-0.1] * 4),
        cell("demo-deberta", "`bops`, adapted", [0, 1, 1, 1], [-0.1] * 4),
        cell("demo", "LoRA", [0, 1, 1, 0], [-0.3] * 4),
    ]
    found = differences(cells)
    across, within = differences_table(found).splitlines()[2:]
    assert across.startswith("| sst2 | LoRA: demo-deberta less demo | +0.250 [") and across.endswith("| NLL |")
    assert "| -0.200 [-0.200, -0.200] |" in across
    assert within == (
        "| sst2 | demo-deberta: `bops`, adapted less LoRA | +0.000 [+0.000, +0.000] | +0.000 [+0.000, +0.000] | no |"
    )
    assert counts(found).splitlines() == [
        "- MiniLM as DeBERTaV3 less MiniLM: of 1, 0 beyond noise in accuracy and 1 in NLL.",
        "- `bops` less LoRA: of 1, 0 beyond noise in accuracy and 0 in NLL.",
    ]
