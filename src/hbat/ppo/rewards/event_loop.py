"""Waits for coroutines in synchronous code, also where an event loop runs already, as in a notebook."""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Awaitable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


class _Interrupted(Exception):  # noqa: N818 - it carries an exception, such as KeyboardInterrupt, and is none
    """Carries what would end the loop's thread, and leave the waiting one to wait forever."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__()
        self.cause = cause


class EventLoop:
    """An event loop in a thread of its own, until the object is gone.

    It outlives a call, because what coroutines keep between calls, such as an HTTP client, belongs to the loop in
    which it was first used.
    """

    def __init__(self) -> None:
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = runner.get_loop()
        threading.Thread(target=_serve, args=(runner,), name="hbat-event-loop", daemon=True).start()
        weakref.finalize(self, _stop, self._loop)

    def gather(self, awaitables: Sequence[Awaitable[Result]]) -> list[Result]:
        """Wait for all at once; the first that fails cancels the others.

        Args:
            awaitables: Coroutines, or what else can be awaited in any loop.

        Returns:
            Their results, in order.

        Raises:
            BaseException: What the first that failed raised.
        """
        future = asyncio.run_coroutine_threadsafe(_gather(awaitables), self._loop)
        try:
            return future.result()
        except _Interrupted as carrier:
            raise carrier.cause from None
        except BaseException:
            future.cancel()  # matters where it is this thread that was interrupted
            raise


async def _gather(awaitables: Sequence[Awaitable[Result]]) -> list[Result]:
    tasks = [asyncio.ensure_future(_carried(each)) for each in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for each in tasks:
            each.cancel()


async def _carried(awaitable: Awaitable[Result]) -> Result:
    try:
        return await awaitable
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
        raise _Interrupted(error) from None


def _serve(runner: asyncio.Runner) -> None:
    with runner:  # cancels what is left and closes the loop
        runner.get_loop().run_forever()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # closed already
        loop.call_soon_threadsafe(loop.stop)
