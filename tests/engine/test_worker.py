"""The worker keeps order within a lane, isolates failures, and lets other lanes pass a lane that waits for its caller."""

import concurrent.futures
import threading
import time
import weakref

import pytest

from tinker_jax.engine.worker import MOST_UNREAD, Detour, Worker
from tinker_jax.training.pending import Pending
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
    cause = caught.value.__cause__
    assert caught.value.category == "server" and isinstance(cause, ZeroDivisionError)
    assert "lambda: 1 // 0" in cause.__notes__[0]  # where it was raised, as text


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

    custom = worker.submit("a", lambda: Detour(outside, lambda value: order.append("inside") or value, callers=True))
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
        worker.submit("a", lambda: Detour(outside, lambda v: v, callers=True)).result(5)
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

    custom = worker.submit("a", lambda: Detour(outside, lambda _: "inside", callers=True))
    later = worker.submit("a", lambda: 1)
    assert begun.wait(5)
    closer = threading.Thread(target=worker.close)
    closer.start()
    with pytest.raises(RequestFailedError, match="closed while the caller's own loss ran"):
        custom.result(5)
    while not later.cancelled():
        time.sleep(0.001)
    assert closer.is_alive()  # a thread that runs when the interpreter ends may take the process down
    gate.set()
    closer.join(5)
    assert "tinker_jax-custom-loss" not in {thread.name for thread in threading.enumerate()}


def test_callbacks_of_a_custom_loss_that_ends_while_the_worker_closes_may_use_the_worker():
    worker = Worker("test", lambda: None, lambda: False)
    begun, gate, ended = (threading.Event() for _ in range(3))
    stuck = []

    def outside():
        begun.set()
        gate.wait(5)

    def refused():
        with pytest.raises(RuntimeError, match="closed"):
            worker.submit("b", lambda: None)

    def submit_elsewhere(_):
        other = threading.Thread(target=refused)
        other.start()
        other.join(3)
        stuck.append(other.is_alive())
        ended.set()

    def hold_close_back(_):
        gate.set()
        ended.wait(5)

    worker.submit("a", lambda: Detour(outside, lambda _: None, callers=True)).add_done_callback(submit_elsewhere)
    worker.submit("a", lambda: 1).add_done_callback(hold_close_back)
    assert begun.wait(5)
    worker.close()
    assert stuck == [False]


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


def test_a_request_cancelled_before_a_failed_start_counts_as_done_for_those_who_wait_for_several():
    gate = threading.Event()

    def start():
        gate.wait(5)
        raise BadRequestError("no such model")

    worker = Worker("test", start, lambda: False)
    cancelled, failed = worker.submit("a", lambda: 1), worker.submit("a", lambda: 2)
    assert cancelled.cancel()
    gate.set()
    assert concurrent.futures.wait([cancelled, failed], timeout=5).not_done == set()
    worker.close()


