"""A run folder, or a grid's, becomes one HTML page: no network, no other file, light or dark, phone or paper."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import jinja2
import markupsafe

from ..files import REPORT, replace_text
from .cards import headline
from .grid import grid_page
from .run_folder import Link, RunFiles, Section
from .sections.contents import sections_of
from .vega import vega_script

_CODE = re.compile(r"`([^`]+)`|(?<![\w-])(--[a-z]\w*(?:\.\w+)*)")
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: str | Path, *, sections: Iterable[str] = ()) -> Path:
    """Write report.html into the folder of a finished run, or of a grid of them; an older page is replaced.

    sections: of a run's page, beside those that are registered: functions in files, `file.py:function`.
    Errors: ValueError for a folder that is neither; NotWritten, which leaves the older page.
    """
    folder = Path(folder).expanduser()
    page = _run_page(RunFiles(folder), sections) if (folder / "summary.json").is_file() else _grid_page(folder)
    replace_text(folder / REPORT, page)
    return folder / REPORT


def _run_page(run: RunFiles, more: Iterable[str]) -> str:
    summary = run.summary
    method = summary.get("method", "bayesian_lora")
    of = f"prior {summary['prior']}" if method == "bayesian_lora" else method
    title = f"{summary['task']} · {summary['backbone']} · {of}"
    return render(title, run.folder.resolve().name, headline(summary), sections_of(run, more))


def _grid_page(folder: Path) -> str:
    cards, sections = grid_page(folder)
    return render(f"Grid {folder.resolve().name}", folder.resolve().name, cards, sections)


def render(title: str, name: str, cards: list[tuple[str, str, str]], sections: list[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["marked"] = marked
    environment.tests["link"] = lambda cell: isinstance(cell, Link) and cell.is_safe
    specs = {f"chart-{i}-{j}": spec for i, s in enumerate(sections) for j, (spec, _) in enumerate(s.charts)}
    script = (vega_script() if specs else "").replace("</script", "<\\/script")
    return environment.get_template("report.html.jinja").render(
        title=title, name=name, cards=cards, sections=sections, specs=as_script(specs), script=script
    )


def marked(text: str) -> markupsafe.Markup:
    """A text as HTML; what is in backticks, and what looks like a flag, as code."""
    return markupsafe.Markup(_CODE.sub(r"<code>\1\2</code>", str(markupsafe.escape(text))))


def as_script(value) -> str:
    """JSON that is safe inside a script element, whatever its texts hold: no tag, comment or line end of JavaScript."""
    text = json.dumps(value, allow_nan=False)  # in which these characters occur in strings only
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
