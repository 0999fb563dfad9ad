"""The prior `allocation`: what is read is pinned, stays in the configuration, and what does not fit is refused."""

import json
import shlex

import pytest
import torch
from tiny import save_tiny_backbone, tiny_config

from pyro_blora.bops import expected_bits, expected_rank
from pyro_blora.config import RunConfig
from pyro_blora.config.command_line import command_line, take_settings
from pyro_blora.deploy import load
from pyro_blora.posterior import deployed
from pyro_blora.priors import build_prior
from pyro_blora.priors.allocation import table_of
from pyro_blora.run import train_run


def table(layout, seed=0) -> dict:
    """Widths and ranks of a random allocation."""
    torch.manual_seed(seed)
    z = (torch.rand(layout.z_shape) < 0.7).float().cumprod(-1)
    return table_of(layout, z, (torch.rand(layout.g_shape) < 0.8).float().cumprod(-1))


def test_every_gate_is_pinned_where_the_table_has_it(layout):
    widths = table(layout)
    prior = build_prior("allocation", layout, {"widths": widths})()
    for distribution in prior:
        assert bool(((distribution.mean == 0) | (distribution.mean == 1)).all())
    assert table_of(layout, prior.z.mean, prior.g.mean) == widths
    bits, ranks = expected_bits(layout, prior.z.mean), expected_rank(prior.g.mean)
    for i, name in enumerate(layout.names):
        for t, tensor in enumerate(layout.tensors):
            assert not layout.z_mask[i, t] or bits[i, t] == widths[name][tensor]
        assert not layout.projections[i].adapted or ranks[i] == widths[name]["rank"]


def change(widths, name, **values):
    kept = {key: value for key, value in widths[name].items() if values.get(key, 0) is not None}
    return {**widths, name: {**kept, **{key: value for key, value in values.items() if value is not None}}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w, n: {**w, "99.value": w[n]}, "of another model: it has '99.value'"),
        (lambda w, n: {key: x for key, x in w.items() if key != n}, "lacks projection"),
        (lambda w, n: change(w, n, base=None), "lacks 'base': it needs input, base"),
        (lambda w, n: change(w, n, base=6), "base must be one of 2, 4, 8, 16, 32, got 6"),
        (lambda w, n: change(w, n, base="8"), "base must be one of 2, 4, 8, 16, 32, got '8'"),
        (lambda w, n: change(w, n, rank=99), "rank must be 1 to"),
        (lambda w, n: change(w, n, bias=8), "unknown 'bias'"),
        (lambda w, n: [w], "must be a table"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(layout, wrong, message):
    with pytest.raises(ValueError, match=message):
        build_prior("allocation", layout, {"widths": wrong(table(layout), layout.names[0])})


def test_exactly_one_source_is_needed(layout, tmp_path):
    with pytest.raises(ValueError, match=r"needs one allocation, got 0: give either --prior.file"):
        build_prior("allocation", layout)
    with pytest.raises(ValueError, match=r"there is no file .*none.json"):
        RunConfig(prior="allocation", prior_settings={"file": str(tmp_path / "none.json")})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        RunConfig(prior="allocation", prior_settings={"file": str(tmp_path / "bad.json")})
    with pytest.raises(ValueError, match="does not exist: a finished run has one"):
        RunConfig(prior="allocation", prior_settings={"run": str(tmp_path / "none")})


def test_what_is_read_is_in_the_configuration(layout, tmp_path):
    file = tmp_path / "widths.json"
    file.write_text(json.dumps(table(layout)))
    config = RunConfig(prior="allocation", prior_settings={"file": str(file)})
    of_a_site = RunConfig(prior="bops", prior_settings={"z": "allocation", "z.file": str(file)})
    file.write_text(json.dumps(table(layout, seed=1)))
    other = RunConfig(prior="allocation", prior_settings={"file": str(file)})
    file.unlink()
    assert config.prior_settings == {"widths": table(layout)}
    assert of_a_site.prior_settings == {"z": "allocation", "z.widths": table(layout)}
    assert config.digest != other.digest
    assert RunConfig.from_json(config.to_json()) == config
    assert take_settings(shlex.split(command_line(config)))[0] == {"prior.widths": table(layout)}  # so it is repeated
    with pytest.raises(ValueError, match=r"sets .widths., which is set already"):
        file.write_text("{}")
        RunConfig(prior="allocation", prior_settings={"file": str(file), "widths": {}})


@pytest.mark.usefixtures("eager")
def test_a_run_is_trained_on_at_the_allocation_of_another(tmp_path):
    backbone = save_tiny_backbone(tmp_path / "tiny")
    first = tiny_config(backbone, output_dir=str(tmp_path / "runs"), epochs=1, prior="random",
                        prior_settings={"bops": 0.1, "seed": 3})  # fmt: skip
    widths = train_run(first, quiet=True)
    second = tiny_config(backbone, output_dir=str(tmp_path / "runs"), epochs=1, prior="allocation",
                         prior_settings={"run": str(widths)})  # fmt: skip
    expected = deployed(load(widths))
    run = train_run(second, quiet=True)
    widths.rename(tmp_path / "gone")
    for found, wanted in zip(deployed(load(run)), expected, strict=True):
        assert torch.equal(found, wanted)
