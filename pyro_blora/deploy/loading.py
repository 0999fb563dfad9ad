"""The trained program of a run folder, or of an exported one, with its hashes checked; no code of the task is run."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..adapters.gate_context import ADAPTER
from ..build import build_program, check_names, check_parts
from ..checkpoint import read_tensors, trainable
from ..config.run_config import RunConfig
from ..gates import Gates, NestedBernoulli
from ..layout import AdapterLayout
from ..provenance import require_backbone, require_belonging, warn_unchecked
from ..registries import PRIORS, TASKS
from ..tasks import Task, get_task
from ..tasks.outcomes import Form
from ..user_code import is_of_file, may_run, only_code
from .answering import Source
from .loaded_model import Model
from .packed import is_packed
from .peft import GATES_FILE, STATED


def load(
    run: str | Path, *, n_train: int | None = None, allow_code: Iterable[str] = (), backbone: str | Path | None = None
) -> Model:
    """The trained program of a run folder, or of a folder by `export(program, folder, config=..., tokenizer=...)`.

    It draws, prices, predicts on texts (`model.predict(["a good film"])`) and goes to ArviZ. Needed are the folder and
    the backbone. The task's code is not: its kind of outcome and text columns are in the folder. A prior of a user's
    own whose code may not run, or is not registered here, is replaced by its distributions at the end of the training:
    to train on with it, or to draw its random rates, allow or import its code.
    n_train: N, in place of the number of training examples. backbone: where it is now, if not where it was; an export
    does not name a folder of this machine. allow_code: functions in files (`mine.py:late`) that the
    configuration names and that may run: guide, weights, adapter, estimator, backbone, prior. No other does.
    Errors: ValueError for a folder that holds neither, whose files are damaged or belong to another model, that names
    code which is not allowed, or whose kind of outcome is not registered.
    """
    run, allow_code = Path(run).expanduser(), (allow_code,) if isinstance(allow_code, str) else tuple(allow_code)
    path, source, is_run = _files(run)
    try:
        tensors, notes = read_tensors(path)
        layout, rows = AdapterLayout.from_dict(json.loads(notes["layout"])), int(notes["n_train"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore the run folder from a copy") from None
    if not is_run and "run" not in notes:
        raise ValueError(
            f"{run} was exported without its configuration: export(program, folder, config=trained.parts.config, "
            "tokenizer=trained.parts.tokenizer) writes a folder that can be loaded"
        )
    config = RunConfig.from_json(source if is_run else notes["run"])
    if not is_run and backbone is None and notes["local_backbone"]:
        raise ValueError(
            f"{run} is of a backbone in a folder, {notes['local_backbone']!r}, and an export does not say where that "
            "is: load(folder, backbone=PATH)"
        )
    warn_unchecked(path, notes)
    with torch.random.fork_rng(devices=[]), only_code(allow_code, source):
        task, prior = _task(config, notes, path), _prior(config, tensors)
        require_belonging(path, notes, config, from_notes=not is_run)
        torch.manual_seed(config.seed)  # what the checkpoint of the backbone lacked is drawn
        commit = _commit(run) if is_run else notes.get("commit")
        read_from = dataclasses.replace(config, backbone_revision=commit or config.backbone_revision)
        if backbone is not None:
            read_from = dataclasses.replace(config, backbone=str(backbone), backbone_revision=None)

        def made(prior: Callable[..., Any] | None) -> Model:
            program = build_program(read_from, task, n_train or rows, layout, prior=prior, of=Model)
            assert isinstance(program, Model)
            if program.net.layout != layout or not _restored(program, tensors, path.parent, prior is None):
                raise ValueError(
                    f"{path} does not fit the model that config.json describes: restore the run folder from a copy"
                )
            return program

        program = made(prior)
        own = all(name == "off" or PRIORS.has_own(name) for name in config.prior_names)
        if prior is None and not own and _has_changed(program, tensors):
            warnings.warn(
                f"prior {config.prior!r} is not the one of the training any more, its code was edited: it is replaced "
                "by its distributions at the end of the training",
                stacklevel=2,
            )
            torch.manual_seed(config.seed)
            program = made(_at_the_end(tensors))
    require_backbone(program, notes, config)
    further = range(1, config.fits) if is_run and config.is_ensemble else ()
    members = [run / "restarts" / f"seed-{config.seed + i}" for i in further]
    others = functools.partial(_sources, members, allow_code, backbone)  # of this module: it can be pickled
    program.is_of(config, path.parent, run if is_run else None, others)
    return program.eval()


def _sources(members: Iterable[Path], allow_code: tuple[str, ...], backbone: str | Path | None) -> tuple[Source, ...]:
    """The further fits of an ensemble.  Errors: ValueError where one is missing."""
    if missing := [folder for folder in members if not folder.is_dir()]:
        raise ValueError(f"a member of the ensemble is missing, {missing[0]}: copy the whole run folder")
    return tuple(load(folder, allow_code=allow_code, backbone=backbone).source for folder in members)


def _restored(program: Model, tensors: Mapping[str, Tensor], adapter: Path, with_prior: bool) -> bool:
    """Put what was trained into a program; False where it has other parts.  with_prior: and what its prior learned."""
    _freeze_as_older_runs(program, tensors, adapter)
    parameters, left_out = trainable(program), (STATED,) if with_prior else (STATED, "prior.")
    tensors = {name: x for name, x in tensors.items() if not name.startswith(left_out)}
    if set(parameters) != set(tensors):
        return False
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return True


def _freeze_as_older_runs(program: Model, tensors: Mapping[str, Tensor], adapter: Path) -> None:
    """In older runs a pooler that the backbone's checkpoint lacked was frozen, and is in PEFT's file alone."""
    frozen = {name: p for name, p in trainable(program).items() if ".pooler." in name and name not in tensors}
    if frozen and (path := adapter / "adapter_model.safetensors").is_file():
        saved = load_file(path)
        for name, parameter in frozen.items():
            key = name.partition("peft_model.")[2].replace(f".modules_to_save.{ADAPTER}.", ".")
            if key in saved:
                parameter.requires_grad_(False).copy_(saved[key])


def require_exported(folder: Path) -> None:
    """Errors: ValueError where an exported adapter's files are damaged, or not of one export."""
    path = folder / GATES_FILE
    try:
        _, notes = read_tensors(path)
        config = RunConfig.from_json(notes["run"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or was exported without its configuration ({error}): export it again"
        ) from None
    with only_code((), path):
        require_belonging(path, notes, config, from_notes=True)


def _files(run: Path) -> tuple[Path, Path, bool]:
    """(the gates, what names the configuration, whether it is a run's folder and not only an exported one)."""
    of_run, exported = run / "adapter" / GATES_FILE, run / GATES_FILE
    if of_run.is_file() and (run / "config.json").is_file():
        return of_run, run / "config.json", True
    if exported.is_file():
        return exported, exported, False
    if is_packed(run):
        raise ValueError(
            f"{run} is a packed model, which has no posterior: pyro_blora.load gives its network, and `pyro-blora "
            "predict` its answers; give the folder of a run, or of an adapter"
        )
    if (run / "onnx.json").is_file():
        raise ValueError(
            f"{run} is an ONNX model, for onnxruntime: its card has the program, and `pyro-blora predict` its answers"
        )
    raise ValueError(
        f"{run} is not a finished run: it has no config.json with adapter/{GATES_FILE}; nor was it written by export, "
        f"which leaves a {GATES_FILE}"
    )


def _task(config: RunConfig, notes: Mapping[str, str], path: Path) -> Task | Form:
    """What is needed of the task; all names but the task's and the prior's are checked.

    Older folders do not have it: then it is that of the task itself, whose code has to be there.
    """
    if "task" not in notes:
        return check_names(config)
    check_parts(config)
    try:
        return Form.from_json(notes["task"])
    except ValueError as error:
        of_file = is_of_file(config.task)
        if may_run(config.task) if of_file else config.task in TASKS.names():
            return get_task(config.task, config.task_settings)
        allow = f"; if {config.task} does it, load(folder, allow_code=[{config.task!r}]), --allow_code {config.task}"
        raise ValueError(f"{path}: {error}{allow if of_file else ''}") from None


def _prior(config: RunConfig, tensors: Mapping[str, Tensor]) -> Callable[..., Any] | None:
    """None for the one that the configuration names; else a function in its place, of the distributions at the end."""
    usable = (may_run(name) if is_of_file(name) else name in ("off", *PRIORS.names()) for name in config.prior_names)
    if all(usable) or not _states_prior(tensors):
        return None
    return _at_the_end(tensors)


def _states_prior(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file has the prior at the end of the training; older ones have not."""
    return all(f"{STATED}{site}" in tensors for site in "zg")


def _has_changed(program: Model, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the prior, after what it had learned is restored, is another one than at the end of the training."""
    if not _states_prior(tensors):
        return False
    pairs = ((q.log_probs, tensors[f"{STATED}{site}"]) for site, q in zip("zg", program.prior(), strict=True))
    return not all(a.shape == b.shape and torch.allclose(a.detach(), b, atol=1e-4) for a, b in pairs)


def _at_the_end(tensors: Mapping[str, Tensor]) -> Callable[..., Gates[NestedBernoulli]]:
    """A prior of the distributions at the end of the training."""

    def at_the_end(layout: AdapterLayout) -> Gates[NestedBernoulli]:
        return Gates(*(NestedBernoulli(tensors[f"{STATED}{site}"]) for site in "zg"))

    return at_the_end


def _commit(run: Path) -> str | None:
    """The commit of the hub's that the run's backbone was read from."""
    found = json.loads((run / "config.json").read_text(encoding="utf-8")).get("versions")
    return found.get("backbone") if isinstance(found, dict) else None
