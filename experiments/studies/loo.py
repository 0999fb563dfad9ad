"""PSIS-LOO of a run's training examples under its guide: what its gates predict of an example they have not seen.

The weights are those that were trained on the example too, so this is about the gates alone.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_blora.build import build
from pyro_blora.config import RunConfig
from pyro_blora.config.data_files import require_same_data
from pyro_blora.deploy import load
from pyro_blora.guides import log_prob
from pyro_blora.posterior import draw, predict
from pyro_blora.posterior.arviz_compat import leave_one_out
from pyro_blora.tasks.batching import by_length, on_device, take
from pyro_blora.user_code import only_code


@torch.no_grad()
def loo_of_run(folder: Path, examples: int, draws: int, allow_code: Iterable[str] = ()) -> tuple[Any, bool] | None:
    """ArviZ's result for `examples` of the training set under `draws` draws; whether it is corrected for the guide.

    None where all draws are the same allocation. allow_code: as in `load`.

    The joint density of gates and data, which the correction needs, is that of the examples times N / `examples`.
    """
    program = load(folder, allow_code=allow_code)
    with only_code(allow_code, folder / "config.json"):  # also of what `load` does without
        config = RunConfig.from_json(folder / "config.json")
        require_same_data(folder, config)
        parts = build(config)
    rows = take(parts.tokens["train"], examples, parts.config.seed)
    gates = draw(program, draws, seed=parts.config.seed)
    if len(torch.unique(torch.cat([x.flatten(1) for x in gates], -1), dim=0)) == 1:
        return None
    batches, _ = by_length(rows, parts.collate, 2 * parts.config.batch_size)
    scores = predict(program, on_device(batches, torch.device("cpu")), gates=gates).log_likelihood.double()  # (S, E)
    prior, masks = program.prior(), (program.z_mask, program.g_mask)
    of_sites = (
        torch.where(mask, distribution.log_prob(x), 0.0).flatten(1).sum(-1)
        for distribution, x, mask in zip(prior, gates, masks, strict=True)
    )
    log_prior = torch.stack([*of_sites]).sum(0)  # (S,)
    log_joint = log_prior.double() + scores.sum(-1) * program.n_train / len(rows)
    log_q = log_prob(program.gate_guide, gates, *masks).double()
    return leave_one_out(*(np.asarray(x) for x in (scores, log_joint, log_q)))