def test_a_forked_process_is_told_that_the_thread_is_not_there(worker, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        with pytest.raises(RuntimeError, match="forked from the one that runs the engine"):
            worker.submit("a", lambda: 1)
        worker.close()  # at the child's exit; the parent's worker is none of its business
    assert worker.submit("a", lambda: 7).result(5) == 7


def test_a_stream_of_samples_that_never_pauses_does_not_hold_back_the_first_slice(monkeypatch):
    monkeypatch.setattr("tinker_jax.engine.worker._GATHER_SECONDS", 1.0)  # no pause of a loaded machine counts as one
    sliced = threading.Event()

    def background():
        sliced.set()
        return False

    worker = Worker("test", lambda: None, background)
    end = time.monotonic() + 3
    submitted = 0
    while not sliced.is_set() and time.monotonic() < end:
        worker.hand_over("s", lambda future: future.set_result(None))
        submitted += 1
        time.sleep(0.0005)
    assert sliced.is_set() and submitted > 1
    worker.close()


def test_a_custom_loss_that_would_begin_after_close_is_refused():
    worker = Worker("test", lambda: None, lambda: False)
    gate, ran = threading.Event(), []

    def forward():
        gate.wait(5)
        return Detour(lambda: ran.append(1), lambda _: None, callers=True)

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
    monkeypatch.setattr("tinker_jax.engine.worker._GATHER_MOST_SECONDS", 10.0)
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


class Device:
    """Training steps whose reads wait for `finish`, and what became of them."""

    def __init__(self, worker):
        self.worker, self.log, self.gates = worker, [], {}

    def submit(self, name, lane="a", errors=()):
        self.gates.setdefault(name, threading.Event())
        errors = list(errors)

        def read():
            assert self.gates[name].wait(5)
            self.log.append(f"read {name}")
            if errors and (error := errors.pop(0)) is not None:
                raise error
            return name

        def run():
            self.log.append(f"dispatch {name}")
            return Pending(read, lambda: self.log.append(f"undo {name}"))

        return self.worker.submit(lane, run, overlaps=True)

    def attempts(self, name):
        return self.log.count(f"dispatch {name}")

    def finish(self, *names):
        for name in names:
            self.gates[name].set()

    def until(self, *entries):
        end = time.monotonic() + 5
        while time.monotonic() < end and not set(entries) <= set(self.log):
            time.sleep(0.001)
        assert set(entries) <= set(self.log), self.log


@pytest.fixture
def device(worker):
    return Device(worker)


def test_a_training_step_is_dispatched_while_the_one_before_it_is_on_the_device(device):
    first, second = device.submit("1"), device.submit("2")
    device.until("dispatch 1", "dispatch 2")
    assert not first.done() and "read 1" not in device.log
    device.finish("1", "2")
    assert (first.result(5), second.result(5)) == ("1", "2")


def test_steps_end_in_the_order_of_their_submission_whatever_the_device_does(device):
    first, second = device.submit("1"), device.submit("2")
    ends = []
    for future in (first, second):
        future.add_done_callback(lambda f: ends.append(f.result()))
    device.finish("2")
    device.until("dispatch 2")
    assert not second.done()
    device.finish("1")
    second.result(5)
    assert ends == ["1", "2"]


def test_a_request_that_is_taken_from_the_queue_while_a_read_fails_is_not_lost(worker, device):
    taken, pop = threading.Event(), worker._pop

    def recording():
        request = pop()
        if request is not None and request.lane == "next":
            taken.set()
        return request

    class Wake(threading.Condition):
        """Lets the read fail between the worker's taking a request and its next look around."""

        def __exit__(self, *args):
            super().__exit__(*args)
            if threading.current_thread() is worker._thread and taken.is_set():
                taken.clear()
                device.finish("1")
                while not worker._unreadable:
                    time.sleep(0.001)

    worker._pop = recording
    failed = device.submit("1", errors=[ZeroDivisionError()])
    device.until("dispatch 1")
    worker._wake.__class__ = Wake
    worker.submit("b", lambda: None).result(5)
    assert worker.submit("next", lambda: 7).result(5) == 7
    with pytest.raises(RequestFailedError, match="ZeroDivisionError"):
        failed.result(5)


def test_a_step_that_fails_at_once_waits_for_those_before_it_which_may_be_to_blame(device):
    first = device.submit("1", errors=[ZeroDivisionError()])
    errors = [BadRequestError("no gradients")]

    def run():
        device.log.append("dispatch 2")
        if errors:
            raise errors.pop()
        return Pending(lambda: "2", lambda: None)

    second = device.worker.submit("a", run, overlaps=True)
    device.until("dispatch 2")
    device.finish("1")
    with pytest.raises(RequestFailedError, match="ZeroDivisionError"):
        first.result(5)
    assert second.result(5) == "2"
    assert device.log == ["dispatch 1", "dispatch 2", "read 1", "undo 1", "dispatch 2"]


@pytest.mark.parametrize("where", ["dispatch", "read", "refusal", "second attempt"])
def test_an_error_holds_nothing_of_the_step_that_raised_it(where):
    class Values:
        pass

    alive = []

    def run():
        values = Values()
        alive.append(weakref.ref(values))
        if where == "dispatch":
            raise ZeroDivisionError

        def read():
            if where == "refusal":
                raise BadRequestError(f"{values}")
            raise ZeroDivisionError(f"{values}")

        return Pending(read, lambda: values).then(str)

    attempts = [] if where == "second attempt" else [1]
    recover = lambda error, again: error if attempts else attempts.append(1)  # noqa: E731
    worker = Worker("test", lambda: None, lambda: False, recover=recover)
    error = worker.submit("a", run, overlaps=True).exception(5)
    worker.submit("a", lambda: None).result(5)
    worker.close()
    assert error is not None and len(alive) == 1 + (where == "second attempt")
    assert [ref() for ref in alive] == [None] * len(alive)


def test_close_waits_until_the_reader_has_let_go_of_what_it_read():
    class SlowToFree:
        def __del__(self):
            time.sleep(0.3)

    def step():
        held = SlowToFree()
        return Pending(lambda: held is not None, lambda: None)

    worker = Worker("closing", lambda: None, lambda: False)
    assert worker.submit("a", step, overlaps=True).result(10)
    worker.close()
    assert "closing reader" not in {thread.name for thread in threading.enumerate()}


def test_only_so_many_steps_are_unread(device):
    names = [str(i) for i in range(MOST_UNREAD + 2)]
    futures = [device.submit(name) for name in names]
    device.until(f"dispatch {MOST_UNREAD - 1}")
    device.worker.submit("b", lambda: None).result(5)  # the worker is idle, not slow
    assert device.attempts(str(MOST_UNREAD)) == 0
    device.finish("0")
    device.until(f"dispatch {MOST_UNREAD}")
    assert device.attempts(str(MOST_UNREAD + 1)) == 0
    device.finish(*names)
    assert [future.result(5) for future in futures] == names


def test_what_is_no_training_step_waits_until_its_lane_is_read_and_other_lanes_do_not(device):
    step = device.submit("1")
    save = device.worker.submit("a", lambda: device.log.append("save"))
    later = device.submit("2")
    device.until("dispatch 1")
    assert device.worker.submit("b", lambda: "free").result(5) == "free"
    assert device.log == ["dispatch 1"]
    device.finish("1", "2")
    save.result(5)
    assert step.done() and later.result(5) == "2"
    assert device.log.index("read 1") < device.log.index("save") < device.log.index("dispatch 2")


def test_requests_of_another_lane_wait_for_the_one_that_was_put_before_them(device):
    device.submit("1")
    device.worker.submit("a", lambda: device.log.append("snapshot"), before="sampler")
    sample = device.worker.submit("sampler", lambda: device.log.append("sample"))
    device.until("dispatch 1")
    device.worker.submit("b", lambda: None).result(5)
    assert not sample.done()
    device.finish("1")
    sample.result(5)
    assert device.log == ["dispatch 1", "read 1", "snapshot", "sample"]


def test_a_step_that_fails_on_the_device_is_undone_and_what_followed_in_its_lane_runs_again(device):
    failed = device.submit("1", errors=[ZeroDivisionError()])
    after = device.submit("2")
    other = device.submit("3", lane="b")
    device.until("dispatch 3")
    device.finish("1", "2", "3")
    with pytest.raises(RequestFailedError, match="ZeroDivisionError"):
        failed.result(5)
    assert (after.result(5), other.result(5)) == ("2", "3")
    assert [device.attempts(name) for name in "123"] == [1, 2, 1]
    assert device.log.count("undo 1") == 1 and not {"undo 2", "undo 3"} & set(device.log)
    assert device.log.count("read 2") == 1  # the first attempt built on what had failed: nobody looked at it


def test_an_error_of_ours_at_the_read_is_the_outcome_and_undoes_nothing(device):
    refused, after = device.submit("1", errors=[BadRequestError("not finite")]), device.submit("2")
    device.finish("1", "2")
    with pytest.raises(BadRequestError, match="not finite"):
        refused.result(5)
    assert after.result(5) == "2" and not [entry for entry in device.log if entry.startswith("undo")]


def test_a_step_that_can_be_recovered_runs_again_alone_before_what_followed_it():
    asked = []

    def recover(error, again):
        asked.append((type(error), again))
        return None

    worker = Worker("test", lambda: None, lambda: False, recover=recover)
    device = Device(worker)
    first, second = device.submit("1", errors=[MemoryError(), MemoryError()]), device.submit("2")
    device.until("dispatch 2")
    other = device.submit("3", lane="b")
    device.until("dispatch 3")
    device.finish("1", "2", "3")
    assert (first.result(5), second.result(5), other.result(5)) == ("1", "2", "3")
    assert asked == [(MemoryError, False), (MemoryError, True)]
    again = device.log[device.log.index("undo 1") :]
    assert again.index("read 3") < again.index("dispatch 1")  # at rest
    assert [entry for entry in again if "3" not in entry] == [
        *("undo 1", "dispatch 1", "read 1", "undo 1"),
        *("dispatch 1", "read 1", "dispatch 2", "read 2"),
    ]
    worker.close()


def test_a_request_that_fails_before_the_device_can_be_recovered_too():
    errors = [MemoryError(), MemoryError()]

    def run():
        if errors:
            raise errors.pop()
        return 7

    worker = Worker("test", lambda: None, lambda: False, recover=lambda error, again: None)
    assert worker.submit("a", run).result(5) == 7
    custom = worker.submit("a", lambda: Detour(lambda: errors.append(MemoryError()), lambda _: run()))
    assert custom.result(5) == 7 and not errors
    worker.close()


def test_close_reads_what_is_on_the_device_and_cancels_the_rest():
    worker = Worker("test-close", lambda: None, lambda: False)
    device = Device(worker)
    futures = [device.submit(str(i)) for i in range(MOST_UNREAD + 1)]
    device.until(f"dispatch {MOST_UNREAD - 1}")
    closer = threading.Thread(target=worker.close)
    closer.start()
    while not futures[-1].cancelled():
        time.sleep(0.001)
    assert closer.is_alive()
    device.finish(*map(str, range(MOST_UNREAD)))
    closer.join(5)
    assert [future.result(5) for future in futures[:-1]] == [str(i) for i in range(MOST_UNREAD)]
    worker._reader.join(5)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("test-close")]


