"""The worker keeps order within a lane, isolates failures, and lets other lanes pass a lane that waits for its caller."""

import threading
import time

import pytest

from tinker_jax.engine.worker import Detour, Worker
from tinker_jax.types.errors import BadRequestError, RequestFailedError


@pytest.fixture
def worker():
    worker = Worker("test", lambda: None, lambda: False)
    yield worker
    worker.close()


def test_requests_of_a_lane_run_in_order(worker):
    seen = []
    futures = [worker.submit("a", lambda i=i: seen.append(i)) for i in range(50)]
    for future in futures:
        future.result(5)
    assert seen == list(range(50))


def test_a_failed_request_does_not_block_the_next(worker):
    def fail():
        raise BadRequestError("no")

    failed, fine = worker.submit("a", fail), worker.submit("a", lambda: 7)
    with pytest.raises(BadRequestError, match="no"):
        failed.result(5)
    assert fine.result(5) == 7


def test_an_unexpected_error_arrives_typed_with_its_cause(worker):
    with pytest.raises(RequestFailedError, match="ZeroDivisionError") as caught:
        worker.submit("a", lambda: 1 // 0).result(5)
    assert caught.value.category == "server" and isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_cancelled_request_never_runs(worker):
    gate, ran = threading.Event(), []
    worker.submit("a", gate.wait)
    doomed = worker.submit("a", lambda: ran.append(1))
    assert doomed.cancel()
    gate.set()
    worker.submit("a", lambda: None).result(5)
    assert not ran


def test_a_handed_over_request_cancelled_while_it_is_refused_does_not_end_the_worker(worker):
    def refuse(future):
        future.cancel()
        raise BadRequestError("no")

    cancelled = worker.hand_over("a", refuse)
    assert worker.submit("a", lambda: 7).result(5) == 7
    assert cancelled.cancelled()


def test_a_detour_holds_its_own_lane_only_and_may_use_the_worker(worker):
    order = []
    release = threading.Event()

    def outside():
        order.append("outside")
        release.wait(5)
        return worker.submit("b", lambda: "from b").result(5)  # would deadlock on the worker's own thread

    custom = worker.submit("a", lambda: Detour(outside, lambda value: order.append("inside") or value))
    later = worker.submit("a", lambda: order.append("later"))
    assert worker.submit("b", lambda: "free").result(5) == "free"
    assert not later.done()
    release.set()
    assert custom.result(5) == "from b"
    later.result(5)
    assert order == ["outside", "inside", "later"]


def test_a_detour_that_raises_gives_the_callers_own_error_and_frees_the_lane(worker):
    class Mine(Exception):
        pass

    def outside():
        raise Mine("x")

    with pytest.raises(Mine):
        worker.submit("a", lambda: Detour(outside, lambda v: v)).result(5)
    assert worker.submit("a", lambda: 1).result(5) == 1


def test_background_work_runs_between_requests_until_done():
    left, futures = [3], []

    def background():
        left[0] -= 1
        if not left[0]:
            for future in futures:
                future.set_result("sampled")
        return left[0] > 0

    worker = Worker("test", lambda: None, background)
    got = worker.hand_over("s", futures.append)
    assert got.result(5) == "sampled" and left == [0]
    worker.close()


def test_a_failed_start_fails_every_request_with_its_error():
    def start():
        raise BadRequestError("no such model")

    worker = Worker("test", start, lambda: False)
    for future in (worker.submit("a", lambda: 1), worker.hand_over("a", lambda f: None)):
        with pytest.raises(BadRequestError, match="no such model"):
            future.result(5)
    worker.close()


def test_close_cancels_what_waits_and_ends_the_thread():
    worker = Worker("test", lambda: None, lambda: False)
    gate = threading.Event()
    worker.submit("a", gate.wait)
    time.sleep(0.05)
    waiting = worker.submit("a", lambda: 1)
    closer = threading.Thread(target=worker.close)
    closer.start()
    gate.set()
    closer.join(5)
    assert waiting.cancelled() and not closer.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit("a", lambda: 1)
