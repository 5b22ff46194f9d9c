"""The worker keeps order within a lane, isolates failures, and lets other lanes pass a lane that waits for its caller."""

import concurrent.futures
import threading
import time
import weakref

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


def test_a_cancellation_that_races_with_an_error_does_not_end_the_thread(worker):
    def cancelled_under_way(future):
        assert future.cancel()
        raise BadRequestError("too late")

    doomed = worker.hand_over("a", cancelled_under_way)
    assert worker.submit("a", lambda: 7).result(5) == 7
    assert doomed.cancelled()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_exits_does_not_end_the_thread(worker):
    gate = threading.Event()

    def exit_thread(_):
        raise SystemExit

    first = worker.submit("a", gate.wait)
    first.add_done_callback(exit_thread)
    gate.set()
    assert worker.submit("a", lambda: 7).result(5) == 7


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_background_work_that_raises_is_logged_and_does_not_end_the_thread(caplog):
    raised = threading.Event()

    def background():
        raised.set()
        raise ZeroDivisionError

    worker = Worker("test", lambda: None, background)
    worker.hand_over("s", lambda future: None)
    assert raised.wait(5)
    assert worker.submit("a", lambda: 7).result(5) == 7
    assert "background work failed" in caplog.text
    worker.close()


def test_a_custom_loss_under_way_when_the_worker_closes_does_not_leave_its_caller_waiting():
    worker = Worker("test", lambda: None, lambda: False)
    begun, gate = threading.Event(), threading.Event()

    def outside():
        begun.set()
        gate.wait(5)

    custom = worker.submit("a", lambda: Detour(outside, lambda _: "inside"))
    later = worker.submit("a", lambda: 1)
    assert begun.wait(5)
    worker.close()
    with pytest.raises(RequestFailedError, match="closed while the caller's own loss ran"):
        custom.result(5)
    assert later.cancelled()
    gate.set()


def test_close_hands_over_to_the_background_what_it_has_not_finished():
    ends = []
    worker = Worker("test", lambda: None, lambda: False, stop=lambda: ends.append(threading.current_thread().name))
    worker.submit("a", lambda: 1).result(5)
    worker.close()
    assert ends == ["test"]


def test_what_close_cancels_counts_as_done_for_those_who_wait_for_several():
    worker = Worker("test", lambda: None, lambda: False)
    gate = threading.Event()
    worker.submit("a", gate.wait)
    waiting = worker.submit("a", lambda: 1)
    handed = worker.hand_over("b", lambda future: None)
    closer = threading.Thread(target=worker.close)
    closer.start()
    gate.set()
    closer.join(5)
    assert concurrent.futures.wait([waiting, handed], timeout=1).not_done == set()


def test_a_failed_start_ends_the_thread_and_lets_go_of_what_it_had_loaded():
    class Weights:
        pass

    loaded = []

    def start():
        weights = Weights()
        loaded.append(weakref.ref(weights))
        raise BadRequestError("out of memory")

    worker = Worker("test-failed-start", start, lambda: False)
    with pytest.raises(BadRequestError):
        worker.submit("a", lambda: 1).result(5)
    worker.close()
    assert loaded[0]() is None
    assert not [t for t in threading.enumerate() if t.name == "test-failed-start"]
    with pytest.raises(BadRequestError, match="out of memory"):
        worker.submit("a", lambda: 1).result(5)


def test_a_forked_process_is_told_that_the_thread_is_not_there(worker, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        with pytest.raises(RuntimeError, match="forked from the one that runs the engine"):
            worker.submit("a", lambda: 1)
        worker.close()  # at the child's exit; the parent's worker is none of its business
    assert worker.submit("a", lambda: 7).result(5) == 7


def test_a_custom_loss_that_would_begin_after_close_is_refused():
    worker = Worker("test", lambda: None, lambda: False)
    gate, ran = threading.Event(), []

    def forward():
        gate.wait(5)
        return Detour(lambda: ran.append(1), lambda _: None)

    custom = worker.submit("a", forward)
    while not custom.running():
        time.sleep(0.01)
    closer = threading.Thread(target=worker.close)
    closer.start()
    while not worker._closing:
        time.sleep(0.01)
    gate.set()
    closer.join(5)
    with pytest.raises(RequestFailedError, match="closed while"):
        custom.result(5)
    assert not ran


def test_a_burst_of_handed_over_requests_is_gathered_before_the_first_slice(monkeypatch):
    monkeypatch.setattr("tinker_jax.engine.worker._GATHER_SECONDS", 1.0)
    sizes, waiting = [], []

    def background():
        sizes.append(len(waiting))
        for future in waiting:
            future.set_result(None)
        waiting.clear()
        return False

    worker = Worker("test", lambda: None, background)
    for future in [worker.hand_over("s", waiting.append) for _ in range(200)]:
        future.result(5)
    assert sizes == [200]
    worker.close()