def test_steps_that_would_have_to_run_again_when_the_worker_closes_end_with_an_error():
    worker = Worker("test", lambda: None, lambda: False, recover=lambda error, again: None)
    device = Device(worker)
    futures = [device.submit("1", errors=[MemoryError()]), device.submit("2")]
    device.until("dispatch 2")
    closer = threading.Thread(target=worker.close)
    closer.start()
    while not worker._closing:
        time.sleep(0.001)
    device.finish("1", "2")
    for future in futures:
        with pytest.raises(RequestFailedError, match="closed while the request was under way"):
            future.result(5)
    closer.join(5)
    assert not closer.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_exits_does_not_end_the_reader(device):
    def exit_thread(_):
        raise SystemExit

    device.submit("1").add_done_callback(exit_thread)
    later = device.submit("2")
    device.finish("1", "2")
    assert later.result(5) == "2"


def test_a_read_step_is_forgotten(worker):
    class Values:
        pass

    alive = []

    def run():
        values = Values()
        alive.append(weakref.ref(values))
        return Pending(lambda: 1, lambda: values)

    assert worker.submit("a", run, overlaps=True).result(5) == 1
    end = time.monotonic() + 5
    while alive[0]() is not None and time.monotonic() < end:
        time.sleep(0.001)
    assert alive[0]() is None


