"""The field's words in the package's text: comments, docstrings, messages, README and docs."""

import io
import re
import tokenize

import pytest
from pages import GUIDES, ROOT, prose

MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_blora").rglob("*.py"))
PAGES = ["pyro_blora/README.md", *GUIDES]
BANNED = {  # word: what stands in its place
    r"\blaws?\b": "distribution",
    r"\bevidence\b": "log Bayes factor; the marginal likelihood is the log evidence",
    r"\bchains?\b": "ladder",
    r"\bsurest\b|\bsurer\b": "most confident",
}
ALLOWED = re.compile(
    r"""`[^`\n]*`|\{[^{}]*\}"""  # code: a name in a text
    r"""|\blaws?\(\)|\blaws\(\{"""  # the methods of Weights and Guide
    r"""|\blog evidence\b|\bevidence lower bound\b|\bevidence of miscalibration\b"""
    r"""|\bmore than chance, so evidence\b|"no evidence of\""""  # of miscalibration, in verdicts.py
    r"""|\bchain rule\b""",
    re.IGNORECASE,
)
OF_ARVIZ = re.compile(r"\brestarts?\b|posterior\.nc|ArviZ|R-hat|\(chain, draw\)", re.IGNORECASE)
CHAINS = {"pyro_blora/posterior/arviz.py", "pyro_blora/posterior/arviz_compat.py"}  # write and read ArviZ's chains


def text_of(source: str) -> list[str]:
    """The lines of comments and strings, without strings of a single word, which are names."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    texts = [token.string for token in tokens if token.type in kinds]
    return [line for text in texts if not re.fullmatch(r"\w*(['\"])\w+\1", text) for line in text.splitlines()]


def banned(lines: list[str], *, has_chains: bool = False) -> list[str]:
    """The banned words of these lines, each with its line and with what stands in its place."""
    found = []
    for line in lines:
        rest = ALLOWED.sub("", line)
        for word, instead in BANNED.items():
            if instead == "ladder" and (has_chains or OF_ARVIZ.search(line)):
                continue
            found += [f"{match}: write {instead}: {line.strip()}" for match in re.findall(word, rest, re.IGNORECASE)]
    return found


@pytest.mark.parametrize("path", MODULES)
def test_modules_use_the_fields_words(path):
    assert banned(text_of((ROOT / path).read_text(encoding="utf-8")), has_chains=path in CHAINS) == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_use_the_fields_words(page):
    assert banned(prose(page).splitlines()) == []


@pytest.mark.parametrize(
    "text",
    [
        '"""The law of a gate."""',
        '"""Two laws."""',
        "x = 1  # what evidence the data hold",
        'f"a chain of {K} gates"',
        '"the surest examples"',
    ],
)
def test_a_banned_word_is_found(text):
    assert len(banned(text_of(text))) == 1


def test_names_and_arvizs_chains_are_allowed():
    assert banned(text_of('law = chains["law"]  # `laws` of each restart, a chain of posterior.nc')) == []
