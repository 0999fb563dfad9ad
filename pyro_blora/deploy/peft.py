"""Adapter out and in: a plain PEFT folder of the deployed allocation, and what is needed to go on with the posterior.

`export` writes `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` reads without
this package: open ranks only, lora_A and lora_B as quantized at their deployed widths, `rank_pattern` and
`alpha_pattern` so that the scale stays alpha / R. After full fine-tuning there is no adapter, and the folder is one for
transformers' `from_pretrained`. Beside it `gates.safetensors` holds everything that was trained, in
full rank and unquantized, for `load`. Both are read back and compared before the call returns.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters import peft_config
from ..adapters.gate_context import ADAPTER
from ..checkpoint import trainable, write_tensors
from ..config.run_config import RunConfig
from ..files import NotWritten, new_folder, writing
from ..gates import Gates
from ..layout import LORA_A, LORA_B
from ..models.conv1d import to_conv1d
from ..models.names import commit_of, public_name
from ..models.quiet_loading import quiet
from ..posterior.draws import deployed
from ..program import BayesianLoRA
from ..provenance import notes_of
from ..quantizer import mixture_weights, quantize_mixture
from ..tasks.outcomes import Form
from . import cards
from .about import About
from .held_out import HeldOut, answer_of
from .model_card import write_card
from .verify import copied, read_back, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATES_FILE = "gates.safetensors"
STATED = "prior_log_probs."  # and a site: the prior as it is, which takes its place where its code may not run
_AWAY = 0.02  # of an adapter that is exported before it is trained: as large as a fresh encoder's weights


@torch.no_grad()
def export(
    program: BayesianLoRA, folder: str | Path, *, rows: dict[str, Tensor] | None = None, tokenizer=None,
    config: RunConfig | None = None, held_out: HeldOut | None = None,
) -> Path:  # fmt: skip
    """Write an adapter of PEFT, with the deployed ranks and rounded weights, to `folder`, which must not exist.

    rows: inputs on which what was written is compared with the program; None: ordinary tokens of the vocabulary.
    tokenizer, config: of the run. With both, `load(folder)` gives a model that predicts on texts; the tokenizer is
    saved too, and hashes tie the folder to the configuration. held_out: of the run, on which it is measured.
    Errors: FileExistsError; RuntimeError if what was written does not predict what the program predicts (nothing is
    left behind then).
    """
    folder = Path(folder).expanduser()
    with new_folder(folder, "an adapter") as partial:
        plain = plain_backbone(program.net)
        ranks: dict[str, int] = {}
        reloaded: Any
        if program.net.layout.adapted:
            ranks, weights = weights_at(program, deployed(program))
            save_peft(plain, program.net, ranks, weights, partial)
            reloaded = read_back(plain, ranks, partial)
        else:
            with quiet():
                plain.save_pretrained(str(partial))
                reloaded = type(plain).from_pretrained(str(partial), trust_remote_code=False)
        verify(program, reloaded, rows)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial, config)
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(program).items()}
        tensors |= {
            f"{STATED}{site}": q.log_probs.detach().cpu().clone() for site, q in program.prior()._asdict().items()
        }
        notes = {
            "layout": json.dumps(program.net.layout.to_dict()), "n_train": str(program.n_train),
            "labels": json.dumps(plain.config.id2label), **notes_of(program, partial, config),
            "task": Form(program.text_columns, program.likelihood).to_json(), "commit": commit_of(plain) or "",
        }  # fmt: skip
        write_tensors(partial / GATES_FILE, tensors, notes)
        about = About.of(program, plain, config)
        card = cards.adapter(about, ranks) if ranks else cards.whole(about)
        write_card(partial, about, card, None if held_out is None else held_out.measure(answer_of(reloaded, program)))
    return folder


def save_tokenizer(tokenizer, folder: Path, config: RunConfig | None) -> None:
    """As it was loaded, not as it was last called, with the longest input of the training."""
    tokenizer = copy.deepcopy(tokenizer)
    if getattr(tokenizer, "is_fast", False):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    if config is not None:
        tokenizer.model_max_length = config.max_length
    # several templates of chats would be a folder of files, where a model on the hub and its manifest have none
    one = not isinstance(getattr(tokenizer, "chat_template", None), dict)
    tokenizer.save_pretrained(str(folder), save_jinja_files=one)


def plain_backbone(net: adapters.GatedModel) -> PreTrainedModel:
    """A copy of the backbone as transformers made it, with the trained head and without adapters."""
    from ..adapters.layers import QuantizedLinear  # now, as PEFT takes seconds to import

    whole: Any = copied(net.peft_model)
    model: PreTrainedModel = whole.unload() if net.layout.adapted else whole
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.plain())
    to_conv1d(model)
    for config in ("peft_config", "_hf_peft_config_loaded"):
        if config in vars(model):
            delattr(model, config)
    return model


def weights_at(
    program: BayesianLoRA, gates: Gates[Tensor], theta: Tensor | None = None
) -> tuple[dict[str, int], dict[str, tuple[Tensor, Tensor]]]:
    """Open ranks, and (lora_A (r, n), lora_B (m, r)) as quantized, of every adapted projection by name.

    gates: z (L, T, K), g (L, R - 1). theta: (D,) a draw of the weights; None: the parameters.
    """
    net, layout, (z, g) = program.net, program.net.layout, gates
    random = None if theta is None else program.weights.split(theta)
    mixture = mixture_weights(torch.nn.functional.pad(z.float(), (1, 0), value=1.0))  # (L, T, K + 1)
    scales = net.smoothing.scales() if net.smoothing else None
    with adapters.use_gates(net, z, g, random):
        low_rank = {p.name: net.low_rank(p.name) for p in layout.adapted}
    ranks, weights = {}, {}
    for i, projection in enumerate(layout.projections):
        if not projection.adapted:
            continue
        ranks[projection.name] = rank = 1 + int(g[i].sum())
        down, up = low_rank[projection.name]
        if scales is not None:
            down = down * scales[i]
        down, up = (
            quantize_mixture(side, net.value_range(i, t), mixture[i, t], layout.ladder)
            for side, t in zip((down, up), (LORA_A, LORA_B), strict=True)
        )
        if scales is not None:  # PEFT's input is not smoothed
            down = down / scales[i]
        missing = max(0, rank - len(down))  # AdaLoRA may leave none, PEFT needs one
        down, up = torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
        weights[projection.name] = down[:rank].cpu(), up[:, :rank].cpu()
    return ranks, weights


def save_peft(plain: PreTrainedModel, net: adapters.GatedModel, ranks: dict, weights: dict, folder: Path) -> None:
    layout = net.layout
    alphas = {name: layout.alpha * rank / layout.rank for name, rank in ranks.items()}
    config = peft_config.lora_config(plain, layout, net.head, rank_pattern=dict(ranks), alpha_pattern=alphas)
    with torch.random.fork_rng(devices=[]):
        model: Any = peft_config.wrapped(copied(plain), config)
    modules = dict(model.base_model.model.named_modules())
    for name, (down, up) in weights.items():
        layer = modules[name]
        if layer.r[ADAPTER] != ranks[name]:  # a pattern that matches nothing is ignored by PEFT
            raise RuntimeError(f"PEFT gave {name} rank {layer.r[ADAPTER]} instead of {ranks[name]}")
        layer.lora_A[ADAPTER].weight.copy_(down)
        layer.lora_B[ADAPTER].weight.copy_(up)
    saved = model.peft_config[ADAPTER]
    saved.base_model_name_or_path, saved.revision = public_name(plain), commit_of(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base model on the hub to see whether its vocabulary grew
        model.save_pretrained(str(folder), save_embedding_layers=False)


@torch.no_grad()
def require_exportable(program: BayesianLoRA, folder: Path, rows: dict[str, Tensor]) -> None:
    """Export an untrained program once, with adapters away from zero, so that an unsavable training fails early.

    folder: where that is written, compared and removed again, with the one above it if that is new and empty. rows: see
    `export`. The program is left as it was.
    Errors: ValueError saying what went wrong; NotWritten for a full disk.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off here
    parameters = program.net.adapter_parameters() if program.net.layout.adapted else []
    kept = folder.parent.exists()
    before = [p.clone() for p in parameters]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for p in parameters:
                nn.init.normal_(p, std=_AWAY)
            with writing(folder):
                export(program, folder, rows=rows)
    except NotWritten:
        raise
    except Exception as error:  # whatever transformers or PEFT make of this model
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"what is trained could not be exported and read back ({reason[0]}), so it is not trained: choose other "
            f"--target_modules or another --method for {type(program.net.backbone).__name__}"
        ) from error
    finally:
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
        shutil.rmtree(folder, ignore_errors=True)
        if not kept:
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