# ---- turns ----


class Clock:
    """Seconds that pass when work says so."""

    now = 0.0

    def __call__(self):
        return self.now


class Shared:
    """A worker whose requests and samples take turns of known length, and the order in which they had them."""

    def __init__(self):
        self.clock, self.turns, self.waiting, self.gate = Clock(), [], [], threading.Event()
        self.worker = Worker("turns", lambda: None, self.sample_slice, clock=self.clock)

    def train(self, lane, micro_batches, seconds=1.0, at=None, **options):
        """A request that pauses as long as others wait; `at` of its micro-batches does something first."""

        def run():
            for number in range(micro_batches):
                if at and number in at:
                    at[number]()
                self.turns.append(lane)
                self.clock.now += seconds
                if self.worker.others_wait():
                    yield
            return Pending(lambda: f"{lane} done", lambda: None)

        return self.worker.submit(lane, run, overlaps=True, **options)

    def sample(self, slices, seconds=0.1):
        return self.worker.hand_over("sampler", lambda future: self.waiting.append([future, slices, seconds]))

    def sample_slice(self):
        for entry in list(self.waiting):
            self.turns.append("sample")
            self.clock.now += entry[2]
            entry[1] -= 1
            if not entry[1]:
                self.waiting.remove(entry)
                entry[0].set_result(len(self.turns))
        return bool(self.waiting)


