"""How fast it is there: the parts of the benchmark (experiments/bench) that a GPU is for, in order of value."""

import dataclasses
import functools

from experiments.bench import quantizers, subjects
from experiments.bench.networks import Setting, gated_step, lora_step
from experiments.bench.timing import Row, compared, in_turn

from . import probes, works
from .session import Check, Session, Worker

_GOALS = {"gated": 1.15, "gated, every projection": 1.30}


def _steps(setting: Setting, seconds: float) -> list[Row]:
    names = ("gated", "gated, every projection", "LoRA in the same loop", "PEFT AdaLoRA", "PEFT LoRA")
    functions = {name: subjects.STEPS[name](setting) for name in names}
    taken = in_turn(functions, seconds=seconds, device=setting.device)
    section = f"Training step, {setting.batch} x {setting.length}"
    return [compared(section, taken, name, "PEFT LoRA", goal=_GOALS.get(name)) for name in names[:-1]]


def _flash(setting: Setting, seconds: float) -> list[Row]:
    """With the attention of the package flashdeberta, which asks the host in every layer: it cannot be recorded."""
    there = dataclasses.replace(setting, backbone="flashdeberta")
    functions = {
        "gated, flashdeberta": gated_step(there), "gated": gated_step(setting), "gated, kernel by kernel":
        gated_step(setting, graphs=False), "PEFT LoRA, flashdeberta": lora_step(there), "PEFT LoRA": lora_step(setting),
    }  # fmt: skip
    taken = in_turn(functions, seconds=seconds, device=setting.device)
    pairs = (("gated, flashdeberta", "gated"), ("gated, flashdeberta", "gated, kernel by kernel"),
             ("PEFT LoRA, flashdeberta", "PEFT LoRA"))  # fmt: skip
    return [compared(f"flashdeberta, {setting.batch} x {setting.length}", taken, *pair) for pair in pairs]


def _compiled(setting: Setting, seconds: float) -> list[Row]:
    functions = {
        "gated, network compiled": gated_step(setting, compiled=True), "gated": gated_step(setting),
        "PEFT LoRA, compiled": lora_step(setting, compiled=True), "PEFT LoRA": lora_step(setting),
    }  # fmt: skip
    taken = in_turn(functions, seconds=seconds, device=setting.device)
    pairs = (("gated, network compiled", "PEFT LoRA, compiled"), ("gated, network compiled", "gated"),
             ("PEFT LoRA, compiled", "PEFT LoRA"))  # fmt: skip
    return [compared("Whole network compiled", taken, *pair) for pair in pairs]


MEASURES = {
    "graphed": probes.graphed,
    "kernels": probes.kernels,
    "steps": _steps,
    "flash": _flash,
    "compiled": _compiled,
    "quantizer": lambda setting, seconds: quantizers.measure(setting.device, seconds),
    "profile": lambda setting, seconds: subjects.where_time_goes(setting),
    "program": subjects.program_overhead,
    "predictions": subjects.predictive,
    "memory": lambda setting, seconds: [*subjects.memory(setting), *subjects.predictive_memory(setting)],
    "first step": lambda setting, seconds: subjects.first_step(setting),
}


def setting(session: Session) -> Setting:
    if session.tiny:
        return Setting(layers=1, batch=2, length=16)
    return Setting(backbone="deberta", length=128, device="cuda", precision="bf16")


def checks(session: Session) -> list[Check]:
    here, found, worker = setting(session), [], Worker()

    def add(name: str, measure: str, seconds: float, **changes) -> None:
        values = dataclasses.asdict(dataclasses.replace(here, **({} if session.tiny else changes)))
        arguments = {"name": measure, "setting": values, "seconds": 0.5 if session.tiny else seconds}
        run = functools.partial(worker.ask, function="bench", arguments=arguments, seconds=120)
        found.append(Check(name, run))

    add("step", "steps", 6.0)
    config = works.config(session, "deberta_v3_base", "syncs", prior="budget", prior_settings={"bops": 0.1})
    config |= {"logging_steps": 1000, "checkpoint_steps": 1000, "kl_warmup": 0.0, "settle": 0.0}
    add("predictions", "predictions", 6.0)
    add("step, 8 x 256", "steps", 5.0, batch=8, length=256)
    add("memory", "memory", 0.0)
    add("step, 128 x 128", "steps", 6.0, batch=128)
    add("time to the first step", "first step", 0.0)
    add("quantizer", "quantizer", 4.0)
    found.append(Check("host synchronizations", lambda s: s.child("syncs", {"config": config}, seconds=120)))
    if not session.tiny:
        add("CUDA graph", "graphed", 4.0)
        add("flashdeberta", "flash", 6.0, batch=8, length=512)
        add("Triton's kernels: relative errors of their sums, and of eager ones", "kernels", 0.0)
    add("where time goes", "profile", 0.0)
    add("gates alone", "program", 4.0)
    add("whole network compiled", "compiled", 6.0)
    return found
