"""Keeps ranks that share a model in step: decisions of one reach the others, and none waits forever.

Every rank plans the same iterations from the same requests and the same results, so iterations need no messages. What
is not a function of those is agreed on through the store of `torch.distributed`: requests when they come (seeds, and
that they are the same), sizes that follow from free memory (the least of all ranks), and choices that follow from
measured times (rank 0's).

A thread of each rank writes down where it is, a few times a second, and reads where the others are. If a rank ends,
raises, stays away from an iteration that others are in, or plans another one, every rank ends with a named error. A
rank that is caught in a collective meanwhile cannot be freed: its process says why, and exits.
"""

import atexit
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sparsespec_compile.errors import PoolTooSmallError, RanksDifferError, RanksEndedError, SparseSpecError
from sparsespec_compile.passes.ranks import Ranks

DIGEST_EVERY = 64
"""Iterations between two of which ranks compare what they planned."""

_LOOKS = 8
"""Checks of the other ranks within `rank_timeout`; there is at least one every half second."""

_KEPT = 256
"""Values in a block. Ranks forget the block before the last once all have read it."""

_KEPT_DIGESTS = 256
"""Digests of plans that the store keeps. Collectives of the iterations keep ranks closer together than that."""

_EXIT_CODE = 70

_numbers: dict[str, int] = {}
"""How many agreements this process has begun in each group; the same on all ranks."""


