# SPDX-License-Identifier: Apache-2.0
"""What a shard of a job with ranks holds back for a cut, so that the views of all shards are of one step (SEMANTICS section 7).

    held                   no commit is taken in, so that what all shards were told they know stays all that any of them knows
    with a limit (hybrid)  commits up to that step are; who wants the values after it waits until all views have begun: nobody
                           can push anything of the step after it before that

Invariant: a hold ends with its cut, whatever becomes of that. The shard's push lock covers it.
"""

_NONE = -1


class Hold:
    """``cut``: the one that is waited for, 0: none; ``limit``: the step that all come to first, -1: not told yet."""

    def __init__(self) -> None:
        self.cut = 0
        self.limit = _NONE

    def begin(self, cut: int) -> None:
        """Hold still for a cut, unless it is an older one."""
        if cut > self.cut:
            self.cut, self.limit = cut, _NONE

    def end(self, cut: int) -> None:
        """Hold still no more for cut ``cut`` and those before it."""
        if self.cut <= cut:
            self.cut, self.limit = 0, _NONE

    def takes_in(self, step: int) -> bool:
        """Whether a commit of ``step`` is taken in now."""
        return not self.cut or step <= self.limit

    def keeps_back(self, step: int) -> bool:
        """Whether the values after ``step`` are given to nobody now."""
        return self.cut > 0 and _NONE < self.limit <= step
