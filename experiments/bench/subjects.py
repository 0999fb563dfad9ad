"""The measurements, each a function of the setting and of how many seconds it may take, which gives rows."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_blora.elbos import Terms
from pyro_blora.gates import Gates
from pyro_blora.guides import build_guide
from pyro_blora.layout import AdapterLayout, Projection
from pyro_blora.posterior import predict
from pyro_blora.priors import build_prior
from pyro_blora.program import GateProgram
from pyro_blora.tasks import get_task

from . import child
from .networks import (
    CLASSES,
    N_TRAIN,
    Setting,
    adalora_step,
    gated_step,
    lora_step,
    plain_forward,
    program_of,
    some_draws,
)
from .timing import Row, compared, in_turn, spread

DRAWS = 15
_PROFILED = 3  # steps
_QUANTIZER = ("_products", "_quantize", "_forward", "_backward")  # on a CPU the time of its functions, but for products


def _encoder(setting: Setting) -> Callable[[], None]:
    return gated_step(dataclasses.replace(setting, scope="encoder"))


def _adapted_everywhere(setting: Setting) -> Callable[[], None]:
    return gated_step(dataclasses.replace(setting, scope="encoder", target_modules="all-linear"))


def _lora_everywhere(setting: Setting) -> Callable[[], None]:
    return lora_step(dataclasses.replace(setting, target_modules="all-linear"))


def _relaxed(setting: Setting) -> Callable[[], None]:
    return gated_step(setting, estimator="relaxed")


def _shared(setting: Setting) -> Callable[[], None]:
    return gated_step(setting, share_inputs=True)


def _by_channel(setting: Setting) -> Callable[[], None]:
    return gated_step(dataclasses.replace(setting, scope="encoder"), granularity="channel")


def _seven_widths(setting: Setting) -> Callable[[], None]:
    return gated_step(dataclasses.replace(setting, scope="encoder"), ladder=(2, 3, 4, 6, 8, 16, 32))


def _predictive(setting: Setting, draws: int) -> Callable[[], None]:
    program = program_of(setting)
    gates = some_draws(program, draws)
    return lambda: predict(program, [setting.examples()], gates=gates)


def _plain(setting: Setting) -> Callable[[], None]:
    """Method `lora`."""
    return gated_step(setting, prior="fixed")


STEPS = {
    "gated": gated_step,
    "LoRA in the same loop": _plain,
    "gated, relaxed draws": _relaxed,
    "gated, shared inputs": _shared,
    "gated, every projection": _encoder,
    "gated, every projection, by channel": _by_channel,
    "gated, every projection, seven widths": _seven_widths,
    "gated, adapters on every projection": _adapted_everywhere,
    "PEFT LoRA": lora_step,
    "PEFT LoRA on every projection": _lora_everywhere,
    "PEFT AdaLoRA": adalora_step,
    "5 draws": lambda setting: _predictive(setting, 5),
    "50 draws": lambda setting: _predictive(setting, 50),
}


# --- a training step --------------------------------------------------------------------------------------------------


def steps(setting: Setting, seconds: float) -> list[Row]:
    section = "Training step"
    on_gpu = setting.device == "cuda"
    names = ("gated", "gated, relaxed draws", "gated, shared inputs", "gated, every projection",
             "gated, adapters on every projection", "PEFT LoRA on every projection", "PEFT AdaLoRA",
             "PEFT LoRA")  # fmt: skip
    functions = {name: STEPS[name](setting) for name in names}
    if on_gpu:  # on two CPU cores, compiling a network takes minutes
        functions |= {
            "gated, network compiled": gated_step(setting, compiled=True),
            "PEFT LoRA, compiled": lora_step(setting, compiled=True),
        }
    taken = in_turn(functions, seconds=seconds, device=setting.device)
    goals = {"gated": 1.15, "gated, every projection": 1.3 if on_gpu else 1.4}
    rows = [compared(section, taken, name, "PEFT LoRA", goal=goals.get(name)) for name in names[:-1]]
    rows.append(compared(section, taken, "gated", "gated, relaxed draws", goal=1.0))
    everywhere = ("gated, adapters on every projection", "PEFT LoRA on every projection")
    rows.append(compared(section, taken, *everywhere))
    if on_gpu:
        rows.append(compared(section, taken, "gated, network compiled", "PEFT LoRA, compiled"))
    return rows


def where_time_goes(setting: Setting) -> list[Row]:
    """Matrix products, the quantizer's kernels and everything else in a step, by PyTorch's profiler."""
    names, parts = ("gated", "gated, every projection", "PEFT LoRA"), {}
    for name in names:
        step = STEPS[name](setting)
        step()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if setting.device == "cuda" else []
        with torch.profiler.profile(activities=kinds) as profile:
            for _ in range(_PROFILED):
                step()
        parts[name] = _shares(profile, setting.device)
    section, rows = "Where the time of a step goes", []
    for name in names[:-1]:
        for part, ours in parts[name].items():
            values = {(subject := f"{name}: {part}"): ours, "PEFT LoRA": parts["PEFT LoRA"][part]}
            rows.append(_single(section, subject, "PEFT LoRA", "ms", values))
    return rows


def _shares(profile: torch.profiler.profile, device: str) -> dict[str, float]:
    """Milliseconds a step in each kind of work."""
    found = {"matrix products": 0.0, "quantizer": 0.0, "everything else": 0.0}
    for event in profile.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        name = event.key.lower()
        product = any(word in name for word in ("aten::mm", "aten::addmm", "aten::bmm", "gemm", "cutlass"))
        kernel = any(word in name for word in _QUANTIZER)
        kind = "matrix products" if product else "quantizer" if kernel else "everything else"
        found[kind] += own / 1e3 / _PROFILED
    return found


def memory(setting: Setting) -> list[Row]:
    """Peak of a step, in a process of its own, above what the imports take."""
    names = ("gated", "gated, every projection", "PEFT LoRA")
    peaks = {name: child.run(name, dataclasses.asdict(setting))["bytes"] / 2**20 for name in names}
    return [_single("Peak memory of training", name, "PEFT LoRA", "MiB", peaks, goal=1.15) for name in names[:-1]]


def _single(section: str, subject: str, rival: str, unit: str, values: dict[str, float], **more) -> Row:
    ours, theirs = ((values[name],) * 3 for name in (subject, rival))
    ratio = (ours[0] / theirs[0],) * 3 if theirs[0] else None
    return Row(section, subject, rival, unit, ours, theirs, ratio, **more)


def first_step(setting: Setting) -> list[Row]:
    """Seconds from the command to the end of the first step: the compiler's cache empty, and as it is left then."""
    values = dataclasses.asdict(setting)
    with tempfile.TemporaryDirectory() as folder:
        taken = {name: child.run("gated", values, Path(folder))["seconds"] for name in ("first time", "later")}
        taken["PEFT LoRA"] = child.run("PEFT LoRA", values, Path(folder))["seconds"]
    names = ("first time", "later")
    return [_single("Time to the first step", name, "PEFT LoRA", "s", taken, goal=1.5) for name in names]


