"""The pictures and numbers of docs/tutorial/reading-the-posterior.md, from a finished run.

    python experiments/reading.py analysis/example/bops --figures docs/figures

The pictures are the charts of the run's report on white paper; what is printed is what the page quotes.
"""

import argparse
import json
import sys
from pathlib import Path

import vl_convert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.scripts import run_script
from pyro_blora.report import RunFiles, Section, headline, sections_of

_WIDTH, _SCALE = 680, 1.5


def picture(spec: dict) -> bytes:
    """A chart as PNG, black on white."""
    config = {**spec["config"], "font": "sans-serif", "background": "white"}
    text = json.dumps({**spec, "width": _WIDTH, "config": config}).replace("currentColor", "#222")
    return vl_convert.vegalite_to_png(json.loads(text), scale=_SCALE)


def name_of(section: Section, number: int) -> str:
    return f"{section.title.lower().replace(' ', '-')}{f'-{number + 1}' if number else ''}.png"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"), help="folder of the pictures")
    options = parser.parse_args(arguments)
    run = RunFiles(options.run)
    options.figures.mkdir(parents=True, exist_ok=True)
    for what, value, remark in headline(run.summary):
        print(f"{what}: {value} ({remark})")
    for section in sections_of(run):
        print(f"\n{section.title}\n{section.missing}", *section.paragraphs, *section.warnings, sep="\n")
        for caption, table, is_open in section.tables:
            if is_open:
                print(caption, table.to_string(index=False), sep="\n")
        for number, (spec, _) in enumerate(section.charts):
            (options.figures / name_of(section, number)).write_bytes(picture(spec))


if __name__ == "__main__":
    run_script(main)
