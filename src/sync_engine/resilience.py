"""What surrounds a sick tier: when to try again, how often at most, when to stop asking, how long to wait.

Retry policy and budget are values, the circuit breaker a frozen state with pure transitions; ``Guarded`` puts
one breaker and a deadline around any tier, behind the same port. Only ``TierUnavailable`` counts as a
failure: a tier that answers "no" is well, and one whose disk is full answers, reads above all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, stop_never

from sync_engine.errors import DiskFull, TierUnavailable
from sync_engine.forward import Forwarding
from sync_engine.ports import PATIENT, WRITES, Clock, Tier

__all__ = [
    "Breaker",
    "BreakerPolicy",
    "Circuit",
    "Guarded",
    "Retries",
    "RetryBudget",
    "RetryPolicy",
    "allow",
    "on_abandoned",
    "on_failure",
    "on_success",
    "retrying",
]

P = ParamSpec("P")
R = TypeVar("R")


# Trying again


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Waits of ``first_s``, times ``factor`` each, up to ``cap_s``; ``jitter`` is the share left to chance.

    ``attempts_max`` None never gives up: right where the alternative would be to drop acknowledged work.
    """

    first_s: float = 0.05
    factor: float = 2.0
    cap_s: float = 5.0
    jitter: float = 0.5
    attempts_max: int | None = None

    def wait_s(self, attempt: int, chance: float = 1.0) -> float:
        """Seconds to wait after the given failed attempt (1 is the first); ``chance`` from 0 to 1."""
        # The exponent is bounded because a float overflows after a night of retries.
        full_s = min(self.cap_s, self.first_s * self.factor ** min(attempt - 1, 64))
        return full_s * (1 - self.jitter * (1 - chance))


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """How many retries one tier is given: ``burst`` at once, and on average ``per_s`` a second and ``per_answer``.

    A lane in an outage, in which nothing answers, stays well below ``per_s``; with healing beside it Redis comes near.
    What the bound is for is a tier that answers seldom: each answer lets a policy begin anew with its shortest wait.
    One that answers four calls of five earns a retry by each four: however many it is asked, it is not held up.
    """

    per_s: float = 2.0
    burst: int = 10
    per_answer: float = 0.25


class Retries:
    """The retries of one tier, whoever asks for them: a token bucket that keeps nobody out, but lets him wait.

    To give up is no choice where acknowledged work would be lost. A token is taken when the wait for it begins, so
    that those who wait are served in their order; what is earned meanwhile is for whoever comes next.
    """

    def __init__(self, clock: Clock, budget: RetryBudget | None = None) -> None:
        self.budget = RetryBudget() if budget is None else budget
        self.count = 0
        """Retries until now."""
        self.answers = 0
        """Calls until now that the tier has answered, of those that would have been tried again."""
        self._clock = clock
        self._tokens = float(self.budget.burst)
        self._filled_at_s = clock.monotonic()

    async def wait(self, seconds: float) -> None:
        """Sleep for so long, and until the budget has a retry left. To be called before each retry."""
        self.count += 1
        # Added, not the longer of both: the share that is left to chance must stay in it.
        await self._clock.sleep(seconds + self._take())

    def answered(self) -> None:
        """The tier has answered, if only with a refusal: that earns a part of a retry."""
        self.answers += 1
        self._fill(self.budget.per_answer)

    def _take(self) -> float:
        self._fill(0)
        self._tokens -= 1
        return max(0.0, -self._tokens / self.budget.per_s)

    def _fill(self, earned: float) -> None:
        now_s = self._clock.monotonic()
        gained = (now_s - self._filled_at_s) * self.budget.per_s
        self._tokens = min(self._tokens + gained + earned, self.budget.burst)
        self._filled_at_s = now_s

    def __repr__(self) -> str:
        budget = self.budget
        return f"<Retries {self.count} | {budget.burst}, then {budget.per_s:g}/s and {budget.per_answer:g}/answer>"