# --- Pyro's part ------------------------------------------------------------------------------------------------------


class _Gates(GateProgram):
    """The program without a network: logits that depend on every gate, at next to no cost."""

    def __init__(self, layout: AdapterLayout, batch: int):
        prior = build_prior("bops", layout)
        guide = build_guide("mean_field", layout, prior, {"open_logit": 1.0})
        super().__init__(layout, prior, guide, get_task("sst2").likelihood, n_train=N_TRAIN)
        self.bias = nn.Parameter(torch.zeros(batch, CLASSES))

    def logits(self, inputs: dict, gates, theta: torch.Tensor | None = None) -> torch.Tensor:
        return self.bias + gates.z.mean() + gates.g.mean()


class _ByHand(_Gates):
    """The same without Pyro: draws, likelihood and KL from the distributions themselves."""

    def terms(self, inputs: dict, labels: torch.Tensor) -> Terms:
        distributions = self.gate_guide.distributions(self.temperature, self.hard)
        gates = Gates(*(distribution.rsample() for distribution in distributions))
        label = self.likelihood(self.logits(inputs, gates), scale=self.log_scale.exp())
        sites = zip(distributions, self.prior(), (self.z_mask, self.g_mask), strict=True)
        kl_z, kl_g = (torch.where(mask, kl_divergence(q, p), 0.0).sum() for q, p, mask in sites)
        return Terms(-label.log_prob(labels).mean(), kl_z, kl_g, 0.0, self.n_train)