@pytest.fixture
def shared():
    shared = Shared()
    yield shared
    shared.worker.close()


def test_a_sample_beside_a_long_training_call_ends_within_a_turn_and_costs_its_own_time(shared):
    futures = []
    training = shared.train("a", 60, at={20: lambda: futures.append(shared.sample(5))})
    assert training.result(5) == "a done"
    assert futures[0].result(5) == 26  # five slices after the micro-batch during which it came
    assert shared.turns == ["a"] * 21 + ["sample"] * 5 + ["a"] * 39


@pytest.mark.parametrize("slice_seconds", [0.1, 0.5, 1.0, 4.0])
def test_sampling_and_training_have_the_device_for_equal_times(shared, slice_seconds):
    futures = []
    shared.train("a", 80, at={0: lambda: futures.append(shared.sample(10**9, slice_seconds))}).result(5)
    beside = shared.turns[: len(shared.turns) - 1 - shared.turns[::-1].index("a")]
    sampled, trained = slice_seconds * beside.count("sample"), beside.count("a")
    assert abs(sampled - trained) <= 1 + slice_seconds
    futures[0].set_exception(KeyError("enough")), shared.waiting.clear()


def test_a_client_that_asks_again_at_once_has_its_share(shared, monkeypatch):
    """Between two of its requests the background has nothing to do; a turn of training is ten times as long as a sample."""
    monkeypatch.setattr("tinker_jax.engine.worker._GATHER_SECONDS", 0.02)
    stop, threads = threading.Event(), []

    def ask_again_and_again():
        while not stop.is_set():
            shared.sample(1).result(5)

    start = lambda: threads.append(threading.Thread(target=ask_again_and_again)) or threads[0].start()  # noqa: E731
    pause = lambda: time.sleep(0.02)  # noqa: E731
    shared.train("a", 6, at={**dict.fromkeys(range(1, 5), pause), 0: start, 5: stop.set}).result(20)
    threads[0].join()
    beside = shared.turns[1 : len(shared.turns) - shared.turns[::-1].index("a")]
    assert beside.count("sample") >= 5 * beside.count("a")


def test_what_one_side_does_alone_does_not_count_later(shared):
    futures = []
    shared.train("a", 500, at={400: lambda: futures.append(shared.sample(40, 1.0))}).result(5)
    assert futures[0].result(5)
    beside = shared.turns[401:480]
    assert 38 <= beside.count("a") <= 41  # training had 400 seconds before, and that is no debt


def test_two_clients_in_training_alternate_and_end_in_their_own_time(shared):
    later = []
    first = shared.train("a", 6, at={1: lambda: later.append(shared.train("b", 2))})
    assert (first.result(5), later[0].result(5)) == ("a done", "b done")
    assert shared.turns == ["a", "a", "a", "b", "a", "b", "a", "a"]


def test_a_request_of_another_lane_runs_in_the_next_pause_and_one_of_its_own_waits(shared):
    order = []

    def submit():
        shared.worker.submit("a", lambda: order.append(("own", len(shared.turns))))
        shared.worker.submit("b", lambda: order.append(("other", len(shared.turns))))

    shared.train("a", 10, at={3: submit}).result(5)
    shared.worker.submit("a", lambda: None).result(5)
    assert order == [("other", 4), ("own", 10)]


def test_what_waits_in_its_own_lane_does_not_make_a_request_pause(shared):
    pauses = []
    queue = lambda: [shared.train("a", 1), shared.worker.submit("a", lambda: None)]  # noqa: E731
    shared.train("a", 3, at={0: queue, 2: lambda: pauses.append(shared.worker.others_wait())}).result(5)
    assert pauses == [False]


