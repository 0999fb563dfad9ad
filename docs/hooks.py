"""What `mkdocs build` does beside rendering docs/: pages of the repository join the site, references are generated.

A page may link to any file of the repository by its relative path, as it must on a forge. Such a file becomes part of
the site under its own path (a Markdown file or a notebook as a page), and the link is rewritten, so that the site
stands alone.
Markers are replaced: `<!-- command line -->` by the reference of every flag, from the parser itself,
`<!-- output: pyro-blora priors -->` by what that command prints, and `<!-- modules: pyro_blora/priors -->` by the
docstrings of all modules of that package.
"""

import argparse
import base64
import contextlib
import io
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?\)")  # of a file: nothing with a scheme, nothing that is only an anchor
MODULES = re.compile(r"<!-- modules: ([\w/]+) -->")
OUTPUT = re.compile(r"<!-- output: pyro-blora ([^>]+?) -->")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config) -> Files:
    """Add the benchmarks' pages, and every file outside docs/ that a page links to."""
    pages = [*(f"docs/{file.src_uri}" for file in files.documentation_pages()),
             *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("benchmarks/**/*.md")))]  # fmt: skip
    found = set(pages)
    for page in pages:  # it grows
        new = [path for path in linked(page, (ROOT / page).read_text(encoding="utf-8")) if path not in found]
        found.update(new)
        pages += [path for path in new if path.endswith(".md")]
    for path in sorted(found):
        if path.startswith("docs/") or not (ROOT / path).is_file():
            continue
        if path.endswith(".ipynb"):
            for name, content in notebook(path).items():
                files.append(File.generated(config, name, content=content))
        else:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Rewrite links that leave docs/, and generate what a marker asks for."""
    here = page.file.src_uri
    repository = here if page.file.generated_by else f"docs/{here}"
    parts = FENCE.split(markdown)
    markdown = "".join(part if part.startswith("```") else rewritten(part, repository) for part in parts)
    if "<!-- command line -->" in markdown:
        markdown = markdown.replace("<!-- command line -->", "\n\n".join(command_line()))
    markdown = MODULES.sub(lambda match: "\n\n".join(modules(match[1])), markdown)
    return OUTPUT.sub(lambda match: f"```text\n{output_of(match[1].split())}\n```", markdown)


def linked(page: str, markdown: str) -> Iterator[str]:
    """The files that a page links to, as paths of the repository.  page: a path of the repository, too."""
    for part in FENCE.split(markdown):
        if not part.startswith("```"):
            yield from (of_repository(page, match[2]) for match in LINK.finditer(part))


def rewritten(markdown: str, page: str) -> str:
    here = posixpath.dirname(of_site(page)) or "."

    def replace(match: re.Match) -> str:
        target = posixpath.relpath(of_site(of_repository(page, match[2])), here)
        return f"{match[1]}{target}{match[3] or ''})"

    return LINK.sub(replace, markdown)


def of_repository(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def of_site(path: str) -> str:
    """Where a file of the repository is in the site, before Markdown becomes HTML."""
    path = path.removeprefix("docs/")
    return f"{path.removesuffix('.ipynb')}.md" if path.endswith(".ipynb") else path


def notebook(path: str) -> dict[str, str | bytes]:
    """An executed notebook as files of the site: a page, and its pictures beside it."""
    page, files = [], {}
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        page.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.removesuffix('.ipynb')}-{len(files) + 1}.png"
                files[name] = base64.b64decode("".join(data["image/png"]))
                page.append(f"![]({posixpath.basename(name)})")
            elif "text/html" in data:
                table = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
                page.append(re.sub(r"<(table|tr)\b[^>]*>", r"<\1>", table))  # in the site's own style
            else:
                page.append("```text\n" + "".join(data.get("text/plain", output.get("text", []))) + "\n```")
    return {of_site(path): "\n\n".join(page), **files}


def modules(package: str) -> Iterator[str]:
    """mkdocstrings' directives for a package and its modules; a name is shown where it is defined.

    Of pyro_blora itself: the modules beside its packages that no page names and that are not how it imports.
    """
    paths = sorted((ROOT / package).rglob("*.py"), key=lambda path: (path.parent, path.stem != "__init__", path))
    if package == "pyro_blora":
        named = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
        internal = {"__init__", "__main__", "lazily", "old_names"}
        paths = [path for path in (ROOT / package).glob("*.py") if path.stem not in internal]
        paths = sorted(path for path in paths if f"::: pyro_blora.{path.stem}\n" not in named)
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.stem == "__init__":
            yield f"::: {name.removesuffix('.__init__')}\n    options: {{members: false}}"
        else:
            yield f"::: {name}"


def command_line() -> Iterator[str]:
    """A section for every command: how it is called, and its flags by group."""
    from pyro_blora.__main__ import _parser

    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    purposes = {action.dest: action.help for action in commands._choices_actions}
    for name, command in commands.choices.items():
        positional = [action.metavar or action.dest.upper() for action in command._actions if not action.option_strings]
        yield f"## {name}"
        yield sentence(command.description or purposes[name])
        yield f"```text\n{' '.join(['pyro-blora', name, *positional])}\n```"
        for group in command._action_groups:
            if actions := [action for action in group._group_actions if action.dest != "help"]:
                yield from table_of(group.title, actions, command)
        if command.epilog:
            yield f"```text\n{command.epilog.replace('%%', '%')}\n```"


def table_of(title: str, actions: Iterable[argparse.Action], parser: argparse.ArgumentParser) -> Iterator[str]:
    lines = [f"| {sentence(title).rstrip('.')} | |", "|---|---|"]
    for action in actions:
        value = action.metavar or ("" if action.nargs == 0 or action.choices else action.dest.upper())
        names = " ".join([*action.option_strings[-1:], str(value)]).strip()
        text = parser._get_formatter()._expand_help(action) if action.help else ""
        choices = f"; one of {', '.join(map(str, action.choices))}" if action.choices else ""
        lines.append(f"| `{names or action.dest}` | {(text + choices).removeprefix('; ').replace('|', '&#124;')} |")
    yield "\n".join(lines)


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def output_of(arguments: list[str]) -> str:
    """What `pyro-blora` prints.  Errors: RuntimeError where it fails."""
    from pyro_blora.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(arguments)
    if code:
        raise RuntimeError(f"pyro-blora {' '.join(arguments)} ended with code {code}")
    return printed.getvalue().rstrip()
