"""Whatever fails, wherever and in whatever mixture, each lane ends as if its requests had run one by one."""

import dataclasses
import random
import time
from concurrent.futures import CancelledError

import pytest

from tinker_jax.engine.worker import Detour, Worker
from tinker_jax.training.pending import Pending
from tinker_jax.types.errors import BadRequestError, RequestFailedError

LANES = "abc"
KINDS = ("gradient", "gradient", "step", "step", "save", "custom")
ERRORS = {"no room": MemoryError, "broken": ZeroDivisionError, "refused": BadRequestError}
FAULTS = [None] * 7 + [(error, where) for error in ERRORS for where in ("dispatch", "read")]


@dataclasses.dataclass(frozen=True)
class Values:
    """An adapter in training: gradients are the numbers of requests. `error` is what a program that reads them raises."""

    params: tuple = ()
    grads: tuple = ()
    error: Exception | None = None


@dataclasses.dataclass
class Request:
    """`fault` strikes at every attempt, or once if it is a lack of room; only gradients and steps have a read."""

    number: int
    lane: str
    kind: str
    fault: tuple[str, str] | None

    @property
    def overlaps(self):
        return self.kind in ("gradient", "step")

    def apply(self, values):
        """(values after it, result)."""
        if self.kind == "save":
            return values, values.params
        if self.kind == "step":
            if not values.grads:
                raise BadRequestError("no gradients")
            after = Values((*values.params, values.grads))
            return after, after.params
        after = Values(values.params, (*values.grads, self.number))
        return after, after.grads

    def strike(self, where):
        if self.fault is not None and self.fault[1] == where:
            error, _ = self.fault
            if error == "no room":
                self.fault = None
            raise ERRORS[error]("as told")


def one_by_one(requests):
    """Outcomes of the requests, and what the lanes hold after them."""
    outcomes, lanes = [], dict.fromkeys(LANES, Values())
    for request in requests:
        error, where = request.fault or ("", "")
        try:
            if where == "dispatch" and error != "no room":
                raise ERRORS[error]
            after, result = request.apply(lanes[request.lane])
            if where == "read" and request.overlaps and error == "broken":
                raise ZeroDivisionError
        except (BadRequestError, ZeroDivisionError) as failure:
            outcomes.append(type(failure))
            continue
        lanes[request.lane] = after
        outcomes.append(BadRequestError if where == "read" and request.overlaps and error == "refused" else result)
    return outcomes, lanes


class Engine:
    """A program that fails at its read leaves values behind which fail whatever reads them, at dispatch or at the read."""

    def __init__(self, rng):
        self.rng, self.lanes, self.ends = rng, dict.fromkeys(LANES, Values()), []
        recover = lambda error, again: None if isinstance(error, MemoryError) else error  # noqa: E731
        self.worker = Worker("model", lambda: None, lambda: False, recover=recover)

    def submit(self, request):
        run = self.custom if request.kind == "custom" else self.train if request.overlaps else self.now
        future = self.worker.submit(request.lane, lambda: run(request), overlaps=request.overlaps)
        future.add_done_callback(lambda f: f.cancelled() or self.ends.append((request.lane, request.number)))
        return future

    def now(self, request):
        request.strike("dispatch")
        assert self.lanes[request.lane].error is None
        self.lanes[request.lane], result = request.apply(self.lanes[request.lane])
        return result

    def custom(self, request):
        request.strike("dispatch")
        yield
        detour = Detour(lambda: time.sleep(self.rng.random() * 1e-3), lambda _: self.now(request), callers=True)
        return Pending(lambda: detour, lambda: None)

    def train(self, request):
        for _ in range(self.rng.randrange(3)):
            yield
        request.strike("dispatch")
        before = self.lanes[request.lane]
        if before.error is not None and self.rng.random() < 0.5:
            raise before.error
        after, result = request.apply(before)
        failing = request.fault is not None and request.fault[1] == "read" and request.fault[0] != "refused"
        error = ERRORS[request.fault[0]]("an input failed") if failing and before.error is None else before.error
        self.lanes[request.lane] = dataclasses.replace(after, error=error)

        def read():
            time.sleep(self.rng.random() * 1e-3)
            if before.error is not None:
                raise before.error
            request.strike("read")
            return result

        return Pending(read, lambda: self.lanes.update({request.lane: before}))


def outcome(future):
    try:
        return future.result(20)
    except BadRequestError:
        return BadRequestError
    except RequestFailedError as error:
        assert isinstance(error.__cause__, ZeroDivisionError), error
        return ZeroDivisionError
    except CancelledError:
        return CancelledError


@pytest.mark.parametrize("seed", range(40))
def test_every_mixture_of_failures_ends_as_if_requests_had_run_one_by_one(seed):
    rng = random.Random(seed)
    engine = Engine(rng)
    requests, futures = [], []
    for number in range(40):
        request = Request(number, rng.choice(LANES), rng.choice(KINDS), rng.choice(FAULTS))
        requests.append(dataclasses.replace(request))  # as it is before it strikes
        futures.append(engine.submit(request))
        if rng.random() < 0.1:
            rng.choice(futures).cancel()
        if rng.random() < 0.2:
            time.sleep(rng.random() * 2e-3)
    outcomes = [outcome(future) for future in futures]
    engine.worker.close()
    expected, lanes = one_by_one(r for r, future in zip(requests, futures, strict=True) if not future.cancelled())
    assert [end for end in outcomes if end is not CancelledError] == expected
    assert engine.lanes == lanes
    for lane in LANES:
        ends = [number for name, number in engine.ends if name == lane]
        assert ends == sorted(ends)
