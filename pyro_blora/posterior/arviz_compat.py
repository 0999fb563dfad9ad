"""ArviZ's container, its file and its statistics. The only module that knows ArviZ's version; it needs no torch.

ArviZ 0.x (Python 3.11) has InferenceData, 1.x (Python 3.12 and later) xarray's DataTree. Both are groups of
`xarray.Dataset`, which is what the functions here take and return.
"""

import functools
import importlib.metadata
import io
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
import pandas as pd
import xarray
from xarray.backends import H5NetCDFStore

IS_TREE = int(importlib.metadata.version("arviz").split(".")[0]) >= 1
_FILE = "posterior.nc"
_OLDER_GROUPS = ("log_likelihood", "posterior_predictive", "observed_data")  # of held-out rows, in older files
_TAIL_DRAWS = 25  # fewer leave less than the five that a Pareto tail is fitted to


@functools.cache
def arviz_itself():
    """ArviZ, imported when something of it is needed, as it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.x once a day
        try:
            import arviz
        except FileNotFoundError:  # and notes the day in a file: of processes that do so at once, all but one fail
            import arviz
    return arviz


def container(groups: Mapping[str, xarray.Dataset], attrs: Mapping[str, str] | None = None):
    """Datasets by group as ArviZ's container: an InferenceData (0.x) or a DataTree (1.x)."""
    for dataset in groups.values():
        for name in dataset.data_vars:
            if dataset[name].dtype.kind in "fiu" and dataset[name].ndim:
                dataset[name].variable.encoding.update(zlib=True, complevel=4)
    if IS_TREE:
        tree = xarray.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
        tree.attrs.update(attrs or {})
        return tree
    return arviz_itself().InferenceData(attrs=dict(attrs or {}), **groups)


def group_names(data) -> list[str]:
    """The groups of a container, in its order."""
    return list(data.children) if IS_TREE else data.groups()


def group(data, name: str) -> xarray.Dataset:
    """One group of a container.  Errors: ValueError naming the groups that are there."""
    if name not in group_names(data):
        raise ValueError(f"there is no group {name!r}, only {', '.join(group_names(data)) or 'nothing'}")
    return data[name].to_dataset() if IS_TREE else data[name]