def test_a_generator_that_raises_fails_its_request_alone(worker):
    def run():
        yield
        raise BadRequestError("no")

    failed = worker.submit("a", run)
    with pytest.raises(BadRequestError, match="no"):
        failed.result(5)
    assert worker.submit("a", lambda: 7).result(5) == 7


def test_a_request_under_way_is_given_up_when_the_worker_closes():
    worker, begun, ended = Worker("test", lambda: None, lambda: False), threading.Event(), []

    def run():
        try:
            while True:
                begun.set()
                yield
        finally:
            ended.append(threading.current_thread().name)

    future = worker.submit("a", run)
    assert begun.wait(5)
    worker.close()
    with pytest.raises(RequestFailedError, match="closed while the request was under way"):
        future.result(5)
    assert ended == ["test"]


def test_a_request_under_way_begins_again_when_a_step_before_it_fails(device):
    begun, go_on = threading.Event(), threading.Event()

    def run():
        device.log.append("begin 2")
        begun.set()
        while not go_on.is_set():
            yield
        return Pending(lambda: "2", lambda: device.log.append("undo 2"))

    first = device.submit("1", errors=[ZeroDivisionError()])
    second = device.worker.submit("a", run, overlaps=True)
    assert begun.wait(5)
    device.finish("1")
    with pytest.raises(RequestFailedError, match="ZeroDivisionError"):
        first.result(5)
    go_on.set()
    assert second.result(5) == "2"
    assert device.log == ["dispatch 1", "begin 2", "read 1", "undo 1", "begin 2"]


# ---- detours after a read, and to files ----


def test_nobody_but_its_lane_waits_for_the_forward_of_a_custom_loss(worker):
    gate, order = threading.Event(), []

    def forward():
        yield
        return Pending(lambda: gate.wait(5), lambda: None).then(lambda value: Detour(lambda: "loss", backward, callers=True))

    def backward(loss):
        yield
        order.append("backward")
        return Pending(lambda: loss, lambda: None)

    custom = worker.submit("a", forward)
    step = worker.submit("a", lambda: order.append("step") or Pending(lambda: "step", lambda: None), overlaps=True)
    assert worker.submit("b", lambda: 7).result(5) == 7
    assert not custom.done() and not order
    gate.set()
    assert (custom.result(5), step.result(5)) == ("loss", "step")
    assert order == ["backward", "step"]


def test_a_detour_to_files_lets_other_lanes_pass_and_its_result_is_the_requests(worker):
    gate = threading.Event()
    save = worker.submit("a", lambda: Detour(lambda: gate.wait(5) and "path"))
    later = worker.submit("a", lambda: "later")
    assert worker.submit("b", lambda: 7).result(5) == 7
    assert not save.done() and not later.done()
    gate.set()
    assert (save.result(5), later.result(5)) == ("path", "later")


def test_an_unexpected_error_of_a_detour_to_files_arrives_typed(worker):
    with pytest.raises(RequestFailedError, match="ZeroDivisionError"):
        worker.submit("a", lambda: Detour(lambda: 1 // 0)).result(5)
    assert worker.submit("a", lambda: 7).result(5) == 7


def test_close_waits_for_a_detour_to_files():
    worker, begun, gate = Worker("test", lambda: None, lambda: False), threading.Event(), threading.Event()
    save = worker.submit("a", lambda: Detour(lambda: begun.set() or (gate.wait(5) and "path")))
    assert begun.wait(5)
    closer = threading.Thread(target=worker.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive() and not save.done()
    gate.set()
    assert save.result(5) == "path"
    closer.join(5)
    assert not closer.is_alive()


def test_the_queue_is_not_walked_for_every_request(worker):
    gate = threading.Event()
    worker.submit("a", gate.wait)
    seen, real = [], worker._may_start
    worker._may_start = lambda request: seen.append(request) or real(request)
    futures = [worker.submit("a", lambda: None) for _ in range(1000)]
    gate.set()
    for future in futures:
        future.result(5)
    assert len(seen) < 3000
