"""The file and its container: what is saved is read, what is none of ours is refused, and ArviZ works on it."""

import gc
import os
import subprocess
import sys
import types
import warnings

import arviz
import matplotlib
import numpy as np
import pytest
import torch
import xarray
from models import batch, tiny_bert

from pyro_blora import draw, predict
from pyro_blora.adapters import attach
from pyro_blora.guides import build_guide
from pyro_blora.posterior import arviz_compat, to_arviz
from pyro_blora.posterior.arviz_compat import (
    concatenate,
    group,
    group_names,
    held_out,
    held_out_elpd,
    held_out_scores,
    pareto_weights,
    read,
    save,
)
from pyro_blora.priors import build_prior
from pyro_blora.program import BayesianLoRA
from pyro_blora.tasks import get_task

pytestmark = pytest.mark.usefixtures("eager")

GROUPS = [
    "posterior", "prior", "sample_stats", "constant_data", "predictions", "predictions_constant_data",
]  # fmt: skip


def data_of(seed=0, draws=8, scope="adapted", rank=4, prior="nested", examples=6):
    """An untrained program's draws and predictions, as a run saves them."""
    torch.manual_seed(seed)
    net = attach(tiny_bert(), rank=rank, scope=scope, sequence_length=10)
    distribution = build_prior(prior, net.layout, {})
    guide = build_guide("mean_field", net.layout, distribution, {"open_logit": 0.5})
    task = get_task("acceptability")
    program = BayesianLoRA(net, distribution, guide, task.likelihood, n_train=100).eval()
    gates = draw(program, draws, seed=seed)
    prediction = predict(program, [batch(examples)], gates=gates)
    clipped = torch.rand(net.layout.z_shape[:2])
    return to_arviz(program, gates, prediction, labels=task.labels, clipped=clipped, seed=seed)


@pytest.mark.parametrize("prior", ["nested", "hierarchical"])
@pytest.mark.parametrize("scope", ["adapted", "encoder"])
def test_what_is_saved_is_read(tmp_path, scope, prior):
    data = data_of(scope=scope, prior=prior)
    save(data, tmp_path / "posterior.nc")
    again = read(tmp_path)
    assert set(group_names(again)) == set(GROUPS) and again.attrs["created_by"] == "pyro_blora"
    for name in GROUPS:
        xarray.testing.assert_identical(group(again, name), group(data, name))
    rates = {"rate"} if prior == "hierarchical" else set()
    assert rates <= set(group(again, "posterior").data_vars) and rates <= set(group(again, "prior").data_vars)
    assert ("log_ratio" in group(again, "sample_stats")) == bool(rates)


def test_a_file_that_was_read_can_be_written_again_and_holds_the_new_data(tmp_path):
    path = tmp_path / "posterior.nc"
    save(data_of(seed=0), path)
    first = read(path)
    save(data_of(seed=1), path)
    second = read(path)
    assert not group(second, "posterior")["z"].equals(group(first, "posterior")["z"])
    path.unlink()
    assert np.isfinite(group(first, "posterior")["bops_adapted"].values).all()  # in memory


def cut(path):
    save(data_of(), path)
    path.write_bytes(path.read_bytes()[:-2000])


def cut_early(path):
    save(data_of(), path)
    path.write_bytes(path.read_bytes()[:100])


