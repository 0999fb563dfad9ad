"""Other rungs than 2, 4, 8, 16, 32 bit: a run with 3 and 6 bit from flag to predictions, and what is refused."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import save_tiny_backbone, tiny_config

from pyro_blora import RunConfig, load
from pyro_blora.__main__ import main
from pyro_blora.bit_widths import LADDER, ladder_of
from pyro_blora.config.naming import digest
from pyro_blora.layout import LORA_A
from pyro_blora.posterior import Posterior, deployed
from pyro_blora.posterior.arviz_compat import group, read
from pyro_blora.report.charts import VIRIDIS, gate_map
from pyro_blora.report.sections.gates import cells_of
from pyro_blora.run import train_run
from pyro_blora.training import fit

SEVEN = "2,3,4,6,8,16,32"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def test_a_run_with_other_rungs_goes_from_flag_to_predictions(backbone, tmp_path):
    config = tiny_config(
        backbone, bit_widths=[2, 3, 4, 6, 8, 16, 32], output_dir=str(tmp_path), prior_settings={"rate": 3}
    )
    assert config.bit_widths == SEVEN
    folder = train_run(config)
    cut = tmp_path / "cut"
    fit(config, folder=cut, quiet=True, until=5)
    resumed = fit(config, folder=cut, quiet=True).parts.program
    loaded = load(folder)
    for (name, mine), other in zip(resumed.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, other), name

    assert loaded.layout.ladder == (2, 3, 4, 6, 8, 16, 32) and loaded.layout.z_shape[-1] == 6
    assert list(group(read(folder), "posterior")["rung"].values) == [3, 4, 6, 8, 16, 32]
    kept = pd.read_parquet(folder / "predictions.parquet")
    probabilities = [name for name in kept if name.startswith("p_")]
    assert probabilities
    np.testing.assert_array_equal(loaded.predict(kept)[probabilities], kept[probabilities])

    posterior = Posterior(read(folder))
    assert posterior.what_if(f"{posterior.projections[0]}.lora_A.6", True).opened
    specification = json.dumps(gate_map(cells_of(posterior), posterior.layout.ladder))
    assert VIRIDIS[0] in specification and VIRIDIS[-1] in specification
    z, _ = deployed(loaded)
    assert int(z[:, LORA_A].sum(-1).max()) <= 6


@pytest.mark.parametrize(
    "given", ["4,2,32", "2,4,8", "1,2,32", "2,4,4,32", "2,20,32", "16,32", "32", "", "2,x,32", "2;4;32"]
)
def test_what_is_no_ladder_is_one_sentence_and_code_2(given, capsys):
    assert main(["train", "--bit_widths", given]) == 2
    _, told = capsys.readouterr()
    assert told.count("\n") == 1 and "bit_widths must" in told and "2,4,8,16,32 is usual" in told


def test_the_default_ladder_leaves_digests_as_they_were():
    values = dataclasses.asdict(RunConfig())
    assert ladder_of(values["bit_widths"]) == LADDER
    assert digest({name: value for name, value in values.items() if name != "bit_widths"}) == RunConfig().digest
    assert RunConfig(bit_widths=" 2, 4,8,16,32").digest == RunConfig().digest != RunConfig(bit_widths=SEVEN).digest
