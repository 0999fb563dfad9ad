"""The section of the wrong answers that were the most confident."""

from ...registries import register_section
from ..run_folder import RunFiles, Section

_ROWS = 10  # of the examples that are named


@register_section("Confidently wrong", place=80)
def confidently_wrong(run: RunFiles, title: str) -> Section:
    """The wrong answers that were the most confident."""
    table = run.predictions
    answers = ("idx", "label", "decision", "deployed_decision")
    text = [n for n in table if table[n].dtype.kind not in "fiub" and n not in answers]
    try:
        probabilities = run.probabilities
    except ValueError:
        worst = table.sort_values("log_likelihood").head(_ROWS)
        return Section(
            title,
            ["The examples whose value was least expected."],
            tables=[("", worst[[*text, "label", "decision"]].round(2), True)],
        )
    names = [name.removeprefix("p_") for name in probabilities]
    wrong = table.assign(confidence=probabilities.max(axis=1))[table["decision"] != table["label"]]
    worst = wrong.sort_values("confidence", ascending=False).head(_ROWS)
    label, answer = (worst[column].map(lambda i: names[int(i)]) for column in ("label", "decision"))
    shown = worst[text].assign(label=label, answer=answer, confidence=worst["confidence"].map("{:.3f}".format))
    return Section(
        title,
        [f"{len(wrong)} of {len(table)} answers are wrong; these are the most confident."],
        tables=[("", shown, True)],
    )