def damaged(path):
    """Some bytes in the middle are of something else."""
    save(data_of(), path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[200:middle] = bytes(middle - 200)
    path.write_bytes(content)


def of_somebody_else(path):
    rng = np.random.default_rng(0)
    arrays = xarray.Dataset({"mu": (("chain", "draw"), rng.normal(size=(2, 10)))})
    save(arviz_compat.container({"posterior": arrays, "constant_data": arrays}), path)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist: a finished run has one"),
        (cut, r"cut short or no netCDF file \(.*restore a copy"),
        (cut_early, r"cut short or no netCDF file \(.*restore a copy"),
        (damaged, r"cut short or no netCDF file \(.*restore a copy"),
        (lambda path: path.touch(), r"cut short or no netCDF file \(.*restore a copy"),
        (lambda path: path.write_text("draws\n"), r"cut short or no netCDF file \(.*restore a copy"),
        (of_somebody_else, r"not of this version of pyro_blora.*open the file with ArviZ alone"),
    ],
    ids=["missing", "cut", "cut-early", "damaged", "empty", "text", "other"],
)
def test_a_file_that_is_none_is_one_sentence_and_is_read_once_it_is_restored(tmp_path, make, message):
    path = tmp_path / "posterior.nc"
    make(path)
    for where in (path, tmp_path):  # the file, or the folder of a run
        with pytest.raises(ValueError, match=message) as error:
            read(where)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    del error
    gc.collect()  # nothing half-made is left, whose end would raise in the middle of something else
    save(data_of(), tmp_path / "copy.nc")
    os.replace(tmp_path / "copy.nc", path)
    assert set(group_names(read(path))) == set(GROUPS)


def test_a_group_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match="no group 'posteriors', only posterior, "):
        group(data_of(), "posteriors")


def test_restarts_become_chains_with_their_seeds(tmp_path):
    parts = [data_of(seed=seed) for seed in (5, 6, 7)]
    save(concatenate(parts, [5, 6, 7]), tmp_path / "posterior.nc")
    joined = read(tmp_path)
    for chain, part in enumerate(parts):
        for name in GROUPS:
            mine, theirs = group(joined, name), group(part, name)
            assert set(mine.data_vars) == set(theirs.data_vars)
            for variable in theirs.data_vars:
                one = mine[variable].isel(chain=chain) if "chain" in mine[variable].dims else mine[variable]
                own = theirs[variable].isel(chain=0) if "chain" in theirs[variable].dims else theirs[variable]
                assert one.dims == own.dims and one.dtype == own.dtype
                np.testing.assert_array_equal(one.values, own.values)
    posterior = group(joined, "posterior")
    assert list(posterior["seed"].values) == [5, 6, 7] and list(posterior["chain"].values) == [0, 1, 2]
    assert "chain" not in group(joined, "predictions_constant_data").dims
    assert group(joined, "constant_data")["macs"].dims == ("projection",)
    assert group(joined, "constant_data").attrs == group(parts[0], "constant_data").attrs


@pytest.mark.parametrize(
    "other", [{"scope": "encoder"}, {"rank": 2}, {"draws": 9}, {"examples": 5}], ids=lambda other: next(iter(other))
)
def test_restarts_of_something_else_are_refused(other):
    with pytest.raises(ValueError, match="restarts do not fit together in group") as error:
        concatenate([data_of(), data_of(**other)], [0, 1])
    assert "\n" not in str(error.value)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0])
def test_the_shape_of_a_known_tail_is_found(shape):
    uniform = np.random.default_rng(0).uniform(size=20_000)
    weights, k = pareto_weights(-shape * np.log(uniform))  # ratios with a Pareto tail of that shape
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert k == pytest.approx(shape, abs=0.15)


def test_weights_are_ratios_but_for_a_smoothed_tail():
    log_ratios = np.random.default_rng(0).normal(size=1000)
    weights, k = pareto_weights(log_ratios + 700)  # whose exponentials no float holds
    order = np.argsort(log_ratios)
    assert k < 0.7 and (np.diff(weights[order]) >= -1e-15).all()
    body = order[:800]
    raw = np.exp(log_ratios[body])
    np.testing.assert_allclose(weights[body] / weights[body].sum(), raw / raw.sum())
    if not arviz_compat.IS_TREE:
        log_weights, shape = arviz.psislw(log_ratios)
        np.testing.assert_allclose(weights, np.exp(log_weights) / np.exp(log_weights).sum())
        assert k == pytest.approx(float(shape))


def test_few_draws_have_plain_weights_and_no_shape_to_trust():
    log_ratios = np.random.default_rng(0).normal(size=24)
    weights, k = pareto_weights(log_ratios)
    assert k == np.inf
    np.testing.assert_allclose(weights, np.exp(log_ratios) / np.exp(log_ratios).sum())
    assert not np.isnan(pareto_weights(np.random.default_rng(0).normal(size=25))[1])


