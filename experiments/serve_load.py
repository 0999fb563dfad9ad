"""How many requests `pyro-blora serve` answers, and how fast, by clients, with shared forward passes and without.

Clients ask for one text at a time and wait for the answer. All servers run, idle but for the one that is measured, and
rounds take turns, so that a change of the machine is not one of a setting.

python experiments/serve_load.py packed onnx runs/… --glue_dir GLUE --report benchmarks/serving.md
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch, and for the servers

import aiohttp
import numpy as np

from experiments.bench.page import machine
from experiments.studies.scripts import run_script
from pyro_blora.tasks import get_task

SETTINGS = {  # flags of the server, by what the page calls them
    "shared": [],
    "shared, no waiting": ["--wait_ms", "0"],
    "each alone": ["--batch_size", "1", "--wait_ms", "0"],
}
_SHARES = (50, 95, 99)  # percentiles
_TEXTS = 512  # that are asked, in turn


class Load(NamedTuple):
    """Of one server under so many clients: requests a second, percentiles in ms, texts of a forward pass."""

    per_second: float
    percentiles: tuple[float, ...]
    texts: float


class Server(NamedTuple):
    model: str
    setting: str
    url: str


Found = dict[tuple[Server, int], list[Load]]  # by server and clients, a round each


@contextlib.contextmanager
def started(folder: Path, setting: str, threads: int) -> Iterator[str]:
    """The address of a server in a process of its own."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
    flags = ["--port", "0", "--rate", "0", "--quiet", *SETTINGS[setting]]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_blora", "serve", str(folder), *flags], stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()  # printed when it is ready
        if not url:
            raise ValueError(f"{folder} is not served: the sentence above says why")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


async def measured(url: str, texts: Sequence[Any], clients: int, seconds: float) -> Load:
    """Under so many clients for so many seconds, after a tenth of that unmeasured.

    Errors: RuntimeError for any answer but 200.
    """
    taken: list[float] = []
    order = itertools.cycle(texts)
    begun = time.perf_counter() + seconds / 10
    ends = begun + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as session:

        async def told(name: str) -> float:
            async with session.get(f"{url}/metrics") as response:
                return float(re.search(rf"^{name} (\S+)$", await response.text(), re.MULTILINE)[1])

        async def client() -> None:
            while (now := time.perf_counter()) < ends:
                async with session.post(f"{url}/predict", json={"text": next(order)}) as response:
                    answer = await response.read()
                if response.status != 200:
                    raise RuntimeError(f"{response.status}: {answer.decode()}")
                if now >= begun:
                    taken.append(time.perf_counter() - now)

        before = await told("pyro_blora_batch_texts_sum"), await told("pyro_blora_batch_texts_count")
        await asyncio.gather(*(client() for _ in range(clients)))
        after = await told("pyro_blora_batch_texts_sum"), await told("pyro_blora_batch_texts_count")
    if not taken:
        raise RuntimeError(f"no answer within {seconds:g} s: more --seconds")
    return Load(
        len(taken) / (time.perf_counter() - begun), tuple(1000 * np.percentile(taken, _SHARES)),
        (after[0] - before[0]) / (after[1] - before[1]),
    )  # fmt: skip


