"""Split SQuAD's development set by article: three of four to learn from, of the others XQuAD's questions to evaluate.

python experiments/squad_split.py --dev dev-v1.1.json --xquad xquad.en.json --to FOLDER

Every article of the development set has questions in XQuAD's 1,190, so whole articles are held out.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.scripts import run_script

EVERY = 4  # of the articles, one is held out


def articles_in(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["data"]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--dev", "--xquad", "--to"):
        parser.add_argument(name, type=Path, required=True)
    given = parser.parse_args(arguments)
    dev = articles_in(given.dev)
    held_out = {q["id"] for article in dev[::EVERY] for paragraph in article["paragraphs"] for q in paragraph["qas"]}
    learned = [article for i, article in enumerate(dev) if i % EVERY]
    asked = articles_in(given.xquad)
    for paragraph in (paragraph for article in asked for paragraph in article["paragraphs"]):
        paragraph["qas"] = [q for q in paragraph["qas"] if q["id"] in held_out]
    given.to.mkdir(parents=True, exist_ok=True)
    for name, articles in (("train", learned), ("eval", asked)):
        (given.to / f"{name}.json").write_text(json.dumps({"data": articles}), encoding="utf-8")
        print(f"{name}.json: {sum(len(x['qas']) for article in articles for x in article['paragraphs']):,} questions")


if __name__ == "__main__":
    run_script(main)
