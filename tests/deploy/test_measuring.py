"""A machine's table of times is measured, read back by a prior, and never overwritten."""

import itertools

import pytest
import torch
from models import tiny_bert
from tiny import save_tiny_backbone

from pyro_blora.__main__ import main
from pyro_blora.cost_table import Times, of_file
from pyro_blora.layout import AdapterLayout

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from pyro_blora.deploy import measuring
from pyro_blora.deploy.onnx_products import FastProduct

M, N = 6, 4


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Of a backbone with one product, as every graph is exported."""
    backbone, path = save_tiny_backbone(tmp_path_factory.mktemp("words")), tmp_path_factory.mktemp("t") / "costs.json"
    flags = ["--backbone", str(backbone), "--rank", "2", "--bit_widths", "2,32", "--batch", "1", "--length", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_shapes", lambda layout: [(M, N)])
        assert main(["measure-costs", "--to", str(path), "--quiet", *flags]) == 0
    return path, flags


def test_widths_of_one_kernel_have_one_figure(table):
    content = of_file(str(table[0]))["times"]
    times = Times(content)
    seconds, rounding = times.product(M, N), times.rounding(N)
    assert seconds.shape == (2, 2) and len({*seconds[1].tolist()}) == 1 and seconds[1, 0] > 0  # an input at 32 bit
    assert rounding[-1] == 0 and bool((rounding[:-1] > 0).all())
    assert content["rows"] == 5 and content["machine"]["threads"] == 1 and content["machine"]["processor"]


@pytest.mark.parametrize("columns", (8, 65))
def test_kernels_of_widths_are_those_of_an_export(columns):
    """Widths that share a figure have as many products of bytes, or none."""
    random = torch.Generator().manual_seed(0)
    of_kind = {}
    for one, other in itertools.product((2, 4, 8, 16, 32), repeat=2):
        read = measuring._Products(2, columns, one, other, random).each[0]
        product, rounds = read.products[0], read.codes is not None
        found = (rounds, (1 + read.codes.is_wide) if isinstance(product, FastProduct) else 0)
        assert of_kind.setdefault(measuring._kind(one, other, columns), found) == found
    assert len({*of_kind.values()}) == len(of_kind) == (4 if columns > 64 else 3)


def test_shapes_are_those_of_every_map_and_of_an_adapter_on_it():
    layout = AdapterLayout.of(tiny_bert(), rank=2, scope="encoder", sequence_length=4)
    shapes = measuring._shapes(layout)
    assert len({*shapes}) == len(shapes)
    for p in layout.projections:
        assert {(p.out_features, p.in_features), (2, p.in_features), (p.out_features, 2)} <= {*shapes}


def test_a_file_that_exists_and_numbers_that_are_none_end_in_a_sentence(table, tmp_path, capsys):
    path, flags = table
    assert main(["measure-costs", "--to", str(path), *flags]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["measure-costs", "--to", str(tmp_path / "new" / "costs.json"), *flags]) == 2  # before it measures
    assert "there is no folder" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["measure-costs", "--to", str(tmp_path / "other.json"), "--threads", "0"]) == 2
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err
