"""A machine's table of times is measured, read back by a prior, and never overwritten."""

import pytest
from models import tiny_bert
from tiny import save_tiny_backbone

from pyro_blora.__main__ import main
from pyro_blora.cost_table import Times, of_file
from pyro_blora.costs import latency
from pyro_blora.layout import AdapterLayout
from pyro_blora.priors import build_prior

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
WIDTHS = (2, 16, 32)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    backbone, path = save_tiny_backbone(tmp_path_factory.mktemp("words")), tmp_path_factory.mktemp("t") / "costs.json"
    flags = ["--backbone", str(backbone), "--rank", "2", "--bit_widths", "2,16,32", "--batch", "1", "--length", "4"]
    assert main(["measure-costs", "--to", str(path), "--quiet", *flags]) == 0
    return path, flags


def test_a_table_has_every_product_of_the_backbone(table):
    content = of_file(str(table[0]))["times"]
    layout = AdapterLayout.of(tiny_bert(), rank=2, scope="encoder", ladder=WIDTHS, sequence_length=4)
    times = Times(content)
    for p in layout.projections:
        for shape in ((p.out_features, p.in_features), (2, p.in_features), (p.out_features, 2)):
            seconds = times.product(*shape)
            assert seconds.shape == (3, 3) and bool((seconds[1:] > 0).all())
            assert len({*seconds[1:].flatten().tolist(), *seconds[:, 1:].flatten().tolist()}) == 1  # one float kernel
    assert times.rounding(layout.projections[0].in_features)[-1] == 0
    assert content["rows"] == 4 and content["machine"]["threads"] == 1 and content["machine"]["processor"]
    cost = latency(layout, times)
    closed, opened = (float(cost(*(q.mean for q in prior())).sum()) for prior in (
        build_prior("fixed", layout, {"bits": 2}), build_prior("fixed", layout, {"bits": 32})))  # fmt: skip
    assert opened == pytest.approx(float(cost.full_gated)) and closed > 0


def test_a_file_that_exists_and_numbers_that_are_none_end_in_a_sentence(table, tmp_path, capsys):
    path, flags = table
    assert main(["measure-costs", "--to", str(path), *flags]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["measure-costs", "--to", str(tmp_path / "other.json"), "--threads", "0"]) == 2
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err
