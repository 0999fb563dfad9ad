"""The laws that can be read off one trained path: scores on dev, and a temperature from held-out rows."""

import torch
from torch import Tensor

from pyro_blora import calibration
from pyro_blora.build import Parts
from pyro_blora.curvature import fit_laplace
from pyro_blora.data import by_length, on_device
from pyro_blora.evaluation import predicted
from pyro_blora.gates import Gates
from pyro_blora.posterior import Prediction, deployed, draw, draw_weights
from pyro_blora.weights import build_weights

DEVIATIONS = (0, 2, 5, 10, 20)


def laws_of(parts: Parts) -> dict[str, dict]:
    """By name: metric, scores, scaled, temperature, numbers learned and stored; of the point also what it predicts."""
    program, config = parts.program, parts.config
    found = {"point": _scored(parts, _predictions(parts))}
    found["point"] |= {split: _answers(parts, split) for split in ("eval", "validation")}
    if config.method == "bayesian_lora":
        gates = draw(program, config.draws, seed=config.seed)
        theta = draw_weights(program, config.draws, seed=config.seed)
        found["draws"] = _scored(parts, _predictions(parts, gates, theta))
    elif config.weights == "swag":
        for rank in DEVIATIONS:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(config.seed)
                theta = program.weights.draw(config.draws, rank)
            found[f"K = {rank}"] = _scored(parts, _predictions(parts, theta=theta)) | {
                "stored": (2 + rank) * program.weights.size
            }
    elif config.weights != "point":
        theta = draw_weights(program, config.draws, seed=config.seed)
        found["draws"] = _scored(parts, _predictions(parts, theta=theta))
    else:
        found["dropout"] = _scored(parts, _predictions(parts, dropout_seed=config.seed))
        found["laplace"] = _laplace(parts)
    return found


def _laplace(parts: Parts) -> dict:
    program, config = parts.program, parts.config
    point, head = program.weights, dict(enumerate(program.net.head_parameters()))
    program.weights = build_weights("laplace", program.net.random_weights(), head, {})
    load, _ = by_length(parts.tokens["train"], parts.tokenizer, config.batch_size)
    fit_laplace(program, on_device(load, program.log_scale.device), deployed(program))
    theta = draw_weights(program, config.draws, seed=config.seed)
    found = _scored(parts, _predictions(parts, theta=theta))
    found |= {"prior_precision": float(program.weights.prior_precision)}
    program.weights = point
    return found


def _predictions(
    parts: Parts, gates: Gates | None = None, theta: Tensor | None = None, dropout_seed: int | None = None
) -> dict[str, Prediction]:
    config, found = parts.config, {}
    if gates is None:
        count = len(theta) if theta is not None else config.draws if dropout_seed is not None else 1
        gates = Gates(*(x.expand(count, *x.shape) for x in deployed(parts.program)))
    for split in ("eval", "validation"):
        found[split] = predicted(parts, split, gates, theta, dropout_seed=dropout_seed, quiet=True)
    return found


def _scored(parts: Parts, predictions: dict[str, Prediction]) -> dict:
    dev, held_out = predictions["eval"], predictions["validation"]
    temperature = calibration.fit_temperature(held_out.mean, held_out.labels)
    scaled = calibration.at_temperature(dev.mean, temperature)[None]
    metric = parts.task.metric().compute(predictions=dev.decision.tolist(), references=dev.labels.tolist())
    law, learned = parts.program.weights, parts.program.net.adapter_parameters()
    return {
        "metric": metric[parts.task.metric_name],
        "scores": calibration.scores(dev.outputs, dev.labels),
        "scaled": calibration.scores(scaled, dev.labels),
        "temperature": temperature,
        "parameters": sum(p.numel() for p in learned),
        "stored": law.stored if law.random else sum(p.numel() for p in learned),
    }


def _answers(parts: Parts, split: str) -> dict:
    """What a point predicts, for ensembles."""
    prediction = _predictions(parts)[split]
    return {
        "probabilities": [[round(p, 5) for p in row] for row in prediction.mean.tolist()],
        "labels": prediction.labels.tolist(),
    }
