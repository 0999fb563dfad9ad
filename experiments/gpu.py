"""Everything that waits for a GPU, in one command that ends inside its minutes.

    python experiments/gpu.py --minutes 8 --out FOLDER           # on a machine with a GPU
    python experiments/gpu.py --minutes 8 --out FOLDER --tiny    # the same code on a CPU, in small

Three parts, in order of value: works, fast, learns. Each line of each part runs in a process of its own with a time
limit, and a part's page and JSON are written again after every line. Weights and data are taken from .gpu/minilm,
.gpu/glue and .gpu/texts where they are, else from the demo's package, --glue_dir and --texts: a folder with e2e/,
choice/openbookqa/ and squad/ as language_models.py has them, and SmolLM2's tokenizer in tokenizer/.
"""

import argparse
import functools
import shlex
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.on_gpu import fast, learns, page, works
from experiments.on_gpu.session import ROOT, Session, run_part
from pyro_blora.models import backbone_path

# a part's module, title, share of the minutes that are left when it begins, and how many lines at once
_PARTS = {
    "works": (works, "What works on a GPU", 0.5, 4),
    "fast": (fast, "How fast it is on a GPU", 0.6, 1),
    "learns": (learns, "What is learned on a GPU", 1.0, 6),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="everything has ended by then")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pages")
    parser.add_argument("--tiny", action="store_true", help="small networks and few rows, for a CPU")
    parser.add_argument("--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS))
    parser.add_argument("--only", nargs="+", default=[""], help="only the lines whose name contains one of these")
    parser.add_argument("--glue_dir", type=Path, help="GLUE in the official layout, where .gpu/glue is not")
    parser.add_argument("--texts", type=Path, help="data of the other kinds of outcome, where .gpu/texts is not")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    packed = ROOT / ".gpu" / "minilm"
    try:
        minilm = packed if packed.is_dir() and not options.tiny else Path(backbone_path("demo"))
    except ValueError as error:  # the package with its weights is not installed
        parser.error(str(error))
    glue, texts = (given or (packed.with_name(name) if packed.with_name(name).is_dir() else None)
                   for given, name in ((options.glue_dir, "glue"), (options.texts, "texts")))  # fmt: skip
    session = Session(options.out.resolve(), began + 60 * options.minutes, options.tiny, minilm, glue, texts)
    command, told = shlex.join(["python", "experiments/gpu.py", *(arguments or sys.argv[1:])]), page.machine()
    print(told, flush=True)
    try:
        for part in options.parts:
            module, title, share, at_once = _PARTS[part]
            share = 1.0 if part == options.parts[-1] else share
            checks = [check for check in module.checks(session) if any(part in check.name for part in options.only)]
            if part == "learns" and glue is None:
                print("learns: left out, as there is no GLUE: give --glue_dir", flush=True)
                continue
            write = functools.partial(page.write, session.out, part, title, told, command)
            at_once = 2 if options.tiny and at_once > 1 else at_once
            run_part(session, part, checks, at_once=at_once, seconds=share * session.left, write=write)
    finally:
        shutil.rmtree(session.work, ignore_errors=True)
    print(f"ended after {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
