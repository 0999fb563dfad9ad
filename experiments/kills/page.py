"""benchmarks/chaos.md: what came of the kills."""

from pathlib import Path

import pandas as pd

from .trials import is_fine

MOMENTS = ("before the first step", "training", "after training", "page", "finished")


def write(path: Path, kills: list[dict], command: str, machine: str) -> None:
    table = pd.DataFrame(kills)
    polite = table[table["signal"] != "KILL"]
    killed = table[(table["signal"] == "KILL") & (table["moment"] == "training")]
    failed = table[[not is_fine(kill) for kill in kills]]
    lines = [
        "# Kills", "", "```sh", command, "```", "",
        f"Tiny networks of two layers, twelve steps, a checkpoint every three; {machine}. Real trainings of the",
        "command line, killed as often at a moment drawn evenly from the whole life of a run that nothing disturbs,",
        "evaluation and report included, as at a step of its training; then the same command until it is finished.",
        "*Equal*: every tensor, draw, prediction, logged line and number of the finished folder is that of the",
        "undisturbed run, to the bit, seconds and memory left out. Some runs are killed twice.",
        "", f"{len(table)} kills: {int(table['resumed'].sum())} resumed by the next command, "
        f"{int(table['equal'].sum())} equal to the bit, {int((~table['report']).sum())} reports missing, "
        f"{int((~table['resumed']).sum())} of runs that were lost.", "",
        *_lines(_by(table, "subject")), "", "By signal:", "", *_lines(_by(table, "signal")), "",
        f"SIGTERM and SIGINT ended a run {_range(polite['seconds to end'], 's')} after they were sent, with exit code "
        f"143 or 130 in {int(polite['right code'].sum())} of {len(polite)} cases, and left at most "
        f"{int(polite['lost'].max()) if len(polite) else 0} logged steps without a checkpoint"
        f"{', those of a SIGKILL before it' if len(polite) and polite['lost'].max() else ''}. SIGKILL in training "
        f"left {_range(killed['lost'], 'steps')}.",
    ]  # fmt: skip
    if len(failed):
        lines += ["", "What went wrong:", "", *(
            f"- {row['subject']}, SIG{row['signal']} in {row['moment']}: exit codes {row['code']}, then "
            f"{row['codes']}; different: {row['different'] or 'nothing'}; left over: {row['left over'] or 'nothing'}. "
            f"{row['said']}"
            for _, row in failed.iterrows()
        )]  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _by(table: pd.DataFrame, column: str) -> pd.DataFrame:
    rows = []
    for name, mine in [*table.groupby(column, sort=False), ("all", table)]:
        rows.append({
            column: name, "kills": len(mine),
            **{f"in {m}" if m in ("training",) else m: int((mine["moment"] == m).sum()) for m in MOMENTS},
            "resumed": int(mine["resumed"].sum()), "equal": int(mine["equal"].sum()),
            "reports missing": int((~mine["report"]).sum()), "lost": int((~mine["resumed"]).sum()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _lines(table: pd.DataFrame) -> list[str]:
    head = "| " + " | ".join(table.columns) + " |"
    return [head, "|---" + "|--:" * (len(table.columns) - 1) + "|",
            *("| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False))]  # fmt: skip


def _range(values: pd.Series, unit: str) -> str:
    if not len(values):
        return f"no {unit}"
    return f"{values.min():.3g} to {values.max():.3g} {unit} (median {values.median():.2g})"
