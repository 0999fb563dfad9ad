"""Runs and what is made of them, for the benchmark of deployed models. What exists already is not made again.

lora       plain LoRA, 32 bit: the adapter, the merged model, and what PyTorch and onnxruntime make of that
W8A8       quantization-aware LoRA, 8 bit everywhere
budget-P   prior `budget` at P % of the model's bit operations
embedded   the first of these with --embedding_bits 8, to be packed
latency    prior `budget` with --prior.cost latency, at little more than what 8 bit everywhere takes
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.studies.cells import trained
from pyro_blora.build import build
from pyro_blora.config import RunConfig
from pyro_blora.cost_table import Times, of_file
from pyro_blora.costs import latency
from pyro_blora.deploy import export, load
from pyro_blora.deploy.held_out import held_out_of
from pyro_blora.deploy.measuring import measure_costs
from pyro_blora.deploy.merged import merge
from pyro_blora.deploy.onnx_attention import set_fast_attention
from pyro_blora.deploy.onnx_file import MODEL, OPSET, export_onnx, exporting_silently, write_graph
from pyro_blora.deploy.packing import pack
from pyro_blora.tasks.batching import split_labels

from .systems import System

COLD = 0.1  # weight of the KL, as in experiments/allocation.py: one allocation is deployed
SETTLE = 0.25  # of the steps: weights fit what is deployed
_ABOVE = 1.15  # of what 8 bit everywhere takes: the budget of `latency`
_CALIBRATED = 128  # training rows that onnxruntime's static quantization sees
_BATCH = 8
FORMS = {"onnx": functools.partial(export_onnx, fast=True), "onnx-exact": export_onnx, "packed": pack, "merged": merge,
         "peft": export}  # fmt: skip
MERGED = "torch fp32, PEFT merged"
FP32, FP32_OURS = "onnxruntime fp32", "onnxruntime fp32, our graph"
STATIC, STATIC_OURS = "onnxruntime static int8", "onnxruntime static int8, our graph"


@dataclasses.dataclass(frozen=True)
class Studied:
    """folder: of runs and artefacts. budgets: shares of the model's bit operations. costs: table of this machine."""

    glue_dir: str
    folder: Path
    max_train: int
    epochs: int
    budgets: tuple[float, ...]

    @property
    def costs(self) -> Path:
        path = self.folder / "costs.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        return path if path.exists() else measure_costs(path)

    def config(self, task: str, changes: dict[str, Any]) -> RunConfig:
        values: dict[str, Any] = {
            "task": task, "glue_dir": self.glue_dir, "backbone": "demo", "scope": "encoder", "kl_warmup": 0.5,
            "max_train": self.max_train, "epochs": self.epochs, "draws": 2, "max_length": 64,
            "output_dir": str(self.folder / "runs"),
        }  # fmt: skip
        return RunConfig(**{**values, **changes})

    def configs(self, task: str) -> dict[str, RunConfig]:
        """Of every run, by its name."""
        lora = self.config(task, {"prior": "fixed", "prior_settings": {"bits": 32}})
        gated = functools.partial(dict, gated_dropout=False)
        learned = gated(prior="budget", kl_weight=COLD, settle=SETTLE)
        layout = build(lora).program.layout
        z, g = (torch.ones(shape) for shape in (layout.z_shape, layout.g_shape))
        z[..., layout.ladder.index(8) :] = 0.0
        _, ratio = latency(layout, Times(of_file(str(self.costs))["times"])).of(z, g, "gated")
        by_time = {"cost": "latency", "costs": str(self.costs), "denominator": "gated",
                   "target": round(_ABOVE * float(ratio), 4)}  # fmt: skip
        found = {"lora": lora, "W8A8": self.config(task, gated(prior="fixed", prior_settings={"bits": 8}))}
        for share in self.budgets:
            settings = {"bops": share, "denominator": "model"}
            found[f"budget {share:.0%}"] = self.config(task, {**learned, "prior_settings": settings})
        first = self.config(task, {**learned, "prior_settings": {"bops": self.budgets[0], "denominator": "model"}})
        found[self.embedded] = dataclasses.replace(first, embedding_bits=8)
        return found | {"latency": self.config(task, {**learned, "prior_settings": by_time})}

    @property
    def embedded(self) -> str:
        return f"budget {self.budgets[0]:.0%}, embeddings at 8 bit"

    def systems(self, task: str) -> Iterator[tuple[System, Path]]:
        """(system, the run it is of) of a task."""
        configs = self.configs(task)
        lora = configs["lora"]
        runs = {
            name: trained(config, dataclasses.replace(lora, embedding_bits=config.embedding_bits), self.max_train)
            for name, config in configs.items()
        }
        for system in self._of_lora(task, lora, runs["lora"]):
            yield system, runs["lora"]
        for name, run in runs.items():
            if name not in ("lora", self.embedded):
                path = self._exported(task, name, run, "onnx") / MODEL
                yield System(f"ours, {name}", "onnx", str(path), ours=True), run
        exact = self._exported(task, "W8A8", runs["W8A8"], "onnx-exact") / MODEL
        yield System("ours, W8A8, exact", "onnx", str(exact), ours=True), runs["W8A8"]
        packed = self._exported(task, self.embedded, runs[self.embedded], "packed")
        yield System(f"ours, {self.embedded}, packed (torch)", "packed", str(packed), ours=True), runs[self.embedded]

    def _exported(self, task: str, name: str, run: Path, form: str) -> Path:
        """As `pyro-blora export` writes it, but for the card's numbers, which are measured here."""
        folder = self.folder / "artefacts" / task / f"{name.replace(' ', '-').replace('%', '').replace(',', '')}-{form}"
        if not folder.exists():
            program = load(run)
            compared = {"held_out": held_out_of(program.source, run)} if form.startswith("onnx") else {}
            FORMS[form](program, folder, **compared)
        return folder

    def _of_lora(self, task: str, config: RunConfig, run: Path) -> Iterator[System]:
        merged, adapter = (self._exported(task, "lora", run, form) for form in ("merged", "peft"))
        folder = merged.parent
        if not (folder / "done").exists():
            _make(config, run, merged, folder)
            (folder / "done").touch()
        yield System("torch fp32, PEFT adapter", "peft", str(adapter), base=str(_plain(config, folder)))
        yield System(MERGED, "torch", str(merged))
        yield System("torch bf16", "bf16", str(merged))
        if importlib.util.find_spec("torchao") is not None:
            yield System("torchao int8 dynamic", "torchao", str(merged))
        for name, file in ((FP32, "fp32"), (FP32_OURS, "fp32-ours"), ("onnxruntime dynamic int8", "dynamic"),
                           (STATIC, "static"), (STATIC_OURS, "static-ours")):  # fmt: skip
            yield System(name, "onnx", str(folder / f"{file}.onnx"))


