"""The result of a finished run with what can be done next, and what forcing a gate would do, in a terminal."""

import contextlib
import dataclasses
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..bit_widths import ladder_of
from ..config.command_line import command_line, of_scripts
from ..evaluation.verdicts import beside, ece_by_chance, nothing_learned, of_chance, of_score, plus_minus
from ..files import REPORT, require_whole
from ..posterior.arviz_compat import read
from ..posterior.gate_posterior import Posterior
from .run_folder import RunFiles
from .warnings import is_over_draws, weights_name


def show_run(folder: str | Path) -> None:
    """Print the result of a finished run, and what can be done next.  Errors: ValueError for a folder that is none."""
    folder = Path(folder).expanduser()
    require_whole(folder, ["summary.json"])
    run = RunFiles(folder)
    summary = run.summary
    try:
        tables, sentences = result_tables(summary), result_sentences(summary)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder}/summary.json has something else where a number or a table is meant ({what})"
        ) from None
    console = Console(markup=False)  # a name may hold [brackets]
    for table in tables:
        console.print(table)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)
    console.print(f"Run folder: {folder}", soft_wrap=True, highlight=False)
    for purpose, how in next_steps(run):
        console.print(f"  {purpose:32s}  {how}", soft_wrap=True, highlight=False)


def next_steps(run: RunFiles) -> list[tuple[str, str]]:
    """(purpose, the page to open, or the line to give) of what can be done with a finished run."""
    folder, summary, found = run.folder, run.summary, {}
    if (folder / REPORT).is_file():
        found["open its page in a browser"] = str(folder / REPORT)
    found["print this again"] = shlex.join(["pyro-blora", "show", str(folder)])
    if (folder / "adapter" / "tokenizer_config.json").is_file():
        found["predict new texts"] = shlex.join(["pyro-blora", "predict", str(folder), "FILE", "--out", "answers.csv"])
    if summary.get("kl", {}).get("z") and summary["expected_rank"]:  # bit gates are random
        with contextlib.suppress(ValueError, OSError):  # a folder without a readable config.json
            widths = ladder_of(run.config.bit_widths)
            gate = f"0.{next(iter(summary['expected_rank']))}.base.{widths[len(widths) // 2]}"
            found["ask what forcing a gate costs"] = shlex.join(["pyro-blora", "what-if", str(folder), gate, "closed"])
    if (folder / "adapter" / "README.md").is_file():
        found["use the exported adapter"] = f"the code in {folder / 'adapter' / 'README.md'}"
    found["go on in Python"] = f"from pyro_blora import load; program = load({str(folder)!r})"
    with contextlib.suppress(ValueError, OSError):  # a folder without a readable config.json
        again = dataclasses.replace(run.config, seed=run.config.seed + 1)
        found["repeat it from another seed"] = command_line(again, folder / "config.json")
        if script := of_scripts(again):
            named = " and ".join(f"{kind} {name!r}" for kind, name in script)
            found["repeat it from another seed"] = f"train_run in Python, after the import of what registers {named}"
    return list(found.items())


