# SPDX-License-Identifier: Apache-2.0
"""Which snapshot is served, and how another one takes its place: opened beside it, then exchanged in one assignment.

Invariant: from the first load on there is always a snapshot, whole, and ``current`` is never one that is still being opened. A
cut that cannot be opened changes nothing: what was served goes on to be served, and ``problem`` says why. Once a cut was asked
for by name, newer ones are not taken (``pinned``). Of a part of a model, what was served before is kept for a while, since other
parts are behind. ``current`` may be read by any thread, without a lock; loads take turns.
"""

import logging
import time
from collections.abc import Callable, Sequence
from threading import Event, Lock, Thread

from oarlock.checkpoint.reading import Reading
from oarlock.proto.errors import CorruptCheckpoint, NotFound, PSError, Unavailable, VersionMismatch, WrongJob
from oarlock.serving.part import WHOLE, ModelPart
from oarlock.serving.recall import Asked, Recall, RecallSpec
from oarlock.serving.snapshot import Model, Progress, Snapshot, Version, open_snapshot

logger = logging.getLogger(__name__)

# Between two looks at the folder.
LOOK_SECONDS = 1.0
# How long what was served before is kept of a part of a model: other parts may take longer to open theirs.
KEEP_SECONDS = 300.0


class Serving:
    """The snapshot that is served of the cuts of ``store``. ``trust``: as ``open_snapshot`` has it."""

    def __init__(
        self,
        store: Reading,
        *,
        trust: bool = False,
        look_seconds: float = LOOK_SECONDS,
        recall: Sequence[RecallSpec] = (),
        part: ModelPart = WHOLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.part = part
        # The indexes of tables whose nearest rows may be asked for.
        self._recall = Recall(recall, keep=not part.whole)
        self.pinned = False
        # Why a newer cut is not served; empty: nothing is wrong.
        self.problem = ""
        self.swaps = 0
        self.failures = 0
        self.load_seconds = 0.0
        self._trust = trust
        self._look_seconds = look_seconds
        self._clock = clock
        self._snapshot: Snapshot | None = None
        # What was served before, and until when it is kept.
        self._before: tuple[Model, float] | None = None
        self._loading = Lock()
        # Cuts that cannot be opened, and that it makes no sense to try again.
        self._refused: set[int] = set()
        self._over = Event()
        self._thread: Thread | None = None

    @property
    def ready(self) -> bool:
        return self._snapshot is not None

    @property
    def recall(self) -> Asked:
        """What is asked for nearest rows."""
        return self._recall

    @property
    def current(self) -> Model:
        """The snapshot that is served now; who answers from it keeps it for the whole answer."""
        found = self._snapshot
        if found is None:
            raise Unavailable("this process is still opening its model: ask again")
        return found

    def version(self, wanted: Version) -> Model:
        """Return what is served of a version, or was until lately; NotFound says what there is."""
        found = self._served()
        for model in found:
            if model.version.stands_for(wanted):
                return model
        have = " and ".join(dict.fromkeys(str(model.version) for model in found))
        raise NotFound(f"{wanted} is not served here; {have} is", cut=wanted.cut, run=wanted.run)

    def recall_of(self, wanted: Version) -> Asked:
        """Return what is asked for nearest rows of a version, which is served, or was until lately; NotFound."""
        return self._recall.of(wanted)

    def _served(self) -> list[Model]:
        """Return the models that may be asked for by version, the one that is served first."""
        before = self._before
        return [self.current] if before is None or self._clock() > before[1] else [self.current, before[0]]

    def _keep(self, model: Model | None) -> None:
        """Keep what another one takes the place of, if that is one part of what is served together."""
        if model is not None and not self.part.whole:
            self._before = (model, self._clock() + KEEP_SECONDS)

    def _let_go(self) -> None:
        """Give back the memory of what was kept for long enough."""
        before = self._before
        # While another one is opened that which is kept may be exchanged; next time, then.
        if before is not None and self._clock() > before[1] and self._loading.acquire(blocking=False):
            try:
                self._before = None
                self._recall.let_go()
            finally:
                self._loading.release()

    def load(self, cut: int | None = None, *, progress: Progress = lambda done, total: None) -> Model:
        """Open ``cut`` (None: the newest) and serve it; whatever goes wrong leaves what is served as it was."""
        with self._loading:
            return self._load(cut, progress)

    def _load(self, cut: int | None, progress: Progress = lambda done, total: None) -> Snapshot:
        begun = time.monotonic()
        before = self._snapshot
        manifest = self.store.load_manifest(cut)
        if before is not None and (before.job, before.version.run, before.version.cut) == (
            manifest.job,
            manifest.run,
            manifest.cut,
        ):
            return before
        if before is not None and before.job != manifest.job:
            raise WrongJob(
                f"cut {manifest.cut} is of job {manifest.job}, what is served of job {before.job}: another model needs a "
                "server of its own"
            )

        def unless_over(done: int, total: int) -> None:
            if self._over.is_set():
                raise Unavailable("this process is ending, and opens no other cut")
            progress(done, total)

        try:
            made = open_snapshot(
                self.store, manifest, before=before, trust=self._trust, part=self.part, progress=unless_over
            )
            self._recall.follow(made)
        except (PSError, OSError, MemoryError):
            self.failures += 1
            raise
        self._keep(before)
        self._snapshot = made
        self.swaps += before is not None
        self.load_seconds = time.monotonic() - begun
        logger.info(
            "event=serving run=%d cut=%d rows=%d bytes=%d shared_blocks=%d seconds=%.2f",
            made.version.run,
            made.version.cut,
            made.rows,
            made.nbytes,
            0 if before is None else len(made.blocks.keys() & before.blocks.keys()),
            self.load_seconds,
        )
        return made

    def roll_back(self, cut: int = 0) -> Snapshot:
        """Serve ``cut``, 0: the next older one than that which is served, and take no newer one from then on."""
        with self._loading:
            served = self.current.version.cut
            if not cut:
                older = [other for other in self.store.cuts() if other < served]
                if not older:
                    raise NotFound(f"there is no cut older than {served}, which is served", cut=served)
                cut = older[-1]
            made = self._load(cut)
            self.pinned, self.problem = True, ""
            return made

    def release(self) -> Model:
        """Serve the newest cut, and take newer ones again, if the folder is followed."""
        with self._loading:
            made = self._load(None)
            self.pinned, self.problem = False, ""
            self._refused.clear()
            return made

    # Following a folder

    def follow(self) -> None:
        """Look for newer cuts in a thread, until ``close``."""
        self._thread = Thread(target=self._follow, name="oarlock-cuts", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._over.wait(self._look_seconds):
            # Whatever happens to a folder, what is served goes on, and newer cuts are looked for.
            try:
                self._let_go()
                self.look()
            except Exception as error:
                self._complain(f"the folder of cuts cannot be followed: {type(error).__name__}: {error}")

    def look(self) -> bool:
        """Serve the newest cut if it is newer than what is served; return whether there was one. A failure is in ``problem``."""
        with self._loading:
            if self.pinned:
                return False
            served = self.current.version.cut
            try:
                newer = [cut for cut in self.store.cuts() if cut > served and cut not in self._refused]
                # The newest that can be opened.
                for cut in reversed(newer):
                    if self._take(cut):
                        return True
            except OSError as error:
                # The disk, most likely, or a folder that is elsewhere: next time.
                self._complain(f"the folder of cuts cannot be read: {error}")
            return False

    def _take(self, cut: int) -> bool:
        try:
            self._load(cut)
        except (CorruptCheckpoint, VersionMismatch, NotFound, WrongJob) as error:
            self._refused.add(cut)
            self._complain(f"cut {cut}: {error}")
            return False
        except (PSError, MemoryError) as error:
            self._complain(f"cut {cut}: {error or 'out of memory'}")
            return False
        self.problem = ""
        return True

    def _complain(self, problem: str) -> None:
        if problem != self.problem:
            logger.error("event=cut_not_served problem=%r", problem)
        self.problem = problem

    def close(self) -> None:
        """Look for no newer cuts any more, and open none to its end that is being opened; idempotent."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def dispose(self) -> None:
        """Give back what answers are made by; nobody asks any more. Idempotent."""
