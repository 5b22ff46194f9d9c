"""One call, many readers: threads, event loops, timeouts, cancellation."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tinker_jax import APIFuture, APITimeoutError, BadRequestError
from tinker_jax.api.futures import AwaitableConcurrentFuture, Derived, DerivedAPIFuture


def made(value=None, error=None) -> Future:
    future: Future = Future()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
    return future


def handles(future: Future) -> list[APIFuture]:
    return [AwaitableConcurrentFuture(future), DerivedAPIFuture(lambda value: value, future)]


def later(future: Future, value, seconds: float = 0.05) -> None:
    threading.Timer(seconds, lambda: future.set_result(value)).start()


@pytest.mark.parametrize("kind", [0, 1])
def test_a_result_can_be_read_many_times_from_threads_and_loops(kind):
    source: Future = Future()
    handle = handles(source)[kind]
    assert isinstance(handle, APIFuture)
    later(source, 7)

    async def gathered():
        return await asyncio.gather(handle, handle.coroutine(), handle.result_async(5))

    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(handle.result) for _ in range(2)] + [
            pool.submit(lambda: asyncio.run(gathered())) for _ in range(2)
        ]
        assert [read.result(5) for read in reads] == [7, 7, [7, 7, 7], [7, 7, 7]]
    assert asyncio.run(gathered()) == asyncio.run(gathered()) == [7, 7, 7]
    assert handle.future().result() == handle.result() == 7


@pytest.mark.parametrize("kind", [0, 1])
def test_a_timeout_leaves_the_call_running(kind):
    source: Future = Future()
    handle = handles(source)[kind]
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    with pytest.raises(TimeoutError):
        asyncio.run(handle.result_async(0.01))
    source.set_result(3)  # the loop that waited is closed by now
    assert handle.result(1) == asyncio.run(handle.result_async()) == 3


@pytest.mark.parametrize("kind", [0, 1])
def test_errors_come_out_of_every_read(kind):
    handle = handles(made(error=ValueError("bad")))[kind]
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            handle.result()
        with pytest.raises(ValueError, match="bad"):
            asyncio.run(handle.coroutine())


@pytest.mark.parametrize("kind", [0, 1])
def test_cancelling_the_awaiting_task_cancels_a_call_not_yet_begun(kind):
    source: Future = Future()
    handle = handles(source)[kind]

    async def main():
        task = asyncio.create_task(handle.coroutine())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert source.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        handle.result()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(handle.result_async())


def test_a_call_that_has_begun_is_not_cancelled():
    source: Future = Future()
    source.set_running_or_notify_cancel()
    derived = DerivedAPIFuture(lambda value: value + 1, source)
    assert not derived.cancel()
    source.set_result(1)
    assert derived.result(1) == 2


def test_cancelling_a_derived_future_cancels_the_main_source_only():
    info, main = Future(), Future()
    derived = Derived(lambda a, b: (a, b), info, main)
    assert derived.cancel() and main.cancelled() and not info.cancelled()
    info.set_result(1)
    assert derived.cancelled()
    assert concurrent.futures.wait([derived], timeout=1).not_done == set()


def test_derived_futures_fail_with_the_main_error_first():
    derived = Derived(lambda a, b: None, made(error=KeyError("info")), made(error=ValueError("main")))
    with pytest.raises(ValueError, match="main"):
        derived.result(1)
    with pytest.raises(ZeroDivisionError):
        Derived(lambda value: 1 // value, made(0)).result(1)


def test_sample_futures_work_as_plain_futures():
    source: Future = Future()
    handle = DerivedAPIFuture(lambda value: value, source)
    called = []
    handle.add_done_callback(lambda future: called.append(future.result()))
    later(source, 5)
    assert [f.result() for f in concurrent.futures.as_completed([handle], timeout=5)] == [5]
    assert called == [5] and handle.done()


def test_done_callbacks_run_and_waiting_inside_one_is_refused_instead_of_hanging():
    pool = ThreadPoolExecutor(1, thread_name_prefix="tinker_jax-engine test")
    gate = threading.Event()
    other = AwaitableConcurrentFuture(Future())
    caught: Future = Future()

    def callback(_):
        try:
            other.result()
        except RuntimeError as error:
            caught.set_result(str(error))

    first = AwaitableConcurrentFuture(pool.submit(gate.wait))
    first.future().add_done_callback(callback)
    gate.set()
    assert "the engine's own thread would never return" in caught.result(5)
    pool.shutdown()


def test_representations_tell_the_state():
    pending: Future = Future()
    cancelled: Future = Future()
    cancelled.cancel()
    states = [repr(AwaitableConcurrentFuture(f)) for f in (pending, cancelled, made(3), made(error=ValueError("x")))]
    assert [s.split(": ", 1)[1] for s in states] == ["pending>", "cancelled>", "3>", "failed: ValueError('x')>"]


@pytest.mark.parametrize("name", ["metrics", "loss_fn_outputs", "sequences", "path"])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_forgotten_result_is_named(kind, name):
    handle = handles(made(3))[kind]
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; this is a future: call .result\\(\\) or await it"):
        getattr(handle, name)
    assert not hasattr(handle, name)
    with pytest.raises(AttributeError, match=r"no attribute '_private'$"):
        _ = handle._private


def test_a_timeout_is_of_the_api_and_a_timeout_of_the_call_itself_comes_out_unchanged():
    for kind in (0, 1):
        handle = handles(Future())[kind]
        with pytest.raises(APITimeoutError, match=r"no result within 0\.01 seconds; the call goes on"):
            handle.result(0.01)
        own = TimeoutError("the caller's loss")
        failed = handles(made(error=own))[kind]
        with pytest.raises(TimeoutError) as caught:
            failed.result(1)
        assert caught.value is own
        with pytest.raises(BadRequestError, match="timeout: expected a finite number, got str '1'"):
            handle.result("1")
        with pytest.raises(BadRequestError, match="timeout"):
            asyncio.run(handle.result_async("1"))