class Agreement:
    """One rank's side of the agreement. Every rank creates one for each engine, in the same order.

    Args:
        ranks: those that share the model.
        timeout: seconds that a rank may be away.
        store: what they write to and read from; None = that of the default process group.
        end: ends the process of a rank that is caught in a collective.

    Attributes:
        failure: why the ranks are not together any longer; None = they are.
    """

    def __init__(
        self,
        ranks: Ranks,
        timeout: float,
        store: dist.Store | None = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.ranks = ranks
        self.failure: SparseSpecError | None = None
        number = _numbers[ranks.group] = _numbers.get(ranks.group, -1) + 1
        everyone = dist.distributed_c10d._get_default_store() if store is None else store
        self._store = dist.PrefixStore(f"sparsespec/{ranks.group}/{number}", everyone)
        self._timeout = timeout
        self._end = end
        self._shared = 0
        self._written: dict[int, list[str]] = {}  # by block of `_KEPT` values, the keys of this rank's
        self._iterations = 0
        self._since: float | None = None  # when the iteration began that this rank is in
        self._planned: tuple[int, np.ndarray] | None = None
        self._digests: dict[int, int] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._closed = threading.Event()
        self._failed_at = 0.0
        self._refusal: PoolTooSmallError | None = None  # the last one, of which all ranks know
        self._thread = threading.Thread(target=self._watch, name="sparsespec-ranks", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    # What ranks agree on. Rare: each call is a few messages, and waits for the others.

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks: anything that JSON holds."""
        key = self._next_key("shared")
        if self.ranks.rank == 0:
            self._write(key, value)
            return value
        return json.loads(self._wait_for(key))

    def least(self, *values: int) -> list[int]:
        """The least of all ranks' values, place by place."""
        return [min(column) for column in zip(*self._from_all("least", values), strict=True)]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around what each rank does by itself, and may have no memory for, before they go on together.

        Raises:
            PoolTooSmallError: a rank had none. All ranks raise it, so they are still together.
        """
        refusal: PoolTooSmallError | None = None
        try:
            yield
        except PoolTooSmallError as error:
            refusal = error
        told = self._from_all("refused", "" if refusal is None else str(refusal))
        if refusal is None:
            rank = next((rank for rank, reason in enumerate(told) if reason), None)
            if rank is None:
                return
            refusal = PoolTooSmallError(
                f"Rank {rank}, which shares the model, has no memory for its part. {told[rank]}"
            )
        self._refusal = refusal
        raise refusal

    def agree(self, what: str, value: Any) -> None:
        """Make sure that all ranks have the same value.

        Raises:
            RanksDifferError: they have not.
        """
        expected = self.share(value)
        if json.loads(json.dumps(value)) != expected:
            self.fail(
                f"rank {self.ranks.rank} has other {what} than rank 0: {value!r:.120}, not {expected!r:.120}", True
            )
            self.require()

    # Where this rank is.

    def require(self) -> None:
        """Raises `failure`, if there is one."""
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Around what ranks could wait for each other in: each iteration, and the building of what it runs.

        What fails on one rank alone ends all of them.

        Raises:
            RanksEndedError, RanksDifferError: the ranks are not together any longer, whatever failed because of it.
        """
        self.require()
        self._iterations += 1
        self._since = time.monotonic()
        try:
            yield
        except Exception as error:
            if isinstance(error, RuntimeError) and not isinstance(error, SparseSpecError | torch.OutOfMemoryError):
                self._await_reason()  # the collectives of the others' process end a moment before it is known why
            if self.failure is not None:
                raise self.failure from error
            if error is not self._refusal:
                self.fail(f"rank {self.ranks.rank} failed by {type(error).__name__}: {error}")
            raise
        finally:
            self._since = None

    @property
    def iterations(self) -> int:
        """Iterations that this rank has begun."""
        return self._iterations

    def planned(self, inputs: np.ndarray) -> None:
        """Tell what this iteration does: the array that goes to the device. It must not change until the next one."""
        self._planned = (self._iterations, inputs)
        if self._iterations % DIGEST_EVERY == 1:
            self._digests[self._iterations] = _digest(inputs)

    def fail(self, reason: str, differ: bool = False) -> None:
        """End the agreement on all ranks, unless it has ended already."""
        told = json.dumps({"reason": reason, "differ": differ})
        with suppress(Exception):  # the store may be gone, and with it the others
            told = self._store.compare_set("failure", "", told).decode() or told
        self._take_failure(told)

    def close(self) -> None:
        """End the thread; nothing is agreed on from here on."""
        self._closed.set()
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        self.close()
        self._thread.join(2.0)
        error = getattr(sys, "last_value", None)
        why = "" if error is None else f" by {type(error).__name__}: {error}"
        try:
            self._store.set(f"ended/{self.ranks.rank}", why or " ")
        except Exception:
            return  # no other rank is left to read it

    # The others.

    def _from_all(self, kind: str, value: Any) -> list[Any]:
        """What each rank says, in order: anything that JSON holds."""
        key = self._next_key(kind)
        self._write(f"{key}/{self.ranks.rank}", value)
        return [json.loads(self._wait_for(f"{key}/{rank}")) for rank in range(self.ranks.size)]

    def _next_key(self, kind: str) -> str:
        """Of the next value that ranks tell each other. Every `_KEPT` values, forgets those that all have read."""
        self.require()
        block, place = divmod(self._shared, _KEPT)
        self._shared += 1
        if place == 0 and block > 0:
            self._store.set(f"read/{block - 1}/{self.ranks.rank}", "")
            if block > 1:
                for rank in range(self.ranks.size):
                    self._wait_for(f"read/{block - 2}/{rank}")
                for key in self._written.pop(block - 2, ()):
                    self._store.delete_key(key)
            if block > 3:  # all have begun the block before this one, so none waits for this key any longer
                self._store.delete_key(f"read/{block - 4}/{self.ranks.rank}")
        return f"{kind}/{self._shared}"

    def _write(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))
        self._written.setdefault((self._shared - 1) // _KEPT, []).append(key)

    def _wait_for(self, key: str) -> bytes:
        began, pause = time.monotonic(), 1e-5
        while not self._store.check([key]):
            self.require()
            if time.monotonic() - began > self._timeout:
                self.fail(
                    f"rank {self.ranks.rank} has waited {self._timeout:g} s for another rank to make the same call"
                )
                self.require()
            time.sleep(pause)
            pause = min(pause * 2, 0.01)
        return self._store.get(key)

    def _await_reason(self) -> None:
        began, self._since = time.monotonic(), self._since or time.monotonic()
        while self.failure is None and time.monotonic() - began < 1.5 * self._timeout + 1.0:
            time.sleep(0.02)

    def _take_failure(self, told: str) -> None:
        if self.failure is None:
            found = json.loads(told)
            kind = RanksDifferError if found["differ"] else RanksEndedError
            self._failed_at = time.monotonic()
            self.failure = kind(
                f"The ranks that share the model have ended together: {found['reason']}. Start all of them again."
            )

    def _watch(self) -> None:
        pause = min(self._timeout / _LOOKS, 0.5)
        beat = 0
        while not self._closed.wait(pause):
            beat += 1
            try:
                if self.failure is None:
                    self._look(beat)
            except Exception as error:
                if not self._closed.is_set():
                    self._take_failure(
                        json.dumps(
                            {
                                "reason": "the store of torch.distributed does not answer any longer, as after the end "
                                f"of rank 0 or of the launcher ({type(error).__name__})",
                                "differ": False,
                            }
                        )
                    )
            self._leave_if_caught()

    def _look(self, beat: int) -> None:
        since, me = self._since, self.ranks.rank
        inside = None if since is None else time.monotonic() - since
        caught = inside is not None and inside > self._timeout
        planned = self._planned
        state = {"beat": beat, "iteration": self._iterations, "inside": inside is not None}
        if caught and planned is not None and planned[0] == self._iterations:
            self._digests.setdefault(*((planned[0], _digest(planned[1]))))
        self._store.set(f"state/{me}", json.dumps(state))
        if self._store.check(["failure"]):
            self._take_failure(self._store.get("failure").decode())
            return
        self._compare_digests()
        for rank in range(self.ranks.size):
            if rank != me and self.failure is None:
                self._judge(rank, inside, caught)

    def _judge(self, rank: int, inside: float | None, caught: bool) -> None:
        """Whether this rank can still count on another one."""
        now = time.monotonic()
        if inside is not None and self._store.check([f"ended/{rank}"]):
            how = self._store.get(f"ended/{rank}").decode().strip()
            self.fail(f"the process of rank {rank} has ended {how}".rstrip())
            return
        state = {"beat": 0, "iteration": 0, "inside": True}  # before its first one
        if self._store.check([f"state/{rank}"]):
            state = json.loads(self._store.get(f"state/{rank}"))
        beat, heard = self._beats.get(rank, (0, now))
        if state["beat"] != beat:
            beat, heard = state["beat"], now
        self._beats[rank] = (beat, heard)
        if inside is None:
            return
        if now - heard > self._timeout:
            self.fail(f"nothing has been heard of rank {rank} for {self._timeout:g} s")
        elif caught and not state["inside"]:
            self.fail(
                f"rank {self.ranks.rank} has waited {self._timeout:g} s in iteration {self._iterations} for rank "
                f"{rank}, which has stayed outside since iteration {state['iteration']}: an exception in its loop, or "
                "other calls than here (SpecConfig.rank_timeout allows it longer)"
            )

    def _compare_digests(self) -> None:
        for iteration, digest in list(self._digests.items()):
            mine = f"plan/{iteration}/{self.ranks.rank}"
            if not self._store.check([mine]):
                self._store.set(mine, str(digest))
            keys = [f"plan/{iteration}/{rank}" for rank in range(self.ranks.size)]
            if self._store.check(keys):
                digests = [int(self._store.get(key)) for key in keys]
                del self._digests[iteration]
                self._store.delete_key(f"plan/{iteration - _KEPT_DIGESTS * DIGEST_EVERY}/{self.ranks.rank}")
                if len(set(digests)) > 1:
                    other = next(rank for rank, one in enumerate(digests) if one != digests[0])
                    self.fail(f"rank {other} has planned another iteration {iteration} than rank 0", differ=True)
                    return

    def _leave_if_caught(self) -> None:
        """End the process where its main thread cannot come back from a collective to raise the failure."""
        since = self._since
        grace = min(self._timeout, 10.0)
        if self.failure is None or since is None or time.monotonic() - max(since, self._failed_at) < grace:
            return
        print(f"{type(self.failure).__name__}: {self.failure}", file=sys.stderr, flush=True)
        self._end(_EXIT_CODE)


class AgreedChooser:
    """Chooses the cycle that rank 0 chooses by its measured times. It replaces the `CycleChooser` on every rank.

    Args:
        chooser: of this rank; those of other ranks than 0 only know the cycles.
        agreement: of the ranks.
        cycles: all that can be chosen, in the same order on all ranks.
    """

    def __init__(self, chooser: Any, agreement: Agreement, cycles: Sequence[Any]) -> None:
        self._chooser = chooser
        self._agreement = agreement
        self._cycles = list(cycles)
        self.current = self._cycles[agreement.share(self._cycles.index(chooser.current))]

    def began(self) -> None:
        """As of a `CycleChooser`."""
        self._chooser.began()

    def verified(self, *what: Any) -> None:
        """As of a `CycleChooser`."""
        self._chooser.verified(*what)

    def took(self, seconds: float, lengths: list[int]) -> None:
        """As of a `CycleChooser`."""
        self._chooser.took(seconds, lengths)

    def choose(self, lengths: list[int]) -> Any:
        """The cycle that rank 0 chooses now. The others wait until it has, while an iteration is under way."""
        mine = self._chooser.choose(lengths) if self._agreement.ranks.rank == 0 else self.current
        self.current = self._cycles[self._agreement.share(self._cycles.index(mine))]
        return self.current


def _digest(inputs: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(inputs).tobytes())