def retrying(
    policy: RetryPolicy,
    sleep: Callable[[float], Awaitable[None]],
    on: Callable[[BaseException], bool],
    rng: random.Random | None = None,
) -> AsyncRetrying:
    """An ``async for attempt in ...: with attempt: ...`` loop that retries what ``on`` says yes to.

    ``sleep`` waits for so many seconds: a clock's, or ``Retries.wait``, which keeps a budget too. Any exception that
    ``on`` says no to, and the last one when attempts run out, is raised as it is.
    """
    chance = random.random if rng is None else rng.random

    def wait(state: RetryCallState) -> float:
        return policy.wait_s(state.attempt_number, chance())

    return AsyncRetrying(
        sleep=sleep,
        wait=wait,
        retry=retry_if_exception(on),
        stop=stop_never if policy.attempts_max is None else stop_after_attempt(policy.attempts_max),
        reraise=True,
    )


# Not asking at all

Phase = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """Opens after ``failures_max`` failures within ``window_s`` without a success between; probes after ``rest_s``."""

    failures_max: int = 5
    window_s: float = 10.0
    rest_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Circuit:
    """State of a breaker. Times are monotonic seconds.

    ``turn`` grows with every change of phase. A call carries the turn it began in, so that its late
    outcome cannot move a circuit that has changed since. Half-open is one turn and one call: the probe.
    """

    phase: Phase = "closed"
    turn: int = 0
    failed_at_s: tuple[float, ...] = ()
    opened_at_s: float = 0.0


def allow(circuit: Circuit, policy: BreakerPolicy, now_s: float) -> tuple[Circuit, bool]:
    """Whether a call may begin now; after the rest the first one may, as the probe."""
    if circuit.phase == "closed":
        return circuit, True
    if circuit.phase == "open" and now_s - circuit.opened_at_s >= policy.rest_s:
        return replace(circuit, phase="half-open", turn=circuit.turn + 1), True
    return circuit, False


def on_success(circuit: Circuit, turn: int) -> Circuit:
    """A call of that turn was answered: the count starts anew, a probe closes the circuit."""
    if turn != circuit.turn or (circuit.phase == "closed" and not circuit.failed_at_s):
        return circuit
    return Circuit(turn=circuit.turn + (circuit.phase != "closed"))


def on_failure(circuit: Circuit, policy: BreakerPolicy, turn: int, now_s: float) -> Circuit:
    """A call of that turn could not be made: one more in the window; a probe opens the circuit again."""
    if turn != circuit.turn or circuit.phase == "open":
        return circuit
    recent = (*(at for at in circuit.failed_at_s if now_s - at < policy.window_s), now_s)[-policy.failures_max :]
    if circuit.phase == "half-open" or len(recent) >= policy.failures_max:
        return Circuit("open", circuit.turn + 1, recent, now_s)
    return replace(circuit, failed_at_s=recent)


def on_abandoned(circuit: Circuit, turn: int) -> Circuit:
    """A call of that turn ended without telling anything: a probe gives its place to the next call."""
    if turn != circuit.turn or circuit.phase != "half-open":
        return circuit
    return replace(circuit, phase="open", turn=circuit.turn + 1)


class Breaker:
    """A circuit, its policy and its clock."""

    def __init__(self, name: str, clock: Clock, policy: BreakerPolicy | None = None) -> None:
        self.name = name
        self.policy = BreakerPolicy() if policy is None else policy
        self.circuit = Circuit()
        self._clock = clock
        self._reason = ""

    @property
    def phase(self) -> Phase:
        """``closed`` (all calls), ``open`` (none), ``half-open`` (one is on its way to find out)."""
        return self.circuit.phase

    def enter(self) -> int:
        """The turn of a call that may begin; raises ``TierUnavailable`` while none may."""
        circuit = self.circuit
        if circuit.phase == "closed":
            return circuit.turn
        now_s = self._clock.monotonic()
        self.circuit, allowed = allow(circuit, self.policy, now_s)
        if allowed:
            return self.circuit.turn
        # Whoever is turned away hears why the circuit is open: the call that found out may have been somebody else's.
        last = f"; last: {self._reason}" if self._reason else ""
        if circuit.phase == "half-open":
            raise TierUnavailable(self.name, f"circuit open, a probe is on its way{last}")
        rest_s = self.policy.rest_s - (now_s - circuit.opened_at_s)
        raise TierUnavailable(self.name, f"circuit open for another {rest_s:.3g} s{last}")

    def succeeded(self, turn: int) -> None:
        """The call of that turn was answered."""
        self.circuit = on_success(self.circuit, turn)

    def failed(self, turn: int, reason: str = "") -> None:
        """The call of that turn could not be made, or was not answered in time; ``reason`` says which and why."""
        if turn == self.circuit.turn:
            self._reason = reason
        self.circuit = on_failure(self.circuit, self.policy, turn, self._clock.monotonic())

    def abandoned(self, turn: int) -> None:
        """The call of that turn was cancelled."""
        self.circuit = on_abandoned(self.circuit, turn)

    def __repr__(self) -> str:
        policy, now_s = self.policy, self._clock.monotonic()
        failures = sum(now_s - at < policy.window_s for at in self.circuit.failed_at_s)
        return f"<Breaker {self.name} {self.phase} | {failures}/{policy.failures_max} in {policy.window_s:g}s>"