def show_what_if(folder: Path, gate: str, opened: bool) -> None:
    """Print what is predicted if a gate were forced.  Errors: ValueError for a run or a gate that is none."""
    require_whole(folder, ["posterior.nc"])
    found = Posterior(read(folder)).what_if(gate, opened)
    state = "open" if opened else "closed"
    table = Table(title=f"If gate {gate} were {state}", title_justify="left")
    for column in ("", "now", "then"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("E[BOPs] / adapted projections", f"{found.before_adapted:.3%}", f"{found.bops_adapted:.3%}")
    table.add_row("E[BOPs] / whole model", f"{found.before_model:.3%}", f"{found.bops_model:.3%}")
    table.add_row(f"probability that it is {state}", f"{found.probability:.4f}", "1")
    table.add_row("ELBO, nats of all training examples", "0", f"{-found.elbo_loss:+.3f}")
    table.add_row("NLL, nats of all training examples", "0", f"{found.nll_rise:+.3f}")
    Console().print(table)


def result_tables(summary: dict) -> list[Table]:
    """What a user wants to know first: the score, its calibration, what the gates keep, what it costs."""
    method = summary.get("method", "bayesian_lora")
    name = f"prior {summary['prior']}" if method == "bayesian_lora" else method
    head = Table(title=f"{summary['task']} · {summary['backbone']} · {name}", title_justify="left")
    averaged = f"{summary['draws']} draws" if is_over_draws(summary) else "prediction"
    head.add_column("")
    for column in (averaged, "deployed", "constant answer"):
        head.add_column(column, justify="right")
    both, metric = (summary, summary["deployed"]), summary["metric"]["name"]
    head.add_row(metric, *(of_score(x, metric) for x in both), _constant(summary, metric))
    for name in (name for name in summary.get("scores", {}) if name != metric):
        each = (plus_minus(x["scores"][name], beside(x, name)) for x in both)
        head.add_row(name, *each, _constant(summary, name))
    head.add_row("NLL (nats per example)", *(of_score(x, "nll") for x in both), _constant(summary, "nll"))
    if summary["ece"]["value"] is not None:
        head.add_row(f"ECE ({summary['ece']['bins']} bins)", *(_number(x["ece"]["value"]) for x in both))
        if ece_by_chance(summary):
            head.add_row("ECE by chance (95 %)", *map(_chance, both))
    held_out = summary.get("calibration", {})
    if "scaled" in held_out.get("averaged", {}):
        scaled = (held_out[name]["scaled"]["nll"] for name in ("averaged", "deployed"))
        head.add_row("NLL at temperature", *map(_number, scaled))
    gates = Table(title="What the gates keep", title_justify="left")
    for column in ("", "expected"):
        gates.add_column(column, justify="left" if not column else "right")
    for role, bits in summary["expected_bits"].items():
        gates.add_row(f"bits of {role}", f"{bits:.1f}")
    for kind, rank in summary["expected_rank"].items():
        gates.add_row(f"rank of {kind}", f"{rank:.1f}")
    low, high = summary["bops"]["interval"]
    gates.add_row(
        "BOPs / adapted projections at 32 x 32", f"{summary['bops']['adapted_ratio']:.2%} [{low:.2%}, {high:.2%}]"
    )
    gates.add_row("BOPs / whole model at 32 x 32", f"{summary['bops']['model_ratio']:.2%}")
    if spent := summary.get("cost"):
        gates.add_row(f"{spent['cost']} / {spent['denominator']} projections at full width", f"{spent['ratio']:.2%}")
    gates.add_row("adapter parameters", f"{summary['adapter_parameters']:,}")
    weights = summary.get("weights", {})  # older runs have none
    if weights.get("random"):
        gates.add_row(
            f"random weights, by distribution {weights_name(summary)}",
            f"{weights['random']:,}, std {weights['std']:.2g}",
        )
    if "by_rank" not in summary:
        return [head, gates]
    ranks = Table(title="At every rank", title_justify="left")
    for column in ("rank", metric, "NLL", "BOPs / adapted"):
        ranks.add_column(column, justify="right")
    for row in summary["by_rank"]:
        share = f"{row['bops']['adapted_ratio']:.2%}"
        ranks.add_row(str(row["rank"]), of_score(row, metric), of_score(row, "nll"), share)
    return [head, gates, ranks]


def result_sentences(summary: dict) -> list[str]:
    """What the numbers mean: whether anything was learned, a target met, and whether the ECE exceeds chance."""
    shared = [summary[what] for what in ("missed", "rested", "sharing") if summary.get(what)]
    if nothing := nothing_learned(summary):
        return [nothing, *shared]
    chance = of_chance(summary)
    return [*([f"± is a standard error over examples. ECE: {chance}."] if chance else []), *shared]


def _constant(summary: dict, name: str) -> str:
    constant = beside(summary, name, "constant")
    return "" if constant is None else _number(constant)


def _chance(scores: dict) -> str:
    chance = ece_by_chance(scores)
    return _number(chance["high"]) if chance else ""


def _number(value: float) -> str:
    return f"{value:.4f}"
