# SPDX-License-Identifier: Apache-2.0
"""Encoding of a group's gradients into the forms in which its job has them travel.

Invariant: a pure function of the gradients, the job's seed and the push's identity, but for what error feedback keeps of an
open split, which is handed in. What is encoded is a new array, which nothing writes to any more. Any thread.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.client.compression import DENSE
from oarlock.client.feedback import SplitFeedback
from oarlock.client.forms import Forms
from oarlock.client.packed import Encoded, encode_dense, encode_rows
from oarlock.client.push import PushIdentity, RowGradients
from oarlock.client.router import Routes
from oarlock.embedding.compress import Draw, draw_start
from oarlock.proto.errors import InvalidArgument

_GROUP_BITS = 31
_STEPS = (1 << 63) - 1


class PushEncoder:
    """Encodes one group's gradients; ``last``: it is the last of its split, which leaves nothing out."""

    def __init__(
        self, forms: Forms, routes: Routes, identity: PushIdentity, feedback: SplitFeedback | None, last: bool
    ) -> None:
        self._forms = forms
        self._routes = routes
        self._feedback = feedback
        self._last = last
        self._step = (identity.split << _GROUP_BITS | identity.group) & _STEPS
        if feedback is not None:
            feedback.begin(identity.group)
        elif forms.feedback:
            raise InvalidArgument(
                "the job keeps what compression leaves out: push with what its split has kept (feedback)"
            )

    def rows(self, number: int, part: RowGradients) -> tuple[RowGradients, Encoded | None]:
        """Return what is pushed of table ``number``, and its encoded gradients; None: they travel as they are."""
        found, table = self._forms, self._forms.layout.tables[number]
        form = found.pushes[number]
        if found.kept[number] and self._feedback is not None:
            if not self._last:
                return part, Encoded(form, self._feedback.rows(table.name, form, part)) if len(part.keys.keys) else None
            part = self._feedback.drain(table.name, part, table.blocks, self._routes.ranks[number], form.limit)
            form = form.lossless
        if form.plain or not len(part.keys.keys):
            return part, None
        draw = Draw(part.keys.keys, draw_start(found.seed, table.name, "push"), self._step)
        return part, Encoded(form, encode_rows(form, part.gradients, draw))

    def dense(self, gradients: NDArray[np.float32]) -> tuple[NDArray[np.float32], Encoded | None]:
        """Return the gradients of all dense blocks, and encoded; None: they travel as they are."""
        found, blocks = self._forms, self._forms.layout.dense_blocks
        form = found.push_dense
        lengths = [block.length for block in blocks]
        if found.kept_dense and self._feedback is not None:
            if not self._last:
                return gradients, Encoded(form, self._feedback.dense(form, gradients, lengths))
            gradients, form = self._feedback.drain_dense(gradients, lengths, form.limit), form.lossless
        if form.plain:
            return gradients, None
        first = np.array([block.offset for block in blocks], np.uint64)
        draw = Draw(first, draw_start(found.seed, DENSE, "push"), self._step)
        return gradients, Encoded(form, encode_dense(form, gradients, lengths, draw))
