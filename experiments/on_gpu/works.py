"""Does it work there: DeBERTaV3-base in bf16, killed and resumed, with every kind of adapter and in both scopes.

Every line is a whole run of the generated task, ended by its posterior, predictions, export and a reload.
"""

import concurrent.futures
import functools
import json
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from .session import Check, Session

_BACKBONES = Path(__file__).with_name("backbones.py")
_TINY = {"deberta_v3_base": "tiny_deberta", "smollm2": "tiny_smollm2"}
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "ON_GPU_DETERMINISTIC": "1"}


def backbone(session: Session, name: str) -> str:
    """`file.py:function`; of an architecture with random weights a tiny one where everything is."""
    return f"{_BACKBONES}:{_TINY.get(name, name) if session.tiny else name}"


def config(session: Session, name: str, folder: str, **changes) -> dict:
    rows, steps = (32, 4) if session.tiny else (512, 32)
    return {
        "task": "acceptability", "backbone": backbone(session, name), "max_train": rows, "epochs": 2,
        "batch_size": 2 * rows // steps, "precision": "bf16", "draws": 4, "logging_steps": 1,
        "max_length": 32 if session.tiny else 64, "checkpoint_steps": max(1, steps // 8),
        "output_dir": str(session.work / folder), **changes,
    }  # fmt: skip


def checks(session: Session) -> list[Check]:
    target = 0.9 if session.tiny else 0.15  # a tiny network spends most outside its maps
    budget = {"prior": "budget", "prior_settings": {"bops": target, "denominator": "model"}}
    variants = {
        "scope encoder, budget 0.15 of the model": {"scope": "encoder", **budget},
        "scope encoder, checkpointed": {"scope": "encoder", "gradient_checkpointing": True},
        "XS, Gaussian weights, shared inputs": {
            "adapter": "xs", "weights": "gaussian", "share_inputs": True, "adapter_settings": {"svd": "randomized"},
        },
        "plain LoRA": {"method": "lora"},
    }  # fmt: skip
    resumed = [
        Check("DeBERTaV3-base: killed and resumed", functools.partial(killed, name="deberta_v3_base")),
        Check("DeBERTaV3-base: killed and resumed, deterministic kernels",
              functools.partial(killed, name="deberta_v3_base", environment=_DETERMINISTIC)),
        Check("MiniLM as DeBERTaV3: killed and resumed", functools.partial(killed, name="minilm_as_deberta")),
    ]  # fmt: skip
    once = [
        Check(f"DeBERTaV3-base: {what}", functools.partial(whole, changes=changes))
        for what, changes in variants.items()
    ]
    return [*resumed, *once, *_texts(session)]


def _texts(session: Session) -> list[Check]:
    """The other kinds of outcome, where there are data: SmolLM2's architecture writes and chooses, MiniLM answers."""
    if session.texts is None:
        return []
    prior = {"prior": "bops", "prior_settings": {"rate": 0.1}}
    small = {**prior, "group_by_length": True, "draws": 2}
    e2e = {"e2e_dir": str(session.texts / "e2e"), "meanings": 8, "drawn": 1}
    squad = {f"squad_{split}": str(session.texts / "squad" / f"{split}.json") for split in ("train", "eval")}
    choice = {"choice_dir": str(session.texts / "choice" / "openbookqa"), "held_out": 32}
    kinds = {
        "SmolLM2's architecture: E2E": ("smollm2", {"task": "e2e", "task_settings": e2e, "max_length": 96}),
        "SmolLM2's architecture: multiple choice": (
            "smollm2", {"task": "choice", "task_settings": choice, "max_length": 160},
        ),
        "MiniLM: SQuAD": (
            "minilm_for_spans", {"task": "squad", "task_settings": {**squad, "stride": 64, "held_out": 32},
                                 "max_length": 256},
        ),
    }  # fmt: skip
    return [
        Check(name, functools.partial(whole, name=network, changes=small | changes))
        for name, (network, changes) in kinds.items()
    ]


def whole(session: Session, changes: dict, name: str = "deberta_v3_base") -> dict:
    """A run from beginning to end."""
    return session.child("train", {"config": config(session, name, "runs", **changes)}, seconds=170)


def killed(session: Session, name: str, environment: dict | None = None) -> dict:
    """A run, beside the same run killed by SIGKILL in the middle and taken up again."""
    folder = f"{name}{'_deterministic' if environment else ''}"
    first, second = (config(session, name, f"{folder}_{which}") for which in ("whole", "killed"))
    half = second["epochs"] * second["max_train"] // second["batch_size"] // 2

    def enough() -> bool:
        logs = list(Path(second["output_dir"]).glob(".*.partial/metrics.jsonl"))
        return bool(logs) and logs[0].read_text().count("\n") > half

    def train(values: dict, **more) -> dict | None:
        return session.child("train", {"config": values}, seconds=170, environment=environment, **more)

    with concurrent.futures.ThreadPoolExecutor(1) as aside:
        whole_run = aside.submit(train, first)
        at = train(second, kill_when=enough)
        again = at or train(second)
        told = whole_run.result()
    return told | {
        "killed": "no: it had ended" if at is not None else f"after step {half}", "bitwise": same(told, again)
    }  # fmt: skip


def same(one: dict, other: dict) -> dict:
    """Which files of two finished runs agree to the bit; of metrics.jsonl everything but the seconds."""
    one, other = Path(one["folder"]), Path(other["folder"])
    found = {
        file: _same_tensors(one / file, other / file)
        for file in ("adapter/gates.safetensors", "adapter/adapter_model.safetensors")
    }
    frames = [pd.read_parquet(folder / "predictions.parquet") for folder in (one, other)]
    found["predictions.parquet"] = frames[0].equals(frames[1])
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"}
         for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, other)
    ]  # fmt: skip
    found["metrics.jsonl"] = lines[0] == lines[1]
    if not found["metrics.jsonl"]:
        found["first line that differs"] = next(
            (a["step"] for a, b in zip(*lines, strict=False) if a != b), min(map(len, lines))
        )
    return found


def _same_tensors(one: Path, other: Path) -> bool:
    """To the bit; the notes beside them name the folder that a run was written to."""
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(x, right[name]) for name, x in left.items())
