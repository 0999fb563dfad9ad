"""A packed or an ONNX model that predicts on texts, as a run's does, with the one allocation that it holds.

It has no draws, hence no mutual information, and no held-out rows, hence no threshold or sets of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..config.run_config import RunConfig
from ..posterior.prediction import Prediction
from ..program import Inputs
from ..tasks.likelihoods import Likelihood, Rows
from ..tasks.outcomes import kind_of
from ..tasks.writing import Writer
from . import onnx_file, packed
from .answering import Answers, Source
from .held_out import Answer
from .manifest import Refused, read_manifest

if TYPE_CHECKING:
    import pandas as pd

_AGAIN = "export it again"
_SHOWN = 200  # characters of another error in a message


def is_deployed(folder: Path) -> bool:
    return packed.is_packed(folder) or (folder / onnx_file.MANIFEST).is_file()


class DeployedModel:
    """What predicts on texts like `loaded_model.Model`: `model.predict(["a good film"])`.

    Errors: ValueError for a folder without what is asked of texts: a tokenizer, the task, a kind that is known here.
    """

    run = None

    def __init__(self, folder: Path, *, backbone: str | Path | None = None):
        self.folder = folder
        form = packed if packed.is_packed(folder) else onnx_file
        if form is onnx_file and backbone is not None:
            raise ValueError(f"{folder} is an ONNX model, which holds its base: drop backbone")
        content = read_manifest(folder / form.MANIFEST, schema=form.SCHEMA, version=form.VERSION)
        self.form, notes = "packed" if form is packed else "ONNX", content["task"]
        try:
            kind, self.text_columns = kind_of(notes["outcome"]), tuple(map(str, notes["text_columns"]))
            self.task, self._length = notes["name"], notes["max_length"]
            self.log_scale = torch.tensor(float(notes["log_scale"]))
        except (KeyError, TypeError, ValueError):
            raise Refused(f"{folder} does not describe its task, as older exports do not: {_AGAIN}") from None
        if kind is None:
            raise Refused(f"{folder} has a kind of outcome that is not registered here: import the module that has it")
        if isinstance(kind, Writer) and form is onnx_file:
            raise ValueError(
                f"{folder} is an ONNX model, which writes no texts: give the run's folder, or a packed one"
            )
        self.likelihood = kind
        self.network, self._answer = _packed(folder, kind, backbone) if form is packed else _onnx(folder, kind, content)

    def to(self, device: str) -> DeployedModel:
        """Of a packed one; onnxruntime is asked for the CPU."""
        if self.network is not None:
            self.network.to(device)
            self.log_scale = self.log_scale.to(device)
        return self

    def predict(self, texts: Any, **options: Any) -> pd.DataFrame:
        """A table with a row for each text, as `loaded_model.Model.predict` has it; draws and seed are refused."""
        return self.answers(**options)(texts)

    def answers(self, **options: Any) -> Answers:
        """The same in two steps, for many tables."""
        return Answers(self.source, **options)

    @functools.cached_property
    def source(self) -> Source:
        from transformers import AutoTokenizer

        if not any(self.folder.glob("tokenizer*")):
            raise ValueError(f"{self.folder} has no tokenizer: {_AGAIN}, from a run's folder")
        tokenizer = AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False)
        config = RunConfig(max_length=self._length or tokenizer.model_max_length, draws=1)
        return _Deployed(self, config, tokenizer, self._held_out)

    def _held_out(self) -> NoReturn:
        raise ValueError(
            f"{self.folder} has no held-out rows, which abstain and coverage are calibrated on: give the run's folder, "
            "or the confidence from which texts are answered, --confidence 0.9"
        )

    def prediction(self, inputs: Inputs, labels: Tensor) -> Prediction:
        """Of a batch, S = 1."""
        kind = self.likelihood
        distribution = kind(self._answer(inputs).float()[None], scale=self.log_scale.exp())
        outputs, scores = kind.averaged(distribution, labels), distribution.log_prob(labels)
        return Prediction(outputs.cpu(), scores.cpu(), kind.scored(labels).cpu(), kind)


class _Deployed(Source):
    """The source of a deployed model's answers."""

    def drawn(self, draws: int | None, seed: int | None) -> dict[str, Any]:
        if draws is not None or seed is not None:
            raise ValueError(
                f"{self.program.folder} is a {self.program.form} model, of one allocation: drop --draws and --seed, or "
                "give the run's folder"
            )
        return {}

    @torch.no_grad()
    def predict(self, batches: Iterable[tuple[Inputs, Tensor]], **drawn: Any) -> Prediction:
        return Prediction.joined([self.program.prediction(inputs, labels) for inputs, labels in batches])

    def write(self, rows: Rows, batch_size: int, *drawn: Any) -> list[str]:
        program = self.program
        found: list[str] = program.likelihood.write(
            program.network, self.tokenizer, rows, program.text_columns, batch_size
        )
        return found


class _Loaded(NamedTuple):
    network: Any
    answer: Answer


def _packed(folder: Path, kind: Likelihood, backbone: str | Path | None) -> _Loaded:
    network: Any = packed.load_packed(folder, backbone=backbone)
    settings = {"use_cache": False} if "use_cache" in inspect.signature(network.forward).parameters else {}
    return _Loaded(network, lambda inputs: kind.head.logits(lambda rows: network(**settings, **rows), inputs))


def _onnx(folder: Path, kind: Likelihood, content: dict[str, Any]) -> _Loaded:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"{folder} is an ONNX model: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(folder / onnx_file.MODEL, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever onnxruntime makes of operators that it does not know
        said = " ".join(str(error).split())[:_SHOWN]
        raise Refused(f"{folder / onnx_file.MODEL}: onnxruntime {onnxruntime.__version__} says {said!r}") from None
    if {each.name for each in session.get_inputs()} != {*content["inputs"]} or len(session.get_outputs()) != 1:
        raise Refused(f"{folder / onnx_file.MODEL} has not the inputs that {onnx_file.MANIFEST} says: {_AGAIN}")
    return _Loaded(None, onnx_file.answer_by(session, content["inputs"], kind.head))
