# SPDX-License-Identifier: Apache-2.0
"""What a process serves that has no rows: the dense parameters of a cut, or of a job, in front of the servers of its parts.

Invariant: which cut of a checkpoint is served the servers of rows say: the newest that every part has. It takes the place of
another once its dense parameters are here, and servers of parts keep the one before for a while, so that none of its requests
fails. Nobody rolls such a process back: it goes where its servers go.
"""

import logging
from collections.abc import Callable
from typing import Any

from oarlock.checkpoint.reading import Reading
from oarlock.proto.errors import InvalidArgument, PSError, Unavailable, WrongRun
from oarlock.serving.agreeing import SeveralVersions
from oarlock.serving.follow import Call, Following
from oarlock.serving.part import WITHOUT_ROWS
from oarlock.serving.recall import Asked
from oarlock.serving.remote import RowServers
from oarlock.serving.snapshot import Model, Progress, Snapshot
from oarlock.serving.swap import LOOK_SECONDS, Serving

logger = logging.getLogger(__name__)

# Between two looks at least.
LEAST_SECONDS = 0.05
# Between two questions to servers that are not ready yet.
WAIT_SECONDS = 0.2
# How long servers may take to open the same cut, before it is told as a problem.
BETWEEN_SECONDS = 30.0


class InFront(Serving):
    """What is served without rows, whatever it is: the rows are those of ``servers``, which alone can be told otherwise."""

    servers: RowServers

    @property
    def current(self) -> Model:
        """The model that is served now, with the rows of the servers."""
        return self.servers.model_of(super().current)

    @property
    def recall(self) -> Asked:
        """Nobody is asked for nearest rows here."""
        raise InvalidArgument(
            "nearest rows are asked of the servers of the parts, all of them together, and not of this process"
        )

    def roll_back(self, cut: int = 0) -> Snapshot:
        raise self._goes_along()

    def release(self) -> Model:
        raise self._goes_along()

    def _goes_along(self) -> InvalidArgument:
        return InvalidArgument(
            f"this process serves the cut that its servers of rows do: roll those back ({self.servers}), and it goes with them"
        )

    def close(self) -> None:
        self._over.set()
        self.servers.stale.set()
        super().close()

    def dispose(self) -> None:
        super().dispose()
        self.servers.close()


class Fronting(InFront):
    """Cuts of ``store`` without rows, which ``servers`` have."""

    def __init__(
        self, store: Reading, servers: RowServers, *, trust: bool = False, look_seconds: float = LOOK_SECONDS
    ) -> None:
        super().__init__(store, trust=trust, look_seconds=look_seconds, part=WITHOUT_ROWS)
        self.servers = servers
        # Since when servers have been of several versions, if they are.
        self._between: float | None = None

    def load(self, cut: int | None = None, *, progress: Progress = lambda done, total: None) -> Model:
        """Serve the cut that the servers serve, once they do."""
        while True:
            # Nobody knows how long that takes.
            progress(0, 0)
            try:
                with self._loading:
                    self._load(self._agreed(), progress)
                self.problem = ""
                return self.current
            except Unavailable as error:
                self.problem = str(error)
                logger.info("event=waiting_for_servers problem=%r", self.problem)
            if self._over.wait(WAIT_SECONDS):
                raise Unavailable("this process is ending, and opens no model")

    def _agreed(self) -> int:
        """Return the cut that the servers serve, which this folder has, too."""
        snapshot = self._snapshot
        manifest = self.store.load_manifest(None) if snapshot is None else snapshot.manifest
        version = self.servers.agreed(manifest.job, manifest.table_specs())
        if version.live:
            raise InvalidArgument(
                f"the servers of rows ({self.servers}) follow a job: give --follow JOB in place of a checkpoint"
            )
        run = snapshot.version.run if snapshot is not None and snapshot.version.cut == version.cut else None
        run = self.store.load_manifest(version.cut).run if run is None else run
        if run != version.run:
            raise WrongRun(
                f"{version} is what the servers of rows have; in this folder cut {version.cut} is of run {run}"
            )
        return version.cut

    def look(self) -> bool:
        """Serve the cut that the servers serve if it is another one; return whether it was. A failure is in ``problem``."""
        with self._loading:
            between, self._between = self._between, None
            try:
                cut = self._agreed()
                if cut != super().current.version.cut:
                    return self._take(cut)
                if wrong := self.servers.problem or self.servers.failure:
                    self._complain(wrong)
                else:
                    self.problem = ""
                return False
            except SeveralVersions as error:
                # As it is for a moment whenever cuts change.
                self._between = self._clock() if between is None else between
                if self._clock() - self._between > BETWEEN_SECONDS:
                    self._complain(str(error))
            except (PSError, OSError) as error:
                self._complain(f"what the servers of rows serve is not served: {error}")
            return False

    def _follow(self) -> None:
        while not self._over.is_set():
            # At once where rows of what is served were not to be had.
            self.servers.stale.wait(self._look_seconds)
            self.servers.stale.clear()
            if not self._over.is_set():
                self.look()
                self._over.wait(LEAST_SECONDS)


class FrontingJob(InFront, Following):
    """A job that is followed without its rows, which ``servers`` follow; otherwise as ``Following``."""

    def __init__(
        self,
        store: Reading,
        call: Call,
        address: Callable[[], str],
        job: str,
        servers: RowServers,
        **options: Any,
    ) -> None:
        super().__init__(store, call, address, job, part=WITHOUT_ROWS, **options)
        self.servers = servers

    def load(self, cut: int | None = None, *, progress: Progress = lambda done, total: None) -> Model:
        """Begin to follow; return once there is something to serve, here and by the servers."""
        super().load(cut, progress=progress)
        while True:
            progress(0, 0)
            try:
                self._agree()
                return self.current
            except Unavailable as error:
                logger.info("event=waiting_for_servers problem=%r", str(error))
            if self._over.wait(WAIT_SECONDS):
                raise Unavailable("this process is ending, and opens no model")

    def look(self) -> bool:
        """Ask the coordinator, and the servers of rows; return whether the run was new. PSError: no answer of the coordinator."""
        try:
            return super().look()
        finally:
            # Whether or not there is a coordinator.
            if self.live is not None:
                with self._troubles.said("the servers of rows"):
                    self._agree()

    def _agree(self) -> None:
        """Raise unless the servers serve the live model."""
        model = self.live
        assert model is not None, "asked once there is one"
        version = self.servers.agreed(model.job, {name: table.spec for name, table in model.tables.items()})
        if not version.live:
            raise InvalidArgument(
                f"the servers of rows ({self.servers}) serve {version}: have them follow the job, too"
            )
        if version.run != model.run:
            raise Unavailable(
                f"the servers of rows serve run {version.run}, this process has run {model.run}: ask again"
            )
        if wrong := self.servers.problem or self.servers.failure:
            raise Unavailable(wrong)

    def _served(self) -> list[Model]:
        return [self.current]
