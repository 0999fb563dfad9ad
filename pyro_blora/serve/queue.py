"""Requests that come together share a forward pass: a queue in front of one thread that has the model.

A batch is whatever waits when the thread is free, at most `batch_size` texts; the first of them waits `wait` seconds
for others to come. So a single client waits that long, and under load batches are as large as the model is slow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..deploy.answering import Unreadable
from .desk import Asked

logger = logging.getLogger(__name__)
Rows = list[dict[str, Any]]


class Full(Exception):
    """More texts wait than may, or the server is ending."""


@dataclass(eq=False)
class _Job:
    asked: Asked
    arrived: float
    done: asyncio.Future[Rows]


class Queue:
    """`await queue.answer(asked)`, while `run` is a task of the same event loop.

    work: answers several requests, in the thread. seen: called with (texts, seconds) of every forward pass.
    """

    def __init__(
        self, work: Callable[[Sequence[Asked]], list[Rows]], *, batch_size: int, wait: float, max_texts: int,
        seen: Callable[[int, float], None] = lambda texts, seconds: None,
    ) -> None:  # fmt: skip
        self._work, self._batch_size, self._wait, self._max, self._seen = work, batch_size, wait, max_texts, seen
        self._jobs: deque[_Job] = deque()
        self._come = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.is_open = True

    @property
    def waiting(self) -> int:
        """Texts that no forward pass has taken yet."""
        return sum(len(job.asked.texts) for job in self._jobs)

    async def answer(self, asked: Asked) -> Rows:
        """Errors: Full; whatever the model raises for these texts."""
        if not self.is_open or (self._jobs and self.waiting + len(asked.texts) > self._max):
            raise Full
        job = _Job(asked, time.monotonic(), asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._come.set()
        return await job.done

    async def run(self) -> None:
        """Until it is closed with nothing left to do."""
        try:
            await self._until_closed()
        finally:
            self.is_open = False  # also where it fails: then /health says so

    async def _until_closed(self) -> None:
        while self.is_open or self._jobs:
            await self._come.wait()
            late = self._jobs[0].arrived + self._wait - time.monotonic() if self._jobs else 0.0
            if late > 0 and self.waiting < self._batch_size and self.is_open:
                await asyncio.sleep(late)
            jobs = self._next()
            if not self._jobs and self.is_open:
                self._come.clear()
            if jobs:
                await self._run(jobs)

    async def close(self) -> None:
        """Take no more; `run` ends when those that wait are answered."""
        self.is_open = False
        self._come.set()

    def stop(self) -> None:
        """After `run`: the thread ends, and who still waits is told."""
        self._thread.shutdown(wait=True)
        for job in self._jobs:
            if not job.done.done():
                job.done.set_exception(Full())

    def _next(self) -> list[_Job]:
        """Those of the next forward pass: at least one, and as many as there is room for."""
        jobs: list[_Job] = []
        size = 0
        while self._jobs and (not jobs or size + len(self._jobs[0].asked.texts) <= self._batch_size):
            job = self._jobs.popleft()
            if not job.done.done():  # nobody waits for it any more
                jobs.append(job)
                size += len(job.asked.texts)
        return jobs

    async def _run(self, jobs: list[_Job]) -> None:
        """One forward pass; where it fails, one for each request, so that only who has caused it is told."""
        begun = time.perf_counter()
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._work, [j.asked for j in jobs])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    await self._run([job])
            elif not jobs[0].done.done():
                if not isinstance(error, Unreadable):  # which is the client's, who is told
                    logger.exception("a request could not be answered")
                jobs[0].done.set_exception(error)
            return
        self._seen(sum(len(job.asked.texts) for job in jobs), time.perf_counter() - begun)
        for job, rows in zip(jobs, found, strict=True):
            if not job.done.done():
                job.done.set_result(rows)
