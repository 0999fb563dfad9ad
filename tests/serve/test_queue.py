"""Requests that come together share a forward pass, and nobody gets another one's answer or error."""

import asyncio

import pytest

from pyro_blora.serve.desk import Asked
from pyro_blora.serve.guard import Rate
from pyro_blora.serve.queue import Full, Queue


def asked(*texts):
    return Asked([(text,) for text in texts], draws=False)


def together(requests, *, batch_size=4, wait=0.05, max_texts=100, work=None):
    """(what each request gets, texts of every forward pass)."""
    sizes = []

    def echo(each):
        return [[{"said": text} for (text,) in one.texts] for one in each]

    async def main():
        queue = Queue(work or echo, batch_size=batch_size, wait=wait, max_texts=max_texts,
                      seen=lambda texts, seconds: sizes.append(texts))  # fmt: skip
        running = asyncio.create_task(queue.run())
        found = await asyncio.gather(*map(queue.answer, requests), return_exceptions=True)
        await queue.close()
        await running
        queue.stop()
        return found

    return asyncio.run(main()), sizes


def test_each_gets_its_own_and_no_pass_is_too_large():
    requests = [asked(f"{i}a", f"{i}b") for i in range(5)] + [asked(*"uvwxyz")]
    found, sizes = together(requests)
    assert found == [[{"said": text} for (text,) in one.texts] for one in requests]
    assert sizes == [4, 4, 2, 6]  # one that is larger than a batch is not cut here


def test_without_waiting_the_first_goes_alone_and_the_others_together():
    assert together([asked(x) for x in "abcd"], wait=0.0)[1] == [4]  # they came in one step of the loop
    assert together([asked(x) for x in "abcd"], batch_size=1)[1] == [1, 1, 1, 1]


def test_an_error_reaches_who_has_caused_it_alone(caplog):
    def work(each):
        if any(text == "bad" for one in each for (text,) in one.texts):
            raise RuntimeError("no")
        return [[{"said": text} for (text,) in one.texts] for one in each]

    found, sizes = together([asked("a"), asked("bad"), asked("b")], work=work)
    assert found[0] == [{"said": "a"}] and found[2] == [{"said": "b"}] and isinstance(found[1], RuntimeError)
    assert sizes == [1, 1] and "could not be answered" in caplog.text


def test_more_than_may_wait_are_refused():
    found, _ = together([asked("a"), asked("b", "c"), asked("d")], max_texts=3)
    assert isinstance(found[2], Full) and found[1] == [{"said": "b"}, {"said": "c"}]


def test_who_waits_when_it_closes_is_answered_and_nobody_else():
    async def main():
        queue = Queue(lambda each: [[{}] for _ in each], batch_size=2, wait=60.0, max_texts=9)
        running = asyncio.create_task(queue.run())
        one = asyncio.create_task(queue.answer(asked("a")))
        await asyncio.sleep(0)
        await queue.close()
        with pytest.raises(Full):
            await queue.answer(asked("b"))
        return await one, await running

    assert asyncio.run(asyncio.wait_for(main(), 30)) == ([{}], None)


def test_who_has_gone_is_left_out():
    seen = []

    async def main():
        queue = Queue(lambda each: [seen.append(one) or [{}] for one in each], batch_size=8, wait=0.05, max_texts=9)
        running = asyncio.create_task(queue.run())
        gone, stays = (asyncio.create_task(queue.answer(asked(x))) for x in "ab")
        await asyncio.sleep(0)
        gone.cancel()
        await stays
        await queue.close()
        await running

    asyncio.run(main())
    assert seen == [asked("b")]


def test_a_rate_is_of_each_address_and_comes_back():
    now = [0.0]
    rate = Rate(60.0, lambda: now[0])
    assert [rate.wait("a") for _ in range(60)] == [0.0] * 60
    assert rate.wait("a") == pytest.approx(1.0) and rate.wait("b") == 0.0
    now[0] = 1.0
    assert rate.wait("a") == 0.0 and rate.wait("a") > 0
    assert all(Rate(0.0).wait("a") == 0.0 for _ in range(100))


def test_a_rate_below_one_in_a_minute_lets_one_through_from_time_to_time():
    now = [0.0]
    rate = Rate(0.5, lambda: now[0])
    assert rate.wait("a") == 0.0 and rate.wait("a") == pytest.approx(120.0)
    now[0] = 30.0
    assert rate.wait("a") == pytest.approx(90.0)
    now[0] = 120.0
    assert rate.wait("a") == 0.0 and rate.wait("a") > 0
    now[0] = 1000.0
    assert [rate.wait("a") > 0 for _ in range(2)] == [False, True]  # what was not asked for is not saved up
