"""Factors of frozen weights for B-LoRA-XS: truncated singular value decompositions, cached on disk by weight hash.

A file of the cache carries a hash of its content: one that is damaged, or of before there were hashes, is made anew.

    W0 ~ U S V^T at rank R,    Delta W = (alpha / R) P M S Q^T,    P = U_R, Q = V_R frozen, M (R x R) learned

As plain LoRA that is lora_A = S Q^T and lora_B = P M. The singular values stand on the input side, as in the paper: a
prior of one scale on M then says that an output direction moves in proportion to how strongly W0 reads each input
direction, Var[(P^T Delta W Q)_ij] ~ S_j^2. `split` puts their square roots on both sides, lora_A = S^1/2 Q^T and
lora_B = P S^1/2 M, so Var ~ S_i S_j: strong output directions are expected to move more as well.
Source: Balazy et al., LoRA-XS (2024); Marszalek et al., Minimal Ranks, Maximum Confidence (B-LoRA-XS, 2025).
"""

import contextlib
import hashlib
import os
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..machine import cache_folder

_OVERSAMPLED, _ITERATIONS = 10, 4  # of the randomized decomposition: more columns than are kept, and power iterations


class Factors(NamedTuple):
    """lora_A (R, n) and the left factor of lora_B, (m, R): lora_B is this times the core M."""

    right: Tensor
    left: Tensor


def factors(weight: Tensor, rank: int, *, singular_values: str = "input", svd: str = "exact") -> Factors:
    """The frozen factors of a weight (m, n) at a rank of at most min(m, n), in float32, on the weight's device.

    Signs are fixed (the largest entry of every column of P is positive), so that two machines agree.
    """
    U, S, V = (x.to(weight.device) for x in _decomposed(weight.detach().float().cpu(), rank, svd))
    if singular_values == "split":
        return Factors(S.sqrt()[:, None] * V.mT, U * S.sqrt())
    return Factors(S[:, None] * V.mT, U)


def _decomposed(weight: Tensor, rank: int, svd: str) -> tuple[Tensor, Tensor, Tensor]:
    digest = hashlib.sha256(f"{svd} {rank} {tuple(weight.shape)} ".encode())
    digest.update(weight.contiguous().numpy().tobytes())
    path = cache_folder() / "svd" / f"{digest.hexdigest()}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError):  # none yet, or damaged
        with safe_open(path, framework="pt") as file:
            found, notes = {name: file.get_tensor(name) for name in "USV"}, file.metadata()
        if notes["content"] == _content(found):
            return found["U"], found["S"], found["V"]
    U, S, V = _svd(weight, rank, svd)
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    U, V = U * signs, V * signs
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        made = {"U": U.contiguous(), "S": S.contiguous(), "V": V.contiguous()}
        save_file(made, partial, metadata={"content": _content(made)})
        os.replace(partial, path)
    return U, S, V


def _content(factors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in "USV":
        digest.update(f"{name} {tuple(factors[name].shape)} {factors[name].dtype} ".encode())
        digest.update(factors[name].numpy().tobytes())
    return digest.hexdigest()


def _svd(weight: Tensor, rank: int, svd: str) -> tuple[Tensor, Tensor, Tensor]:
    if svd == "exact":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank].mT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(weight, min(rank + _OVERSAMPLED, *weight.shape), niter=_ITERATIONS)
    return U[:, :rank], S[:rank], V[:, :rank]