def _projections(count: int, rank: int) -> AdapterLayout:
    """`count` projections of the size of DeBERTaV3-base's."""
    shape = {"in_features": 768, "out_features": 768, "tokens": 128, "adapted": True}
    projections = tuple(
        Projection(name=f"layer.{i // 3}.{kind}", type=kind, layer=i // 3, **shape)
        for i, kind in zip(range(count), ("query", "key", "value") * count, strict=False)
    )
    return AdapterLayout(
        architecture="none", projections=projections, rank=rank, alpha=2.0 * rank, scope="adapted",
        sequence_length=128, model_macs=10**10,
    )  # fmt: skip


def program_overhead(setting: Setting, seconds: float) -> list[Row]:
    """A step of gates alone: sampling, model, KL, backward and optimizer; and what of it is Pyro's.

    At 36 projections, as DeBERTaV3-base has, and with more gates.
    """
    labels = setting.examples()[1]

    def alone(kind: type[_Gates], more: int) -> Callable[[], None]:
        layout = _projections(36 * more, setting.rank)
        program = kind(layout, setting.batch).to(setting.device)
        optimizer = torch.optim.AdamW(program.gate_guide.parameters(), lr=0.1, fused=True)

        def step():
            program.terms({}, labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    section, rows, overhead = "Pyro: a step of the gates alone, by their number", [], {}
    for more in (1, 4, 16):
        functions = {"with Pyro": alone(_Gates, more), "by hand": alone(_ByHand, more)}
        taken = in_turn(functions, seconds=seconds / 3, device=setting.device)
        rows.append(compared(section, taken, "with Pyro", "by hand", at=more))
        pairs = zip(taken["with Pyro"], taken["by hand"], strict=True)
        overhead[more] = spread([1e3 * (pyro - hand) for pyro, hand in pairs])
    ratio = (overhead[16][0] / overhead[1][0],) * 3
    own = [
        Row("Pyro's overhead", "36 projections", None, "ms", overhead[1], goal=3.0),
        Row(
            "Pyro's overhead", "16 times the gates", "36 projections", "ms", overhead[16], overhead[1], ratio, goal=2.0
        ),
    ]
    return [*rows, *own]


# --- predictions ------------------------------------------------------------------------------------------------------


def predictive(setting: Setting, seconds: float) -> list[Row]:
    section, one = f"Predictions averaged over {DRAWS} draws", plain_forward(setting)
    program, examples = program_of(setting), [setting.examples()]
    every, three = some_draws(program, DRAWS), some_draws(program, DRAWS, distinct=3)
    functions = {
        f"{DRAWS} draws": lambda: predict(program, examples, gates=every),
        "of them 3 distinct": lambda: predict(program, examples, gates=three),
        f"{DRAWS} forwards of PEFT LoRA": lambda: [one() for _ in range(DRAWS)],
    }
    taken = in_turn(functions, seconds=seconds, device=setting.device)
    return [compared(section, taken, name, f"{DRAWS} forwards of PEFT LoRA") for name in list(functions)[:2]]


def predictive_memory(setting: Setting) -> list[Row]:
    """Peak of predictions, in a process of its own: it does not grow with the draws."""
    peaks = {n: child.run(n, dataclasses.asdict(setting))["bytes"] / 2**20 for n in ("5 draws", "50 draws")}
    return [_single("Peak memory of predictions", "50 draws", "5 draws", "MiB", peaks, goal=1.05)]


def not_taken(device: str) -> list[str]:
    """What the page owes to another machine."""
    if device == "cuda":
        return []
    return [
        "everything on a GPU: DeBERTaV3-base in bf16 (32 x 128 tokens; batches of 8 to 128, 128 and 256 tokens), the "
        "quantizer as a share of the GPU's copy bandwidth, the whole step compiled: the same command there",
    ]


# --- growth -----------------------------------------------------------------------------------------------------------

AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"layers": (6, 12, 24), "rank": (2, 8, 64), "batch": (4, 8, 32), "length": (32, 64, 128)},
    "cuda": {"layers": (6, 12, 24), "rank": (2, 8, 64), "batch": (8, 32, 128), "length": (128, 256)},
}


def growth(setting: Setting, seconds: float) -> Iterator[Row]:
    """The step against PEFT LoRA's, one thing changed at a time; and predictions by draws."""
    for axis, values in AXES[setting.device].items():
        for value in values:
            here = dataclasses.replace(setting, **{axis: value})
            functions = {"gated": gated_step(here), "PEFT LoRA": lora_step(here)}
            taken = in_turn(functions, seconds=seconds, device=setting.device)
            yield compared(f"Step by {axis}", taken, "gated", "PEFT LoRA", at=value)
    one, program, examples = plain_forward(setting), program_of(setting), [setting.examples()]
    for draws in (1, 5, 15):
        gates = some_draws(program, draws)
        functions = {
            "draws": lambda gates=gates: predict(program, examples, gates=gates),
            "forwards of PEFT LoRA": lambda draws=draws: [one() for _ in range(draws)],
        }
        taken = in_turn(functions, seconds=seconds, device=setting.device)
        yield compared("Predictions by draws", taken, "draws", "forwards of PEFT LoRA", at=draws)
