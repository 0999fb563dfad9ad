"""Cells of a study: runs of `pyro-blora train` that share the part of training in which nothing is random yet.

Until the gates start, a run does not depend on its prior or guide: it is plain LoRA. So the LoRA of a task and seed is
trained once, and each cell resumes from its checkpoint, through the same bits as if it had been trained alone. (If its
gates start later than those of the LoRA's configuration, then up to the dropout masks in between.)

A finished cell is one small JSON file: configuration, summary, logged lines, expected ranks, what was predicted of each
example, without its text, and a digest of the package's code. So a study may be spread out over days and machines, and
its tables are made again without training. An interrupted cell resumes.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd

import pyro_blora
from pyro_blora.build import build
from pyro_blora.checkpoint import read_tensors, require_same_origin, trainable, write_tensors
from pyro_blora.config import RunConfig
from pyro_blora.posterior.arviz_compat import arviz_itself
from pyro_blora.registries import TASKS
from pyro_blora.run import train_run, versions
from pyro_blora.training import Schedule, fit
from pyro_blora.training.identity import identity

PREDICTED = ("decision", "log_likelihood", "deployed_decision", "deployed_log_likelihood")
CHECKPOINT = Path("checkpoints/state.safetensors")
_ELSEWHERE = ("glue_dir", "output_dir")  # where a cell was run, not what


def folder_of(config: RunConfig) -> Path:
    return config.folder


def kept(path: Path, config: RunConfig) -> dict | None:
    """The cell in the file, None where there is none.  Errors: ValueError for the file of another configuration."""
    if not path.exists():
        return None
    cell = json.loads(path.read_text(encoding="utf-8"))
    known = settings_of(RunConfig.from_dict(cell["config"]))  # fields that are newer than the cell had their defaults
    if known != settings_of(config):
        wrong = sorted(key for key, value in settings_of(config).items() if known[key] != value)
        raise ValueError(f"{path} is of another configuration ({', '.join(wrong)} differ): give another --keep")
    return cell


def finished(path: Path, config: RunConfig, lora: RunConfig, n_train: int, *, train: bool = True) -> dict | None:
    """The cell in the file; where it is missing, trained from the shared LoRA of `n_train` examples, or None."""
    cell = kept(path, config)
    if cell is not None or not train:
        return cell
    trained(config, lora, n_train)
    cell = _read(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(cell) + "\n", encoding="utf-8")
    path.with_suffix(".tmp").rename(path)
    return cell


def trained(config: RunConfig, lora: RunConfig, n_train: int) -> Path:
    """The folder of the run, trained from the shared LoRA of `n_train` examples where it is missing."""
    folder = folder_of(config)
    partial = folder.with_name(f".{folder.name}.partial")
    if not folder.exists():
        if not partial.exists() and Schedule.of(config, n_train).opening > 0:
            warm(config, trunk(lora, Schedule.of(config, n_train)), partial)
        train_run(config)
    return folder


def trunk(lora: RunConfig, schedule: Schedule) -> Path:
    """The checkpoint of `lora` at the step where the gates of `schedule` start, going on from an earlier one."""
    steps = min(schedule.opening, schedule.steps - 1)
    root = lora.folder.parent / f".trunk-{lora.folder_name}"
    folder = root / str(steps)
    if not folder.exists():
        earlier = [int(path.name) for path in root.glob("[0-9]*") if int(path.name) < steps]
        if earlier:
            copy = root / f".{steps}"  # no number: half a copy is none
            shutil.copytree(root / str(max(earlier)), copy, dirs_exist_ok=True)
            copy.rename(folder)
    if not (folder / CHECKPOINT).exists() or int(read_tensors(folder / CHECKPOINT)[1]["step"]) < steps:
        fit(lora, folder=folder, until=steps)  # goes on where it was interrupted
    return folder / CHECKPOINT


def warm(config: RunConfig, source: Path, partial: Path) -> None:
    """Put a state of LoRA where the run of `config` resumes: until then both are the same.

    Errors: ValueError where it was trained on other rows; then nothing is written.
    """
    parts = build(config)
    program = parts.program
    found, notes = read_tensors(source)
    mine = identity(parts)
    require_same_origin(source, notes, {"data": mine["data"]})
    state = trainable(program, in_training=True)
    shapes = {key.partition("/")[2]: x.shape for key, x in found.items() if key.startswith("parameter/")}
    shared = {
        name for name, x in state.items()  # LoRA has no smoothing
        if (name.startswith("net.") or name == "log_scale") and shapes.get(name) == x.shape
    }  # fmt: skip
    tensors = {key: x for key, x in found.items() if key.partition("/")[2] in shared}
    own = {f"parameter/{name}": x.detach().clone() for name, x in state.items() if name not in shared}
    (partial / CHECKPOINT).parent.mkdir(parents=True)
    changed = {"total": str(Schedule.of(config, program.n_train).steps), "lines": "0"}
    write_tensors(partial / CHECKPOINT, tensors | own, {**notes, **mine, **changed})


def _code_digest() -> str:
    """Eight hexadecimal digits of all modules of the package."""
    digest = hashlib.sha256()
    for path in sorted(Path(pyro_blora.__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


CODE = _code_digest()  # as imported, whatever is edited while a study runs


def provenance(cells: list[dict]) -> str:
    """Where and by what these cells were trained: devices, versions of the packages, digests of the code."""
    devices = sorted({cell["summary"]["device"] for cell in cells})
    packages = sorted({f"{name} {version}" for cell in cells for name, version in cell["versions"].items()})
    code = sorted({cell.get("code", "not recorded") for cell in cells})
    return f"on {', '.join(devices)}; {', '.join(packages)}; digests of the package's code: {', '.join(code)}"


def settings_of(config: RunConfig) -> dict:
    """What a cell keeps of a configuration: what was run, not where."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    if config.task_settings:  # a task's own flags are where its data are
        places = TASKS.entry(config.task).flags
        values["task_settings"] = {key: x for key, x in config.task_settings.items() if key not in places}
    if (backbone := Path(config.backbone)).is_relative_to(config.output_dir):  # a study has made it there
        values["backbone"] = str(backbone.relative_to(config.output_dir))
    return {key: value for key, value in values.items() if key not in _ELSEWHERE}


def _read(config: RunConfig) -> dict:
    folder = folder_of(config)
    table = pd.read_parquet(folder / "predictions.parquet").select_dtypes("number")  # spans and texts have no numbers
    examples = table[[name for name in ("label", *PREDICTED) if name in table]]
    opened = arviz_itself().from_netcdf(folder / "posterior.nc")["constant_data"]["g_marginal"]
    opened = opened.isel(chain=0, drop=True) if "chain" in opened.dims else opened  # runs before restarts had none
    ranks = 1 + opened.sum("rank", skipna=False)
    return {
        "config": settings_of(config),
        "versions": versions(),
        "code": CODE,
        "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        "log": [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()],
        "ranks": ranks.to_series().dropna().round(4).to_dict(),  # by projection
        "examples": {name: column.round(5).tolist() for name, column in examples.items()},
    }
