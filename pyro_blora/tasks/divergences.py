"""KL divergences as PyTorch has them, but finite where float32 rounds the other's probability to 0 or to 1.

PyTorch answers infinity there, and a student that is far from its teacher gets no gradient.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, kl_divergence


def of_classes(teacher: Distribution, student: Distribution) -> Tensor:
    """KL(teacher || student), nats.  Logits (..., C) both -> (...); of other distributions PyTorch's."""
    if not (isinstance(teacher, Categorical) and isinstance(student, Categorical)):
        return kl_divergence(teacher, student)
    p: Tensor = teacher.probs
    return (p * (teacher.logits - student.logits).masked_fill(p == 0, 0.0)).sum(-1)


def of_labels(teacher: Bernoulli, student: Bernoulli) -> Tensor:
    """The same of independent labels, the sum over them.  Logits (..., C) both -> (...)"""
    p: Tensor = teacher.probs
    on = F.softplus(-student.logits) - F.softplus(-teacher.logits)
    off = F.softplus(student.logits) - F.softplus(teacher.logits)
    return (p * on + (1 - p) * off).sum(-1)