async def info_of(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/info") as response:
        return await response.json()


def texts_of(info: dict[str, Any], glue_dir: str | None) -> list[Any]:
    """Held-out texts of the model's task, as a request has them."""
    rows = get_task(info["task"]).load(glue_dir=glue_dir and Path(glue_dir), n_train=None)["eval"]
    columns = (rows[name][:_TEXTS] for name in info["columns"])
    return [x[0] if len(x) == 1 else x for x in zip(*columns, strict=True)]


def middle(loads: Sequence[Load]) -> Load:
    """The median of rounds, number by number."""
    return Load(
        statistics.median(load.per_second for load in loads),
        tuple(map(statistics.median, zip(*(load.percentiles for load in loads), strict=True))),
        statistics.median(load.texts for load in loads),
    )


def page(found: Found, words: float, options: argparse.Namespace) -> str:
    """The report."""
    told = machine("cpu")
    versions = ", ".join(f"{name} {x}" for name, x in told.items() if name in ("python", "torch", "transformers"))
    folders = " ".join(folder.resolve().name for folder in options.folders)
    lines = [
        "# Serving",
        f"`python experiments/serve_load.py {folders} --glue_dir GLUE --threads {options.threads}` on "
        f"{told['hardware']}, {told['date']}, commit {told['commit']}; {versions}. Before it began, the machine had "
        f"{options.busy:.1f} processes to run.",
        f"Each client asks for one text, of {words:.0f} words on average, waits for the answer and asks for the next. "
        f"The clients are one process on the same machine. Medians of {options.rounds} rounds of {options.seconds:g} s "
        "that take turns, and in brackets the least and the most of the rounds. *Shared*: requests that come together "
        "share a forward pass, for which the first waits 2 ms. *Each alone*: `--batch_size 1 --wait_ms 0`.",
    ]  # fmt: skip
    for model in dict.fromkeys(server.model for server, _ in found):
        rows = [
            "| forward passes | clients | requests/s | p50, ms | p95, ms | p99, ms | texts in a pass |",
            "|---" * 7 + "|",
        ]
        for (server, clients), loads in found.items():
            if server.model == model:
                load, each = middle(loads), [x.per_second for x in loads]
                rate = f"{load.per_second:.1f} [{min(each):.1f}, {max(each):.1f}]"
                cells = [server.setting, clients, rate, *(f"{x:.1f}" for x in load.percentiles), f"{load.texts:.1f}"]
                rows.append(f"| {' | '.join(map(str, cells))} |")
        lines += [f"## {model}", "\n".join(rows)]
    return "\n\n".join(lines) + "\n"


def draw(found: Found, path: Path) -> None:
    """p95 over requests per second, a line a setting, a panel a model."""
    import matplotlib.pyplot as plt

    models = [*dict.fromkeys(server.model for server, _ in found)]
    figure, panels = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.4), squeeze=False, layout="constrained")
    for panel, model in zip(panels[0], models, strict=True):
        panel.set(title=model, xlabel="requests per second", ylabel="95th percentile (ms)", yscale="log")
        panel.grid(alpha=0.3)
        for setting, marker in zip(SETTINGS, "os^", strict=True):
            loads = [middle(x) for (s, _), x in found.items() if (s.model, s.setting) == (model, setting)]
            rates, late = [x.per_second for x in loads], [x.percentiles[1] for x in loads]
            panel.plot(rates, late, marker=marker, label=setting)
    panels[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="of packed or ONNX models, or of runs")
    add("--glue_dir", metavar="FOLDER", help="of the GLUE release, whose held-out texts are asked")
    add("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="that ask at a time")
    add("--settings", nargs="+", choices=[*SETTINGS], default=[*SETTINGS], help="of the forward passes")
    add("--seconds", type=float, default=10.0, help="of a measurement")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1, help="of a server")
    add("--report", type=Path, metavar="FILE", help="the page (default: stdout)")
    add("--figures", type=Path, metavar="FOLDER", help="for serving.png")
    options = parser.parse_args(arguments)
    options.busy = os.getloadavg()[0]
    found: Found = {}
    with contextlib.ExitStack() as running:
        servers = []
        for folder, setting in itertools.product(options.folders, options.settings):
            url = running.enter_context(started(folder, setting, options.threads))
            info = asyncio.run(info_of(url))
            model = f"{info['form']}: {info['model']}"
            servers.append((Server(model, setting, url), texts_of(info, options.glue_dir)))
        for turn, clients, (server, texts) in itertools.product(range(options.rounds), options.clients, servers):
            load = asyncio.run(measured(server.url, texts, clients, options.seconds))
            found.setdefault((server, clients), []).append(load)
            late = ", ".join(f"{x:.1f}" for x in load.percentiles)
            print(f"round {turn}, {server.model}, {server.setting}, {clients} clients: {load.per_second:.1f} requests/s"
                  f", p50, p95, p99 {late} ms, {load.texts:.1f} texts a pass", file=sys.stderr, flush=True)  # fmt: skip
    in_order = {key: found[key] for key in sorted(found, key=lambda key: [*SETTINGS].index(key[0].setting))}
    words = [len(" ".join([x] if isinstance(x, str) else x).split()) for _, texts in servers for x in texts]
    text = page(in_order, statistics.mean(words), options)
    if options.figures:
        draw(in_order, options.figures / "serving.png")
        text += "\n![95th percentile of the latency over requests per second](figures/serving.png)\n"
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    run_script(main)