class _Once(h5py.File):
    """A file that opens each object once: h5netcdf asks for it again for every property of a variable."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._opened: dict = {}

    def __getitem__(self, name):
        if not isinstance(name, str):  # a reference
            return super().__getitem__(name)
        found = self._opened.get(name)
        if found is None or found.name is None:  # deleted, to be made anew
            found = self._opened[name] = super().__getitem__(name)
        return found


def save(data, path: Path) -> None:
    if IS_TREE:
        data.to_netcdf(str(path), engine="h5netcdf")
        return
    written = io.BytesIO()  # HDF5 may crash the process when a disk is full
    with _Once(written, "w", track_order=True) as file, h5netcdf.File(file, "w") as opened:
        groups = {"/": xarray.Dataset(attrs=data.attrs), **{f"/{name}": data[name] for name in data.groups()}}
        for name, dataset in groups.items():
            squeezed = {v: {"zlib": True} for v, x in dataset.variables.items() if x.dtype.kind in "biufc"}
            dataset.dump_to_store(H5NetCDFStore(opened, group=name, mode="w"), encoding=squeezed)
    path.write_bytes(written.getbuffer())


def read(path: str | Path):
    """The container of a posterior.nc (or of the run folder that has one), in memory, the file closed.

    Held-out rows of older files are moved to the groups that hold them now.
    Errors: ValueError for a file that is missing, cut short, no netCDF, or not of this package.
    """
    path = Path(path)
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a finished run has one")
    try:
        with _Once(
            io.BytesIO(path.read_bytes()), "r"
        ) as file:  # from memory: no handle stays open, whatever is found inside
            file.visititems(lambda name, item: None)  # every header: h5netcdf stumbles over a bad one, and again later
            names = [name for name, item in file.items() if isinstance(item, h5py.Group)]
            with h5netcdf.File(file, "r", decode_vlen_strings=True) as opened:
                stores = (H5NetCDFStore(opened, group=name) for name in (None, *names))
                root, *parts = (xarray.open_dataset(store).load() for store in stores)
        found = dict(zip(names, parts, strict=True))
    except Exception as error:  # whatever h5py, xarray or ArviZ make of bytes that are none of theirs
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read, it is cut short or no netCDF file ({said}): restore a copy") from None
    if "layout" not in found.get("constant_data", xarray.Dataset()).attrs:
        raise ValueError(
            f"{path} is not of this version of pyro_blora: its constant_data has no layout. Train the run again, or "
            "open the file with ArviZ alone"
        )
    return container(_with_predictions(found), dict(root.attrs))


def _with_predictions(groups: dict[str, xarray.Dataset]) -> dict[str, xarray.Dataset]:
    """Move held-out rows of older files out of the group whose rows `arviz.loo` takes for training data."""
    if "predictions" in groups or "log_likelihood" not in groups:
        return groups
    kept = {name: x for name, x in groups.items() if name not in _OLDER_GROUPS}
    likelihood, predicted, observed = (groups.get(name, xarray.Dataset()) for name in _OLDER_GROUPS)
    kept["predictions"] = predicted.assign(log_likelihood=likelihood["label"])
    kept["predictions_constant_data"] = observed
    return kept


def concatenate(parts: Iterable, seeds: Iterable[int]):
    """Join containers of one chain each: chains are numbered from 0, and coordinate `seed` has their seeds.

    Errors: ValueError where they are not of the same gates or examples.
    """
    parts, seeds = list(parts), list(seeds)
    joined = {}
    for name in group_names(parts[0]):
        datasets = [group(part, name) for part in parts]
        alike = [v for v in datasets[0].data_vars if "chain" not in datasets[0][v].dims]
        first = {v: datasets[0][v] for v in alike}
        if any(d.attrs != datasets[0].attrs or any(v not in d or not x.equals(d[v]) for v, x in first.items())
               for d in datasets[1:]):  # fmt: skip
            raise ValueError(f"restarts do not fit together: group {name!r} is of another layout or of other examples")
        chained = [v for v in datasets[0].data_vars if "chain" in datasets[0][v].dims]
        if not chained:
            joined[name] = datasets[0]
            continue
        try:
            joined[name] = xarray.concat(
                datasets, dim="chain", data_vars=chained, coords="minimal", compat="override", join="exact",
                combine_attrs="override",
            ).assign_coords(chain=range(len(parts)), seed=("chain", seeds))  # fmt: skip
        except ValueError as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"restarts do not fit together in group {name!r}: {said}") from None
    return container(joined, dict(parts[0].attrs))


def held_out_scores(data, chain: int = 0) -> np.ndarray:
    """Log score of every held-out row, (E,), nats: log of its label's probability averaged over the draws of a chain.

    Errors: ValueError for data without held-out rows.
    """
    each = group(data, "predictions")["log_likelihood"].isel(chain=chain).transpose("draw", "example").values
    return np.logaddexp.reduce(each.astype(float), axis=0) - np.log(len(each))


def held_out_elpd(data, chain: int = 0) -> tuple[float, float]:
    """(held-out elpd, standard error over the rows) of a chain, nats per example: the mean log score, minus its NLL.

    A chain of an ensemble is one member, whose NLL is not that of the run.
    """
    scores = held_out_scores(data, chain)
    return float(scores.mean()), float(scores.std(ddof=1) / np.sqrt(len(scores)))


def held_out(log_scores: np.ndarray, draws: int):
    """ArviZ's ELPDData of held-out examples, for `arviz.compare`: their log scores need no leaving out.

    log_scores (E,): of the predictive density averaged over `draws`, nats, from `held_out_scores`. ArviZ knows such
    data as `loo` only.
    """
    E = len(log_scores)
    pointwise = xarray.DataArray(np.asarray(log_scores, dtype=float), dims=["example"])
    total, error = float(pointwise.sum()), float(np.sqrt(E * pointwise.var()))
    if IS_TREE:
        from arviz_stats.utils import ELPDDataLOO

        return ELPDDataLOO(
            elpd=total, se=error, p=0.0, n_samples=draws, n_data_points=E, scale="log", warning=False, good_k=0.7,
            elpd_i=pointwise,
        )  # fmt: skip
    arviz_itself()
    from arviz.stats.stats_utils import ELPDData

    return ELPDData(pd.Series({
        "elpd_loo": total, "se": error, "p_loo": 0.0, "n_samples": draws, "n_data_points": E, "warning": False,
        "loo_i": pointwise, "scale": "log",
    }))  # fmt: skip


def leave_one_out(log_likelihood: np.ndarray, log_joint: np.ndarray, log_q: np.ndarray):
    """(ArviZ's PSIS-LOO of training examples under draws of a guide, whether it is corrected for the guide).

    log_likelihood (S, E), log_joint and log_q (S,) of the same draws, nats. ArviZ 1.x weighs the draws by joint over
    guide; 0.x takes them for draws of the posterior.
    Source: Magnusson et al., Bayesian leave-one-out cross-validation for large data (2019).
    """
    data = container({
        "posterior": xarray.Dataset({"log_q": (("chain", "draw"), log_q[None])}),
        "log_likelihood": xarray.Dataset({"label": (("chain", "draw", "example"), log_likelihood[None])}),
    })  # fmt: skip
    if IS_TREE:
        weights = [xarray.DataArray(x[None], dims=["chain", "draw"]) for x in (log_joint, log_q)]
        return arviz_itself().loo_approximate_posterior(data, *weights, pointwise=True), True
    return arviz_itself().loo(data, pointwise=True, reff=1.0), False


def pareto_weights(log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed importance weights (S,), which sum to 1, of log ratios (S,), and the shape k of their tail.

    Above k = 0.7 the weights are not to be trusted; fewer than 25 draws have no tail to speak of, k is infinite.
    Source: Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling (2024).
    """
    log_ratios = np.asarray(log_ratios, dtype=float)
    if np.ptp(log_ratios) < 1e-9:  # all draws alike: nothing to weigh
        return np.full(len(log_ratios), 1 / len(log_ratios)), float("-inf")
    log_weights, k = log_ratios, float("inf")
    if len(log_ratios) >= _TAIL_DRAWS and IS_TREE:
        from arviz_stats.base import array_stats

        try:  # it takes log-likelihoods, whose negatives are the ratios of leaving out
            log_weights, k = array_stats.psislw(-log_ratios, axis=-1)
        except ValueError:  # the largest are all alike: a tail that is bounded and needs no smoothing
            k = float("-inf")
    elif len(log_ratios) >= _TAIL_DRAWS:
        log_weights, k = arviz_itself().psislw(log_ratios)
    k = float("inf") if np.isnan(k) else k  # too few distinct values for a fit
    weights = np.exp(np.asarray(log_weights) - np.max(log_weights))
    return weights / weights.sum(), float(k)