@pytest.mark.skipif(arviz_compat.IS_TREE, reason="ArviZ 1.x is here itself: the tests above run it")
def test_the_weights_under_arviz_1_are_those_under_0(monkeypatch):
    """1.x takes log-likelihoods, whose negatives are the log ratios of leaving out: a stand-in with that convention."""
    log_ratios = np.random.default_rng(0).normal(size=400)
    expected, shape = pareto_weights(log_ratios)

    def psislw(log_likelihood, axis):
        return arviz.psislw(-log_likelihood)

    module = types.ModuleType("arviz_stats.base")
    module.array_stats = types.SimpleNamespace(psislw=psislw)
    monkeypatch.setitem(sys.modules, "arviz_stats", types.ModuleType("arviz_stats"))
    monkeypatch.setitem(sys.modules, "arviz_stats.base", module)
    monkeypatch.setattr(arviz_compat, "IS_TREE", True)
    weights, k = pareto_weights(log_ratios)
    np.testing.assert_allclose(weights, expected)
    assert k == pytest.approx(shape)


def test_largest_ratios_that_are_alike_have_plain_weights():
    log_ratios = np.log(np.where(np.arange(400) % 2, 1.0, 3.0))  # of two states
    weights, k = pareto_weights(log_ratios)
    np.testing.assert_allclose(weights, np.exp(log_ratios) / np.exp(log_ratios).sum())
    assert not np.isnan(k)


@pytest.mark.parametrize("draws", [1, 10, 100])
def test_draws_that_are_all_alike_weigh_the_same(draws):
    weights, k = pareto_weights(np.full(draws, -3.0))
    np.testing.assert_allclose(weights, 1 / draws)
    assert k == -np.inf


# --- ArviZ, as a user has it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["one", "restarts", "encoder"])
def opened(request, tmp_path_factory):
    """A file that ArviZ alone has opened: of one chain, of two, and with tensors that do not exist."""
    scope = "encoder" if request.param == "encoder" else "adapted"
    parts = [data_of(seed, draws=40, scope=scope) for seed in range(1 if request.param == "one" else 2)]
    path = tmp_path_factory.mktemp("file") / "posterior.nc"
    save(parts[0] if len(parts) == 1 else concatenate(parts, range(len(parts))), path)
    return arviz.from_netcdf(str(path)), len(parts), scope


def test_arviz_summarises_and_draws_by_name(opened):
    data, chains, scope = opened
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors without a value, and of a single chain
        table = arviz.summary(data, var_names=["bits", "ranks", "bops_adapted"])
        arviz.plot_forest(data, var_names=["bits", "ranks"])
        rhat = arviz.rhat(data, var_names=["bits"])["bits"]
    matplotlib.pyplot.close("all")
    line = table.loc["bits[0.query, lora_A]"]
    bits = data["posterior"]["bits"].sel(projection="0.query", tensor="lora_A")
    assert float(line["mean"]) == pytest.approx(float(bits.mean()), rel=0.01)
    assert "ranks[1.value]" in table.index and "bops_adapted" in table.index
    assert rhat.dims == ("projection", "tensor")
    if chains > 1:
        assert float(rhat.sel(projection="0.query", tensor="base")) == pytest.approx(
            1, abs=0.2
        )  # two distributions alike
    if scope == "encoder":
        assert (
            np.isnan(bits_of(data, "0.output", "lora_A")).all()
            and not np.isnan(bits_of(data, "0.output", "base")).any()
        )


def bits_of(data, projection, tensor):
    return data["posterior"]["bits"].sel(projection=projection, tensor=tensor).values


