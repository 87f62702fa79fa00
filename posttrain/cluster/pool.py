"""A pool of actors that survives the loss of some: new actors take their place, and their calls are made again.

Ray itself restarts an actor a fixed number of times over its whole life, whichever calls crash it. Here a crash counts
against the call that the process was working on: only a call that crashes one process after another is given up, and
there is no limit as long as work gets done.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError

from posttrain.cluster.failures import loss_reason, raise_cause
from posttrain.errors import StepError

CRASHES_OF_A_CALL = 5
"""Processes that a call may crash before StepError is raised."""

_CRASHES_WITHOUT_RESULT = 10
"""Processes, and three more per actor, that may be lost one after another while no call is completed."""

_ACTOR_LOST = (RayActorError, OutOfMemoryError, ObjectLostError)
"""What Ray raises for a call whose process has ended, or whose result was lost with a node."""

_NODE_CHECK_S = 10.0
"""Seconds between two checks of the nodes: the loss of one is not always the loss of an actor."""


@dataclass(frozen=True)
class Crashed:
    """The outcome of a call that crashed one process after another."""

    reason: str
    """As far as Ray knows it, as a clause."""


@dataclass
class _Call:
    index: int
    make: Callable[[Any], Any]
    crashes: int = 0
    alone: bool = False
    """Whether a process that had been given it was lost: from then on it shares its actor with no other call, so that a
    further crash is surely its own."""


@dataclass(eq=False)
class _Slot:
    """A place in the pool, with its present actor."""

    actor: Any
    started: Any
    """Reference to the id of its node, which resolves when the actor is ready."""
    node: str | None = None


class Pool:
    """`count` actors, which `make` makes (given whether they may reserve CPUs); they start at the first call.

    An actor has a method `ready`, which gives the id of its node. `say` is called with a sentence for every loss.
    """

    def __init__(self, make: Callable[[bool], Any], count: int) -> None:
        self._make, self._count = make, count
        self._slots: list[_Slot] = []
        self._crashes_in_a_row = 0
        self._reserving = True
        self._nodes_lost_before, self._checked = _lost_nodes(), time.monotonic()
        self.say: Callable[[str], None] = lambda text: None

    def start(self) -> None:
        """Start the actors without waiting for them."""
        if not self._slots:
            self._slots = [self._new() for _ in range(self._count)]

    def release(self) -> None:
        """End the actors. The next call starts new ones."""
        for slot in self._slots:
            _end(slot.actor)
        self._slots = []

    def ready(self) -> list[Any]:
        """The actors that are ready; waits for the first."""
        self.start()
        while not (found := [slot.actor for slot in self._slots if slot.node is not None]):
            self._await([slot.started for slot in self._slots])
        return found

    def make_room(self) -> None:
        """Where a node was lost: end the actors; those that follow reserve no CPUs.

        The blocks that the node held have to be made again, by tasks that would wait for ever for CPUs that idle
        actors reserve.
        """
        self._checked = time.monotonic()
        if self._reserving and _lost_nodes() - self._nodes_lost_before:
            self._reserving = False
            self.say("a node was lost; going on with those that are left")
            self.release()

    def each(
        self, calls: Iterable[Callable[[Any], Any]], *, max_crashes: int | None = None, per_actor: int = 2
    ) -> Iterator[Any]:
        """Results of the calls (each given a free actor), in their order; an actor has at most `per_actor` at a time.

        The look-ahead is bounded: results that wait for an earlier one never pile up by the number of samples. With
        `max_crashes`, a call that crashes so many processes gives `Crashed`; else StepError is raised for one that
        crashes CRASHES_OF_A_CALL. What a call itself raises is raised.
        """
        self.start()
        following = iter(enumerate(calls))
        again: deque[_Call] = deque()
        in_flight: dict[Any, tuple[_Call, _Slot]] = {}
        found: dict[int, Any] = {}
        next_out, exhausted = 0, False
        while True:
            while (slot := self._free(in_flight, 1 if again else per_actor)) is not None:
                call = again.popleft() if again else None
                if call is None and not exhausted and len(found) < 4 * self._count:
                    item = next(following, None)
                    exhausted = item is None
                    call = None if item is None else _Call(*item)
                if call is None:
                    break
                in_flight[call.make(slot.actor)] = (call, slot)
            while next_out in found:
                yield found.pop(next_out)
                next_out += 1
            if not in_flight and not again:
                if exhausted:
                    return
                if self._free(in_flight, per_actor) is not None:
                    continue
            for reference in self._await([*in_flight, *(slot.started for slot in self._slots if slot.node is None)]):
                if reference in in_flight:
                    results, lost = self._collect(reference, in_flight, max_crashes)
                    found |= results
                    again.extend(lost)
            if self._reserving and time.monotonic() - self._checked >= _NODE_CHECK_S:
                self.make_room()
                if not self._slots:
                    self.start()
                    again.extend(call for call, _ in in_flight.values())
                    in_flight.clear()

    def _collect(
        self, reference: Any, in_flight: dict[Any, tuple[_Call, _Slot]], max_crashes: int | None
    ) -> tuple[dict[int, Any], list[_Call]]:
        """The result of a call by its index; where its actor was lost, all its results, and its calls to make again."""
        call, slot = in_flight[reference]
        try:
            result = ray.get(reference)
        except _ACTOR_LOST as error:
            results, lost = self._take_back(slot, in_flight, error)
            again = []
            for other in lost:
                if other.crashes < (max_crashes or CRASHES_OF_A_CALL):
                    again.append(other)
                elif max_crashes:
                    results[other.index] = Crashed(loss_reason(error))
                else:
                    raise StepError(
                        f"the same piece of work ended {other.crashes} worker processes ({loss_reason(error)}); "
                        "give workers more memory, then start the same command again to go on"
                    ) from None
            return results, again
        except Exception as error:
            raise_cause(error)
        del in_flight[reference]
        self._crashes_in_a_row = 0
        return {call.index: result}, []

    def ask(self, call: Callable[[Any], Any]) -> list[Any]:
        """The answers of the actors that are ready, in their order; none of those that are lost meanwhile."""
        answers = []
        for reference in [call(actor) for actor in self.ready()]:
            with contextlib.suppress(*_ACTOR_LOST):
                answers.append(ray.get(reference))
        return answers

    def _free(self, in_flight: dict[Any, tuple[_Call, _Slot]], per_actor: int) -> _Slot | None:
        """The slot with the fewest calls, where that is below `per_actor`."""
        load = {id(slot): 0 for slot in self._slots}
        for call, slot in in_flight.values():
            load[id(slot)] = load.get(id(slot), 0) + (per_actor if call.alone else 1)
        ready = [slot for slot in self._slots if slot.node is not None]
        least = min(ready, key=lambda slot: load[id(slot)], default=None)
        return least if least is not None and load[id(least)] < per_actor else None

    def _await(self, references: list[Any]) -> list[Any]:
        """Those of the references that are resolved; none where it is time to check the nodes."""
        done, _ = ray.wait(references, num_returns=1, timeout=_NODE_CHECK_S if self._reserving else None)
        starting = {slot.started: slot for slot in self._slots if slot.node is None}
        for reference in done:
            if (slot := starting.get(reference)) is None:
                continue
            try:
                slot.node = ray.get(reference)
            except _ACTOR_LOST as error:
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    raise_cause(error)
                self._replace(slot, error)
            except Exception as error:
                raise_cause(error)
        return done

    def _take_back(
        self, slot: _Slot, in_flight: dict[Any, tuple[_Call, _Slot]], error: Exception
    ) -> tuple[dict[int, Any], list[_Call]]:
        """Takes a lost actor's calls out of `in_flight`: the results that it still gave, and the calls without one."""
        mine = [reference for reference, (_, owner) in in_flight.items() if owner is slot]
        # the calls queued behind the one that crashed it fail within moments
        ray.wait(mine, num_returns=len(mine), timeout=_NODE_CHECK_S)
        results: dict[int, Any] = {}
        lost: list[_Call] = []
        for reference in mine:
            call, _ = in_flight.pop(reference)
            try:
                results[call.index] = ray.get(reference, timeout=0)
            except (*_ACTOR_LOST, GetTimeoutError):
                lost.append(call)
            except Exception as raised:
                raise_cause(raised)
        # calls are carried out in their order: the first without a result crashed it
        if lost and slot.node not in _lost_nodes():
            lost[0].crashes += 1
            for call in lost:
                call.alone = True
        self._replace(slot, error)
        return results, lost

    def _replace(self, slot: _Slot, error: Exception) -> None:
        if slot not in self._slots:
            return
        self._crashes_in_a_row += 1
        if self._crashes_in_a_row > _CRASHES_WITHOUT_RESULT + 3 * self._count:
            raise StepError(
                f"{self._crashes_in_a_row} worker processes died one after another, and none had finished anything "
                f"({loss_reason(error)}); mend that, then start the same command again to go on"
            )
        self.say(f"a worker process was lost ({loss_reason(error)}); another takes its place")
        _end(slot.actor)
        self._slots[self._slots.index(slot)] = self._new()

    def _new(self) -> _Slot:
        actor = self._make(self._reserving)
        return _Slot(actor, actor.ready.remote())


def _lost_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def _end(actor: Any) -> None:
    if isinstance(actor, ActorHandle):
        ray.kill(actor)
