"""The same as `pyro-blora train`, from a checkout: `python experiments/train.py --task sst2 --rank 8`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from pyro_blora.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
