"""Of what use is the uncertainty? Abstention and rows out of scope, on intents: BANKING77 and CLINC150.

    python experiments/uncertainty.py --data INTENTS --report benchmarks/uncertainty.md \\
        --figures benchmarks/figures

A way to be uncertain is one cell: LoRA alone, the same at a temperature, its dropout masks, three LoRAs averaged, the
gates as they are deployed or drawn, draws of gates and weights. Held-out training rows fit the temperatures; test rows
and rows out of scope are predicted once. A finished cell is one JSON file in --keep; an unfinished training resumes.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import torch

from experiments.studies import intents
from experiments.studies.cells import CODE, kept, settings_of
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script
from experiments.studies.uncertainty_page import DEPLOYED, figure, report
from pyro_blora.bops import expected_bops
from pyro_blora.config import RunConfig
from pyro_blora.evaluation import predicted
from pyro_blora.gates import Gates
from pyro_blora.posterior import bops, calibration, deployed, draw, draw_weights
from pyro_blora.run import versions
from pyro_blora.training import fit

ROWS = {"banking77": 5000, "clinc150": 3750}  # of training, a tenth of them held out
_LORA = {"method": "lora"}
_COLD = {"weights": "gaussian", "weights_settings": {"kl_weight": 0.01, "prior_std": 0.1}}
WAYS = {  # name: what differs from the usual run
    "lora": _LORA,
    "temperature": _LORA,
    "dropout": {"method": "mc_dropout"},
    "ensemble": {**_LORA, "weights": "ensemble", "weights_settings": {"members": 3}},
    "gates, deployed": {"prior": "bops"},
    "gates": {"prior": "bops"},
    "gates and weights": {"prior": "bops", **_COLD},
}


def configuration(options, data: str, way: str) -> RunConfig:
    return RunConfig(
        task=data, ood_task=intents.outside_of(data), max_train=options.max_train or ROWS[data], validation=0.1,
        backbone=options.backbone, estimator="relaxed", max_length=32, epochs=options.epochs, batch_size=32,
        group_by_length=True, lr=2e-3, lr_head=1e-2, draws=options.draws, seed=options.seed, data_seed=0,
        output_dir=options.output_dir, **WAYS[way],
    )  # fmt: skip


def members(config: RunConfig) -> list[RunConfig]:
    """The trainings of a cell: of an ensemble several, of dropout that of plain LoRA, so that cells share them."""
    if config.average_over == "dropout":
        return [dataclasses.replace(config, method="lora", average_over="gates")]
    if not config.is_ensemble:
        return [config]
    plain = dataclasses.replace(config, weights="point", weights_settings={})
    return [dataclasses.replace(plain, seed=config.seed + i) for i in range(config.fits)]


def predictions(
    config: RunConfig, folder: Path, *, drawn: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """(probabilities (S, E, C) by split, labels (E,) by split, what else is said of the trainings).

    drawn: where gates are learned, they are drawn, and the weights with them; else as they are deployed.
    """
    outputs: dict[str, list[torch.Tensor]] = {}
    labels, seconds, costs = {}, 0.0, []
    drawn = drawn and config.method == "bayesian_lora"
    for member in members(config):
        run = fit(member, folder=folder / member.folder_name)
        seconds += run.seconds
        program, draws = run.program, config.draws
        gates, theta, dropout_seed = Gates(*(x[None] for x in deployed(program))), None, None
        if config.average_over == "dropout":
            gates, dropout_seed = Gates(*(x.expand(draws, *x.shape[1:]) for x in gates)), config.seed
        elif drawn:
            gates, theta = draw(program, draws, seed=config.seed), draw_weights(program, draws, seed=config.seed)
        cost = bops(program) if drawn else expected_bops(program.net.layout, *deployed(program))
        costs.append(float(cost.adapted_ratio))
        for split in ("validation", "eval", "ood"):
            found = predicted(run.parts, split, gates, theta, dropout_seed=dropout_seed)
            outputs.setdefault(split, []).append(found.outputs)
            labels[split] = found.labels
    said = {"seconds": seconds, "bops": costs, "bops_of": "draws" if drawn else DEPLOYED}
    return {split: torch.cat(x) for split, x in outputs.items()}, labels, said


def of_examples(outputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, list]:
    """By example: doubt (1 - greatest probability), entropy, mutual information; with labels what is made of them."""
    mean = outputs.double().mean(0)
    decision = mean.argmax(-1, keepdim=True)
    doubt = mean.scatter(-1, decision, 0.0).sum(-1)  # with more digits than the difference to 1 has
    entropy, information = calibration.uncertainty(outputs)
    found = {"doubt": doubt, "entropy": entropy, "information": information}
    if labels is not None:
        found["log_likelihood"] = mean.clamp(min=1e-12).log().gather(-1, labels[:, None])[:, 0]
    rounded = {name: [float(f"{x:.4g}") for x in values.tolist()] for name, values in found.items()}
    return rounded if labels is None else rounded | {"right": (decision[:, 0] == labels).int().tolist()}


def read(outputs: dict[str, torch.Tensor], labels: dict[str, torch.Tensor], *, scaled: bool) -> dict:
    """What a cell keeps: scores, examples, and what a temperature that held-out rows choose makes of them.

    scaled: the predictions themselves are taken at that temperature.
    """
    means = {split: x.double().mean(0) for split, x in outputs.items()}
    temperature = calibration.fit_temperature(means["validation"], labels["validation"])
    at_best = {split: calibration.at_temperature(x, temperature)[None] for split, x in means.items()}
    outputs, best = at_best if scaled else outputs, at_best["eval"]
    return {
        "temperature": temperature,
        "scores": calibration.scores(outputs["eval"], labels["eval"]),
        "inside": of_examples(outputs["eval"], labels["eval"]),
        "outside": of_examples(outputs["ood"]),
        "scaled": {
            "scores": calibration.scores(best, labels["eval"]),
            "log_likelihood": of_examples(best, labels["eval"])["log_likelihood"],
        },
    }


def cell_of(options, data: str, way: str) -> dict | None:
    config = configuration(options, data, way)
    file = options.keep / f"uncertainty-{data}-{way.replace(',', '').replace(' ', '-')}-{options.seed}.json"
    cell = kept(file, config)
    if cell is not None or options.only_finished:
        return cell
    outputs, labels, said = predictions(config, Path(options.output_dir), drawn=not way.endswith(DEPLOYED))
    cell = {
        "config": settings_of(config), "versions": versions(), "code": CODE, **said,
        "summary": {"task": data, "device": f"cpu ({torch.get_num_threads()} threads)"}, "way": way,
        **read(outputs, labels, scaled=way == "temperature"),
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".tmp").write_text(json.dumps(cell) + "\n", encoding="utf-8")
    file.with_suffix(".tmp").rename(file)
    return cell


def main(arguments: list[str]) -> None:
    data = ("--data", "folder with banking77/ and clinc/")
    parser = study_parser(__doc__, "uncertainty", max_train=None, output_dir="runs/uncertainty", data=data)
    parser.set_defaults(epochs=4)
    parser.add_argument("--sets", nargs="+", default=intents.SETS, choices=intents.SETS)
    parser.add_argument("--ways", nargs="+", default=tuple(WAYS), choices=tuple(WAYS))
    parser.add_argument("--seed", type=int, default=0, help="of the trainings; an ensemble has this and the next two")
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args(arguments)
    if not options.only_finished:
        intents.register(Path(options.data))
    cells = [cell_of(options, data, way) for data in options.sets for way in options.ways]
    write_page(options, "uncertainty", [cell for cell in cells if cell is not None], report, figure)
    print(options.report)


if __name__ == "__main__":
    run_script(main)
