"""summary.json says what the folder beside it holds."""

import json

import pytest
from safetensors.torch import load_file
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.report.warnings import is_over_draws, warnings
from pyro_blora.run import train_run

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "changes",
    [{"method": "dylora"}, {"guide": "mixture", "prior": "nested", "prior_settings": {"rate": 2.0}}],
    ids=["dylora", "mixture"],
)
def test_the_parameters_of_the_adapter_are_those_that_are_exported(backbone, tmp_path, changes):
    folder = train_run(tiny_config(backbone, output_dir=str(tmp_path), **changes))
    exported = load_file(folder / "adapter" / "adapter_model.safetensors")
    sizes = sum(x.numel() for name, x in exported.items() if "lora_" in name)
    assert summary_of(folder)["adapter_parameters"] == sizes


@pytest.mark.parametrize("changes", [{"guide": "point"}, {"method": "adalora"}], ids=["point", "adalora"])
def test_a_guide_of_one_allocation_is_not_called_an_average(backbone, tmp_path, changes):
    told = summary_of(train_run(tiny_config(backbone, output_dir=str(tmp_path), **changes)))
    assert "nothing is random" in told["averaging"] and not is_over_draws(told)
    assert not any(text.startswith("Few draws") for text in warnings(told, None))
    assert told["nll"] == pytest.approx(told["deployed"]["nll"], abs=1e-5)
