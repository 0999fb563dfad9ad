"""Distributions of the weights from one trained path, and ensembles: scores on dev, temperatures from held-out rows."""

import torch
from torch import Tensor
from torch.distributions import Categorical

from pyro_blora.build import Parts
from pyro_blora.evaluation import predicted
from pyro_blora.evaluation.summary import stored
from pyro_blora.gates import Gates
from pyro_blora.posterior import Prediction, bops, calibration, deployed, draw, draw_weights, seeded
from pyro_blora.progress import silenced
from pyro_blora.tasks import Task, get_task
from pyro_blora.tasks.likelihoods import Likelihood
from pyro_blora.training.laplace_fit import fit_run
from pyro_blora.weights import Swag, build_weights

_ENSEMBLES = ("lora", "lora-gaussian", "lora-swag", "xs8-swag")  # paths whose seeds are members
WeightDistribution = str | int  # "draws", "dropout", "laplace"; a number: SWAG with that many of its last deviations


def distributions_of(parts: Parts, distributions: tuple[WeightDistribution, ...]) -> dict[str, dict]:
    """The point and these, by name: metric, scores, scaled, temperature, numbers learned and stored, log odds."""
    found = {"point": _scored(parts, _predictions(parts))}
    found["point"]["stored"] = found["point"]["parameters"]  # the distribution's mean alone
    for distribution in distributions:
        found[f"K = {distribution}" if isinstance(distribution, int) else distribution] = _read(parts, distribution)
    return found


def _read(parts: Parts, distribution: WeightDistribution) -> dict:
    program, draws, seed = parts.program, parts.config.draws, parts.config.seed
    if distribution == "laplace":
        return _laplace(parts)
    if distribution == "dropout":
        return _scored(parts, _predictions(parts, dropout_seed=seed))
    if distribution == "draws":
        gates = draw(program, draws, seed=seed) if parts.config.method == "bayesian_lora" else None
        found = _scored(parts, _predictions(parts, gates, draw_weights(program, draws, seed=seed)))
        return found | {"bops": float(bops(program).adapted_ratio)}
    swag = program.weights
    if not (isinstance(swag, Swag) and isinstance(distribution, int)):
        raise ValueError(
            f"{distribution!r} is not one of weights {parts.config.weights!r}: a number of deviations is SWAG's"
        )
    with seeded(program, seed), torch.no_grad():
        theta = swag.draw(draws, distribution)
    return _scored(parts, _predictions(parts, theta=theta)) | {"stored": (2 + distribution) * swag.size}


def _laplace(parts: Parts) -> dict:
    program, config = parts.program, parts.config
    point, head = program.weights, dict(enumerate(program.net.head_parameters()))
    distribution = build_weights("laplace", program.net.random_weights(), head, {})
    program.weights = distribution.to(program.log_scale.device)
    fit_run(parts)
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
    with silenced():
        for split in ("eval", "validation"):
            found[split] = predicted(parts, split, gates, theta, dropout_seed=dropout_seed)
    return found


def _scored(parts: Parts, predictions: dict[str, Prediction]) -> dict:
    parameters = sum(p.numel() for p in parts.program.net.adapter_parameters())
    return _scores(parts.task, predictions) | {"parameters": parameters, "stored": stored(parts.program)}


def _scores(task: Task, predictions: dict[str, Prediction]) -> dict:
    dev, held_out = predictions["eval"], predictions["validation"]
    temperature = calibration.fit_temperature(held_out.mean, held_out.labels)
    scaled = calibration.at_temperature(dev.mean, temperature)[None]
    metric = task.metric().compute(predictions=dev.decision.tolist(), references=dev.labels.tolist())
    return {
        "metric": metric[task.metric_name],
        "scores": calibration.scores(dev.outputs, dev.labels),
        "scaled": calibration.scores(scaled, dev.labels),
        "temperature": temperature,
        "log_odds": {split: _log_odds(each.mean) for split, each in predictions.items()},
    }


def ensembles(rows: list[dict]) -> list[dict]:
    """Of three or more seeds of LoRA under a distribution: their probabilities averaged, with a temperature of its own.

    The members' own draws are averaged first: of Laplace a mixture of Laplace approximations, of SWAG MultiSWAG.
    """
    by_distribution: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        if row["path"] in _ENSEMBLES:
            by_distribution.setdefault((row["task"], row["path"], row["law"]), []).append(row)
    made = []
    for (task, path, distribution), members in by_distribution.items():
        if len(members) < 3 or (distribution == "point" and path != "lora"):
            continue
        labels = {split: torch.tensor(x) for split, x in members[0]["cell"]["labels"].items()}  # the same for all seeds
        kind = get_task(task).likelihood
        odds = {split: [m["log_odds"][split] for m in members] for split in labels}
        predictions = {split: _of_log_odds(odds[split], labels[split], kind) for split in labels}
        found = _scores(get_task(task), predictions)
        name = f"ensemble of {len(members)}" + ("" if distribution == "point" else f" x {distribution}")
        made.append({**members[0], "law": name, **found, "stored": sum(m["stored"] for m in members)})
    return made


def _of_log_odds(log_odds: list[list[float]], labels: Tensor, likelihood: Likelihood) -> Prediction:
    odds = torch.tensor(log_odds)  # (members, E)
    distribution = Categorical(logits=torch.stack([-odds / 2, odds / 2], -1))
    return Prediction(distribution.probs, distribution.log_prob(labels), labels, likelihood)


def _log_odds(mean: Tensor) -> list[float]:
    """Of the second of two classes: all that a prediction says, whatever the temperature."""
    return [round(x, 4) for x in mean.log().diff(dim=-1).squeeze(-1).tolist()]