def test_a_gate_is_found_by_layer_type_tensor_and_rung(opened):
    data, chains, _ = opened
    posterior, constant = data["posterior"], data["constant_data"]
    gate = posterior["z"].sel(projection="1.value", tensor="lora_A", rung=8)
    assert gate.shape == (chains, 40)
    width = posterior["bits"].sel(projection="1.value", tensor="lora_A")
    assert np.array_equal(gate.values == 1, width.values >= 8)
    values = posterior["ranks"].where(constant["type"] == "value", drop=True)
    assert list(values["projection"].values) == ["0.value", "1.value"]
    distribution = constant["log_q_width"].sel(projection="1.value", tensor="lora_A", component=0)
    at_least = np.exp(distribution.sel(width=[8, 16, 32])).sum("width")
    marginal = constant["z_marginal"].sel(projection="1.value", tensor="lora_A", rung=8)
    np.testing.assert_allclose(at_least, marginal, atol=1e-5)
    np.testing.assert_allclose(gate.mean("draw"), marginal, atol=5 * 0.5 / 40**0.5)


def test_arviz_does_not_leave_out_what_was_held_out(opened):
    """Its loo and its compare take the rows of log_likelihood for training data."""
    data, _, _ = opened
    with pytest.raises(Exception, match=r"log.likelihood"):
        arviz.loo(data, pointwise=True)
    with pytest.raises(Exception, match=r"log.likelihood|ELPD"):
        arviz.compare({"one": data, "other": data_of(seed=9, draws=40)})


def test_held_out_rows_are_scored_by_their_averaged_probability(opened):
    data, chains, _ = opened
    labels = data["predictions_constant_data"]["label"].values
    probability = data["predictions"]["probability"].values  # chain, draw, example, class
    for chain in range(chains):
        expected = np.log(probability[chain].mean(0)[np.arange(len(labels)), labels])
        np.testing.assert_allclose(held_out_scores(data, chain), expected, rtol=1e-5)
        elpd, error = held_out_elpd(data, chain)
        assert elpd == pytest.approx(expected.mean(), rel=1e-5)
        assert error == pytest.approx(expected.std(ddof=1) / len(labels) ** 0.5, rel=1e-4)
    other = data_of(seed=9, draws=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one model may get all the weight
        settings = {"round_to": "none"} if arviz_compat.IS_TREE else {}
        table = arviz.compare(
            {name: held_out(held_out_scores(x), 40) for name, x in (("a", data), ("b", other))}, **settings
        )
    column = "elpd" if arviz_compat.IS_TREE else "elpd_loo"
    assert float(table.loc["a", column]) == pytest.approx(held_out_scores(data).sum(), abs=0.1)


def test_a_file_of_an_older_version_has_its_held_out_rows_where_they_are_now(tmp_path):
    new = data_of(draws=5)
    groups = {name: group(new, name) for name in group_names(new)}
    predictions = groups.pop("predictions")
    groups["log_likelihood"] = predictions[["log_likelihood"]].rename(log_likelihood="label")
    groups["posterior_predictive"] = predictions[["label", "probability"]]
    groups["observed_data"] = groups.pop("predictions_constant_data")
    save(arviz_compat.container(groups), tmp_path / "posterior.nc")
    again = read(tmp_path)
    assert set(group_names(again)) == set(GROUPS)
    for name in GROUPS:
        xarray.testing.assert_equal(group(again, name), group(new, name))
    joined = concatenate([again, data_of(seed=1, draws=5)], [0, 1])  # a restart of before with one of now
    assert group(joined, "predictions")["log_likelihood"].shape == (2, 5, 6)
    assert held_out_elpd(joined) == held_out_elpd(new)
    without = arviz_compat.container({name: group(new, name) for name in GROUPS if "predictions" not in name})
    with pytest.raises(ValueError, match="no group 'predictions'"):
        held_out_elpd(without)


@pytest.mark.skipif(arviz_compat.IS_TREE, reason="ArviZ 1.x writes nothing when it is imported")
def test_processes_that_import_it_at_once_do_not_fail(tmp_path):
    """ArviZ 0.23 notes the day of its announcement; here another process has moved its file away first."""
    code = """
import pathlib
real = pathlib.Path.replace
def beaten(self, target):
    pathlib.Path.replace = real
    real(self, target)
    raise FileNotFoundError(self)
pathlib.Path.replace = beaten
import pyro_blora.posterior.arviz_compat as found
assert found.arviz_itself().InferenceData and pathlib.Path.replace is real
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, check=True)
