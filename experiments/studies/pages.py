"""The options that every study takes, and the page and figure that it leaves."""

import argparse
from collections.abc import Callable
from pathlib import Path

GLUE = ("--glue_dir", "folder of the official TSV release")


def study_parser(
    doc: str, name: str, *, max_train: int | None, output_dir: str, data: tuple[str, str] = GLUE
) -> argparse.ArgumentParser:
    """A parser of the shared options; the script's own are added to it.  data: flag and help of the data's folder."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(data[0], required=True, help=data[1])
    parser.add_argument("--backbone", default="demo", help="demo (MiniLM), a folder, or a name on the hub")
    parser.add_argument("--max_train", type=int, default=max_train)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output_dir", default=output_dir)
    parser.add_argument("--keep", type=Path, default=Path("benchmarks/cells"), help="folder of finished cells")
    parser.add_argument("--only_finished", action="store_true", help="train nothing: write the page of finished cells")
    parser.add_argument("--report", type=Path, default=Path(output_dir) / f"{name}.md")
    parser.add_argument("--figures", type=Path, default=Path(output_dir))
    return parser


def write_page(options: argparse.Namespace, name: str, rows: list[dict], report: Callable, figure: Callable) -> None:
    """Write the text of `report(options, rows)`, and the picture that `figure(rows, path)` saves.

    Errors: ValueError where no cell is finished.
    """
    if not rows:
        raise ValueError(f"no cell of this study is finished in {options.keep}: run it without --only_finished")
    for folder in (options.report.parent, options.figures):
        folder.mkdir(parents=True, exist_ok=True)
    figure(rows, options.figures / f"{name}.png")
    options.report.write_text(report(options, rows), encoding="utf-8")