def _plain(config: RunConfig, folder: Path) -> Path:
    """The backbone with an untrained head, as PEFT needs it beneath an adapter."""
    path = folder / "plain"
    if not path.exists():
        from pyro_blora.models.loading import load_backbone
        from pyro_blora.tasks import get_task

        load_backbone(config.backbone, get_task(config.task).likelihood).save_pretrained(path)
    return path


def _make(config: RunConfig, run: Path, merged: Path, folder: Path) -> None:
    """fp32 as torch.onnx exports it and with our changes of the graph, and onnxruntime's int8 of both."""
    import transformers

    parts, program = build(config), load(run)
    rows = [parts.tokens["train"][i] for i in range(min(_CALIBRATED, len(parts.tokens["train"])))]
    collated = [parts.collate(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]
    batches = [dict(sorted(split_labels(each, torch.device("cpu"))[0].items())) for each in collated]

    def model() -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32).eval()

    _default(model(), batches[0], folder / "fp32.onnx")
    with torch.no_grad():
        ours = model()
        set_fast_attention(ours)
        write_graph(ours, batches[0], program, folder / "fp32-ours.onnx", fast=True)
    _quantized(folder / "fp32.onnx", folder / "dynamic.onnx", None)
    for name in ("", "-ours"):
        _quantized(folder / f"fp32{name}.onnx", folder / f"static{name}.onnx", batches)


def _default(model: Any, batch: dict[str, torch.Tensor], path: Path) -> None:
    """As torch.onnx writes a model of transformers where nothing else is asked for."""

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.model(**inputs).logits

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with exporting_silently(), torch.no_grad():
        exported = torch.onnx.export(
            Logits(), (), kwargs={"inputs": batch}, dynamo=True, opset_version=OPSET, input_names=list(batch),
            dynamic_shapes={"inputs": dict.fromkeys(batch, sizes)}, output_names=["logits"], verbose=False,
        )  # fmt: skip
        exported.save(path, external_data=False)


def _quantized(source: Path, path: Path, batches: list[dict[str, torch.Tensor]] | None) -> None:
    """By onnxruntime: dynamic, or static with ranges of calibration batches."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    int8, uint8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8

    if batches is None:
        quantization.quantize_dynamic(source, path, weight_type=int8)
        return

    class Rows(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict | None:
            batch = next(self.left, None)
            return None if batch is None else {name: x.numpy() for name, x in batch.items()}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(prepared, path, Rows(), quant_format=quantization.QuantFormat.QDQ,
                                 activation_type=uint8, weight_type=int8)  # fmt: skip
    prepared.unlink()
