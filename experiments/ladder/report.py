"""The Markdown report of the ladder, and where its files go."""

import os
import platform
import shutil
from pathlib import Path

from pyro_blora.run import versions

from .gradients import GUIDES
from .rungs import Check

_ABOUT_FITS = """\
Trained by Adam with the package's schedules: a rate of 0.1 that falls to a hundredth, unless said otherwise, and a
temperature that falls from 0.5 to 0.1. ELBOs are of the discrete distribution, by enumeration."""
_ABOUT_MIXTURES = "Gaps to the log evidence, in nats; closed: of the exact mean field's gap."
_ABOUT_GRADIENTS = """\
Of E_q[NLL] at three guides, against enumeration. bias: ‖E g - g*‖ / ‖g*‖ ± its Monte Carlo error, which is also its
noise floor; variance: E‖g - E g‖² / ‖g*‖² times the forwards of an estimate, so at an equal number of scores."""
_ABOUT_CALIBRATION = """\
p-values of three tests of each inference; a familywise level of 5 % is shared equally among the three.
overconfidence: log odds times (predicted - true), on average; positive if a distribution is overconfident."""


def line(check: Check) -> str:
    """One row of the threshold table."""
    outcome = "pass" if check.passed else "**MISS**"
    return (
        f"| {check.rung} | {check.subject} | {check.meaning} | {check.bound:.3g} | {check.measured:.3g} | {outcome} |"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _fits(ladder) -> str:
    rows = []
    for evidence, fit in ladder.fits:
        gap = "no ELBO" if fit.elbo is None else f"{evidence - fit.elbo:.3f}"
        rows.append([fit.problem, fit.name, f"{fit.error:.3f}", gap, f"{fit.seconds:.0f}"])
    return _table(["problem", "distribution", "worst marginal error", "log evidence - ELBO (nats)", "seconds"], rows)


def _mixtures(ladder) -> str:
    rows = []
    for problem, series in ladder.gaps.items():
        best, trained = (dict(points) for points in series.values())
        for M in [size for size in best if size > 1]:
            ratio = f"{ladder.ratios[M]:.2f}" if "network" in problem and ladder.ratios else ""
            closed = [f"{1 - gaps[M] / best[1]:.0%}" for gaps in (best, trained)]
            rows.append(
                [problem, str(M), f"{best[1]:.3f}", f"{best[M]:.3f}", closed[0], f"{trained[M]:.3f}", closed[1], ratio]
            )
    head = ["problem", "M", "gap of the exact mean field", "of the exact mixture", "closed", "of the trained mixture",
            "closed", "step time / mean field"]  # fmt: skip
    return _table(head, rows)


def _gradients(ladder) -> str:
    rows = []
    for name, estimator, found in ladder.gradients:
        cells = [f"{q.bias:.2f} ± {q.bias_error:.2f}; {q.variance:.3g}" for q in found]
        rows.append([name, estimator.name, str(estimator.forwards), *cells])
    return _table(["problem", "estimator", "forwards", *(f"{where}: bias; variance" for where in GUIDES)], rows)


def _calibrations(ladder) -> str:
    rows = []
    for name, found in ladder.calibrations.items():
        p = found.p_values
        rows.append([name, str(len(found.opened)), *(f"{p[key]:.3f}" for key in p), f"{found.overconfidence:+.4f}"])
    head = ["inference", "simulations", "gates", "effective rank", "log-likelihood", "overconfidence (nats a gate)"]
    return _table(head, rows)


def write(ladder, seconds: dict[str, float], folder: Path, arguments: str) -> None:
    """posterior_ladder.md of everything measured so far."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    spent = ", ".join(f"{rung} {value:.0f} s" for rung, value in seconds.items())
    command = f"python experiments/check_posterior.py {arguments}".rstrip()
    parts = [
        "# Is the posterior right?",
        f"Written by `{command}` on {_processor()}, one thread a fit; {found}. "
        f"Rungs: {spent}; {sum(seconds.values()) / 60:.0f} minutes.",
        "## Thresholds\n\n" + _table(["rung", "subject", "quantity", "threshold", "measured", "outcome"], [])
        + "\n" + "\n".join(map(line, ladder.checks)),
    ]  # fmt: skip
    sections = (
        ("Distributions of the gates against the exact posterior", _ABOUT_FITS, ladder.fits, _fits),
        ("Mixtures", _ABOUT_MIXTURES, ladder.gaps, _mixtures),
        ("Gradient estimators", _ABOUT_GRADIENTS, ladder.gradients, _gradients),
        ("Simulation-based calibration", _ABOUT_CALIBRATION, ladder.calibrations, _calibrations),
    )
    parts += [f"## {title}\n\n{about}\n\n{table(ladder)}" for title, about, found, table in sections if found]
    pictures = sorted(path.name for path in (folder / "figures").glob("*.png"))
    if pictures:
        parts.append("## Figures\n\n" + "\n\n".join(f"![{name}](figures/{name})" for name in pictures))
    (folder / "posterior_ladder.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [entry.partition(":")[2].strip() for entry in lines if entry.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({os.cpu_count()} cores)"


def copy(folder: Path, report: str | None, figures: str | None) -> None:
    """Copy the report and the figures to where they are kept."""
    if report:
        Path(report).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "posterior_ladder.md", report)
    if figures:
        Path(figures).mkdir(parents=True, exist_ok=True)
        for path in (folder / "figures").glob("*.png"):
            shutil.copy(path, figures)
