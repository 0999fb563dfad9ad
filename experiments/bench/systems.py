"""What answers in the benchmark of deployed models: an artefact on the disk, and how it is opened and called.

Nothing here imports torch before a system needs it: the memory of a process that runs onnxruntime is its own.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Inputs = dict[str, np.ndarray]  # of a batch, int64 (B, tokens)
Call = Callable[[Inputs], np.ndarray]  # -> logits (B, C)
TORCH = ("torch", "peft", "bf16", "torchao", "packed")  # kinds that run in PyTorch


@dataclasses.dataclass(frozen=True)
class System:
    """name: of its files and in tables; kind: how it is opened; path: a folder, or an ONNX file; ours: whether it is
    what this package exports; base: of an adapter, the folder of the plain model.
    """

    name: str
    kind: str
    path: str
    ours: bool = False
    base: str = ""

    @property
    def bytes(self) -> int:
        """Of the weights and what describes them, without tokenizer and card."""
        path = Path(self.path)
        files = [path] if path.is_file() else [x for x in path.iterdir() if not _beside(x.name)]
        if self.base:
            files += [x for x in Path(self.base).iterdir() if not _beside(x.name)]
        return sum(x.stat().st_size for x in files if x.is_file())


def _beside(name: str) -> bool:
    return name.startswith(("tokenizer", "special_tokens", "vocab")) or name == "README.md"


def opened(system: System, threads: int) -> Call:
    """The system, ready to be called with this many threads."""
    if system.kind == "onnx":
        return _onnx(system.path, threads)
    return _torch(system, threads)


def _onnx(path: str, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would run beside the others
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]


def _torch(system: System, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    model = _network(system)
    taken = ("input_ids", "attention_mask", "token_type_ids")

    def call(inputs: Inputs) -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            batch = {name: torch.from_numpy(inputs[name]) for name in taken if name in inputs}
            return model(**batch).logits.float().numpy()

    return call


def _network(system: System) -> Any:
    import torch

    if system.kind == "packed":
        from pyro_blora import load

        return load(system.path)
    import transformers

    dtype = torch.bfloat16 if system.kind == "bf16" else torch.float32
    model = transformers.AutoModelForSequenceClassification.from_pretrained(system.base or system.path, dtype=dtype)
    if system.kind == "peft":
        import peft

        model = peft.PeftModel.from_pretrained(model, system.path)
    if system.kind == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model.eval()


def some_inputs(batch: int, length: int, vocabulary: int = 30_000) -> Inputs:
    """Ordinary tokens, without padding."""
    tokens = np.random.default_rng(0).integers(min(1_000, vocabulary // 2), vocabulary, (batch, length))
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
