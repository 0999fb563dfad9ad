"""What is learned there: MiniLM on GLUE in full, gates against plain LoRA and 8 bit after training."""

import functools

from . import works
from .session import Check, Session

_TASKS = ("sst2", "cola", "mrpc", "stsb", "rte")
_METHODS = {
    "LoRA": {"method": "lora"},
    "bops": {"prior": "bops"},
    "budget 0.10 of the model, scope encoder": {
        "prior": "budget", "prior_settings": {"bops": 0.1, "denominator": "model"}, "scope": "encoder",
    },
    "8 bit after training": {"method": "ptq", "prior_settings": {"bits": 8}},
}  # fmt: skip


def checks(session: Session) -> list[Check]:
    """One seed of everything, the large task first, then further seeds."""
    found = []
    for seed in (0,) if session.tiny else (0, 1, 2):
        for task in _TASKS[-1:] if session.tiny else _TASKS:
            for name, changes in _METHODS.items():
                values = {
                    "task": task, "backbone": works.backbone(session, "minilm"), "glue_dir": str(session.glue),
                    "epochs": 1 if session.tiny or task == "sst2" else 4, "batch_size": 32, "lr": 5e-4,
                    "max_train": 64 if session.tiny else None, "group_by_length": True, "precision": "bf16",
                    "draws": 2 if session.tiny else 15, "seed": seed, "output_dir": str(session.work / "learned"),
                    **changes,
                }  # fmt: skip
                train = functools.partial(Session.child, function="train", arguments={"config": values}, seconds=300)
                found.append(Check(f"{task}, {name}, seed {seed}", train))
    return found
