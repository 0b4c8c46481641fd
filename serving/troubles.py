# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while a job is followed, by who it was noticed at, and the threads that ask its shards.

    Troubles     what is wrong with whom, told as one text whenever that changes
    Pollers      a thread for each shard that there is, which asks it again and again

Invariant: a thread ends when its shard is one no more, and with it what was wrong there; an error ends no thread. Any thread.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from threading import Event, Thread

from oarlock.client.router import Routes, ShardAddress
from oarlock.proto.errors import PSError, StalePlacement, WrongIncarnation, WrongJob, WrongRun

# The least pause between two questions to a shard.
LEAST_SECONDS = 0.01
_ELSEWHERE = (WrongRun, WrongIncarnation, StalePlacement, WrongJob)


class Troubles:
    """``tell`` hears all that is wrong, empty: nothing is; ``elsewhere`` is called where the coordinator knows better."""

    def __init__(self, tell: Callable[[str], object], elsewhere: Callable[[], object]) -> None:
        self._tell = tell
        self._elsewhere = elsewhere
        self._by: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._by)

    @contextlib.contextmanager
    def said(self, who: str) -> Iterator[None]:
        """Have it told what goes wrong within at somebody, and no more once it goes well."""
        try:
            yield
        except _ELSEWHERE as error:
            self._by[who] = f"{who}: {error}"
            self._elsewhere()
        except (PSError, OSError, ValueError, RuntimeError, MemoryError) as error:
            self._by[who] = f"{who}: {error or type(error).__name__}"
        else:
            if not self._by.pop(who, None):
                return
        self._say()

    def forget(self, who: str) -> None:
        """Nobody asks there any more."""
        self._by.pop(who, None)
        self._say()

    def _say(self) -> None:
        # A copy: other threads have troubles of their own meanwhile.
        self._tell("; ".join(text for _, text in sorted(self._by.copy().items()))[:1000])


class Pollers:
    """Asks each shard of ``routes`` by ``poll`` every ``seconds``, at once while that says so, until ``over``."""

    def __init__(
        self,
        routes: Callable[[], Routes | None],
        poll: Callable[[ShardAddress], bool],
        troubles: Troubles,
        over: Event,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routes = routes
        self._poll = poll
        self._troubles = troubles
        self._over = over
        self._seconds = seconds
        self._clock = clock
        self._threads: dict[ShardAddress, Thread] = {}

    def tend(self) -> None:
        """Have a thread for each shard that there is; called by one thread."""
        routes = self._routes()
        for shard, thread in list(self._threads.items()):
            if not thread.is_alive():
                del self._threads[shard]
        for shard in routes.shards.values() if routes is not None else ():
            if shard not in self._threads and not self._over.is_set():
                thread = Thread(target=self._follow, args=(shard,), name=f"oarlock-shard-{shard.id}", daemon=True)
                self._threads[shard] = thread
                thread.start()

    def join(self) -> None:
        """Wait until all have ended, once it is over; by the thread that tends them."""
        for thread in self._threads.values():
            thread.join()

    def _follow(self, shard: ShardAddress) -> None:
        who = f"shard {shard.id}"
        while not self._over.is_set():
            routes = self._routes()
            if routes is None or routes.shards.get(shard.id) != shard:
                self._troubles.forget(who)
                return
            more, begun = False, self._clock()
            with self._troubles.said(who):
                more = self._poll(shard)
            self._over.wait(0 if more else max(LEAST_SECONDS, self._seconds - (self._clock() - begun)))
