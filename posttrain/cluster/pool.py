"""A pool of actors that survives the death of some: their calls are made again, and new actors take their place.

Ray itself would restart an actor a fixed number of times over its whole life, and would not say which call it died of.
Here there is no such limit as long as work gets done: a death counts against the call that the process was working on,
and only a call that ends one process after another is given up.
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

from posttrain.cluster.failures import raise_cause, why_it_died
from posttrain.errors import StepError

DEATHS_OF_A_CALL = 5
"""Processes that a call may end before it is given up, where it cannot be divided."""

_DEATHS_WITHOUT_RESULT = 10
"""Processes, and three more per actor, that may die one after another while no call is completed."""

_DEATHS = (RayActorError, OutOfMemoryError, ObjectLostError)
"""What Ray raises of a call whose process has ended, or whose result went with a node."""

_NODE_CHECK_S = 10.0
"""Seconds between two checks of the nodes: the loss of one is not always the loss of an actor."""


@dataclass(frozen=True)
class Died:
    """The outcome of a call that ended one process after another."""

    why: str
    """What Ray knows of it, as a clause."""


@dataclass
class _Call:
    index: int
    make: Callable[[Any], Any]
    deaths: int = 0
    alone: bool = False
    """Whether a process died that had been given it: from then on it shares its actor with no other call, so that a
    further death is surely its own."""


@dataclass(eq=False)
class _Slot:
    """A place in the pool with the actor that fills it now."""

    actor: Any
    started: Any
    """Reference to the id of its node, there when the actor is ready."""
    node: str | None = None


class Pool:
    """`count` actors, which `make` makes (given whether they may reserve CPUs); they start at the first call.

    An actor has a method `ready`, which gives the id of its node. `tell` is called with a sentence for what dies.
    """

    def __init__(self, make: Callable[[bool], Any], count: int) -> None:
        self._make, self._count = make, count
        self._slots: list[_Slot] = []
        self._deaths_in_a_row = 0
        self._reserving = True
        self._nodes_lost_before, self._checked = _lost_nodes(), time.monotonic()
        self.tell: Callable[[str], None] = lambda text: None

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
            self.tell("a node was lost; going on with those that are left")
            self.release()

    def each(
        self, calls: Iterable[Callable[[Any], Any]], *, max_deaths: int | None = None, per_actor: int = 2
    ) -> Iterator[Any]:
        """Results of the calls (each given a free actor), in their order; an actor has at most `per_actor` at a time.

        The look-ahead is bounded: results that wait for an earlier one never pile up by the number of samples. With
        `max_deaths`, a call that ends so many processes gives `Died`; else StepError is raised for one that ends
        DEATHS_OF_A_CALL. What a call itself raises is raised.
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
                    results, lost = self._collect(reference, in_flight, max_deaths)
                    found |= results
                    again.extend(lost)
            if self._reserving and time.monotonic() - self._checked >= _NODE_CHECK_S:
                self.make_room()
                if not self._slots:
                    self.start()
                    again.extend(call for call, _ in in_flight.values())
                    in_flight.clear()

    def _collect(
        self, reference: Any, in_flight: dict[Any, tuple[_Call, _Slot]], max_deaths: int | None
    ) -> tuple[dict[int, Any], list[_Call]]:
        """The result of a call by its index; where its actor died, all the actor's results, and calls to make again."""
        call, slot = in_flight[reference]
        try:
            result = ray.get(reference)
        except _DEATHS as error:
            results, lost = self._take_back(slot, in_flight, error)
            again = []
            for other in lost:
                if other.deaths < (max_deaths or DEATHS_OF_A_CALL):
                    again.append(other)
                elif max_deaths:
                    results[other.index] = Died(why_it_died(error))
                else:
                    raise StepError(
                        f"the same piece of work ended {other.deaths} worker processes ({why_it_died(error)}); "
                        "give workers more memory, then start the same command again to go on"
                    ) from None
            return results, again
        except Exception as error:
            raise_cause(error)
        del in_flight[reference]
        self._deaths_in_a_row = 0
        return {call.index: result}, []

    def ask(self, call: Callable[[Any], Any]) -> list[Any]:
        """The answers of the actors that are ready, in their order; there is none of those that die meanwhile."""
        answers = []
        for reference in [call(actor) for actor in self.ready()]:
            with contextlib.suppress(*_DEATHS):
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
        """Those of the references that are there; none where it is time to check the nodes."""
        done, _ = ray.wait(references, num_returns=1, timeout=_NODE_CHECK_S if self._reserving else None)
        starting = {slot.started: slot for slot in self._slots if slot.node is None}
        for reference in done:
            if (slot := starting.get(reference)) is None:
                continue
            try:
                slot.node = ray.get(reference)
            except _DEATHS as error:
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    raise_cause(error)
                self._replace(slot, error)
            except Exception as error:
                raise_cause(error)
        return done

    def _take_back(
        self, slot: _Slot, in_flight: dict[Any, tuple[_Call, _Slot]], error: Exception
    ) -> tuple[dict[int, Any], list[_Call]]:
        """Takes a dead actor's calls out of `in_flight`: the results that it still gave, and the calls without one."""
        mine = [reference for reference, (_, owner) in in_flight.items() if owner is slot]
        # the calls behind the one that it died of fail within moments
        ray.wait(mine, num_returns=len(mine), timeout=_NODE_CHECK_S)
        results: dict[int, Any] = {}
        lost: list[_Call] = []
        for reference in mine:
            call, _ = in_flight.pop(reference)
            try:
                results[call.index] = ray.get(reference, timeout=0)
            except (*_DEATHS, GetTimeoutError):
                lost.append(call)
            except Exception as raised:
                raise_cause(raised)
        # calls are carried out in their order: it died at the first without a result
        if lost and slot.node not in _lost_nodes():
            lost[0].deaths += 1
            for call in lost:
                call.alone = True
        self._replace(slot, error)
        return results, lost

    def _replace(self, slot: _Slot, error: Exception) -> None:
        if slot not in self._slots:
            return
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > _DEATHS_WITHOUT_RESULT + 3 * self._count:
            raise StepError(
                f"{self._deaths_in_a_row} worker processes died one after another, and none had finished anything "
                f"({why_it_died(error)}); mend that, then start the same command again to go on"
            )
        self.tell(f"a worker process was lost ({why_it_died(error)}); another takes its place")
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
