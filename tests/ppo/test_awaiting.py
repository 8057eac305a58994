import asyncio
import gc
import threading

import pytest

from hbat.ppo.rewards.event_loop import EventLoop


def alive():
    return [each for each in threading.enumerate() if each.name == "hbat-event-loop"]


async def answer(value, delay=0.0):
    await asyncio.sleep(delay)
    return value


async def fail(error):
    await asyncio.sleep(0)
    raise error


def test_results_come_in_the_order_of_what_was_awaited():
    assert EventLoop().gather([answer(1, 0.02), answer(2)]) == [1, 2]


def test_it_waits_also_where_a_loop_runs_already():
    async def notebook():
        return EventLoop().gather([answer(1), answer(2)])

    assert asyncio.run(notebook()) == [1, 2]


def test_calls_share_one_loop_so_that_clients_can_be_kept():
    loop = EventLoop()

    async def running():
        return asyncio.get_running_loop()

    first, second = loop.gather([running(), running()])
    assert first is second is loop.gather([running()])[0]


def test_the_first_failure_is_raised_at_once_and_cancels_the_others():
    cancelled = threading.Event()

    async def forever():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    loop = EventLoop()
    with pytest.raises(ValueError, match="first"):
        loop.gather([forever(), fail(ValueError("first"))])
    assert cancelled.wait(5)
    assert loop.gather([answer(3)]) == [3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_inside_a_coroutine_reaches_the_caller_and_leaves_the_loop_alive(error):
    loop = EventLoop()
    with pytest.raises(error):
        loop.gather([fail(error()), answer(1, 60)])
    assert loop.gather([answer(3)]) == [3]


def test_the_thread_ends_with_the_object():
    before = alive()
    loop = EventLoop()
    loop.gather([answer(1)])
    (thread,) = [each for each in alive() if each not in before]
    del loop
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
