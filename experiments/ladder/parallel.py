"""Independent jobs over the processors: forked, so that they need not be pickled; their results are."""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch

_jobs: list[Callable] = []  # of the pool at work: its forks inherit them


def _run(place: int) -> Any:
    torch.set_num_threads(1)
    return _jobs[place]()


def in_parallel(jobs: list[Callable[[], Any]], processes: int) -> Iterator:
    """Results in the order of the jobs, each the same as if it ran alone; in this process where nothing can fork."""
    if min(processes, len(jobs)) < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from (job() for job in jobs)
        return
    _jobs[:] = jobs
    try:
        with multiprocessing.get_context("fork").Pool(min(processes, len(jobs))) as pool:
            yield from pool.imap(_run, range(len(jobs)))
    finally:
        _jobs.clear()