# Around a tier

CLOSE_GRACE_S = 1.0
"""How long calls may still run once their tier is closed, which has waited for its own."""


class Guarded(Forwarding):
    """A tier behind a breaker and a deadline.

    While the circuit is open a call raises ``TierUnavailable`` at once. A read that is not answered
    within ``deadline_s`` (a write: ``write_deadline_s``, by default the same) raises it too and counts
    as a failure. The call itself runs on in a task of its own, past deadlines and cancelled callers:
    cutting I/O short would leave its connection in the middle of a reply.
    """

    def __init__(
        self,
        tier: Tier,
        breaker: Breaker,
        clock: Clock,
        deadline_s: float | None = None,
        *,
        write_deadline_s: float | None = None,
    ) -> None:
        super().__init__(tier)
        self.breaker = breaker
        self._clock = clock
        self._deadline_s = deadline_s
        self._write_deadline_s = deadline_s if write_deadline_s is None else write_deadline_s
        # Calls on their way, with the turn their outcome counts for; None once a deadline has spoken for it.
        self._running: dict[asyncio.Task[Any], int | None] = {}

    def bound(self, deadline_s: float | None, write_deadline_s: float | None) -> None:
        """Set the deadlines of the calls that begin from now on."""
        self._deadline_s, self._write_deadline_s = deadline_s, write_deadline_s

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        turn = self.breaker.enter()
        call = asyncio.create_task(verb(*args, **kwargs))
        self._running[call] = turn
        call.add_done_callback(self._settle)
        deadline_s = self._write_deadline_s if verb.__name__ in WRITES else self._deadline_s
        if verb.__name__ in PATIENT:
            deadline_s = None
        try:
            if not await self._ended(call, deadline_s):
                self._running[call] = None
                late = TierUnavailable(self.name, f"no answer within {deadline_s:g} s")
                self.breaker.failed(turn, late.reason)
                raise late
        except asyncio.CancelledError:
            self.breaker.abandoned(turn)
            raise
        if call.cancelled():
            raise TierUnavailable(self.name, "closed during the call")
        return call.result()

    async def _ended(self, call: asyncio.Task[Any], deadline_s: float | None) -> bool:
        """Wait for the call without owning it: whether it ended before the deadline."""
        if deadline_s is None:
            await asyncio.wait([call])
            return True
        timer = asyncio.ensure_future(self._clock.sleep(deadline_s))
        try:
            await asyncio.wait([call, timer], return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
        return call.done()

    def _settle(self, call: asyncio.Task[Any]) -> None:
        turn = self._running.pop(call)
        failure = None if call.cancelled() else call.exception()  # fetched even if nobody waits, or asyncio complains
        if turn is None:
            return
        if call.cancelled():
            self.breaker.abandoned(turn)
        elif isinstance(failure, TierUnavailable) and not isinstance(failure, DiskFull):
            self.breaker.failed(turn, failure.reason)
        else:
            self.breaker.succeeded(turn)

    async def close(self) -> None:
        """Close the tier, which waits for its pending calls, and let go of the tasks around them."""
        await self.tier.close()
        if self._running:
            _, stuck = await asyncio.wait(list(self._running), timeout=CLOSE_GRACE_S)
            for call in stuck:
                call.cancel()

    def __repr__(self) -> str:
        return f"<Guarded {self.tier!r} by {self.breaker!r}>"
