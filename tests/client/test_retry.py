# SPDX-License-Identifier: Apache-2.0
import asyncio
import random

import numpy as np
import pytest
import rig

from oarlock.client.retry import Retry
from oarlock.proto.errors import CODES, StalePlacement, Unavailable


def attempts(failing, retry, seed=0):
    """Run a Retry over an attempt that fails as ``failing(number)`` says; return (result, starts, timeouts)."""
    starts, timeouts = [], []

    async def attempt(timeout):
        starts.append(asyncio.get_running_loop().time())
        timeouts.append(timeout)
        error = failing(len(starts))
        if error is not None:
            raise error
        return "done"

    result, _ = rig.run(retry.run(attempt, rng=random.Random(seed)))
    return result, starts, timeouts


def test_pauses_double_up_to_the_most_and_are_drawn_from_the_upper_half():
    retry = Retry(deadline_seconds=60, call_seconds=20, first_seconds=0.1, most_seconds=1.0)
    result, starts, timeouts = attempts(lambda n: Unavailable("x") if n < 10 else None, retry)
    assert result == "done"
    pauses = np.diff(starts)
    limits = np.minimum(0.1 * 2.0 ** np.arange(9), 1.0)
    assert np.all(pauses >= limits / 2 - 1e-9)
    assert np.all(pauses <= limits + 1e-9)
    assert len(set(pauses.tolist())) == 9
    assert timeouts == [20] * 10


@pytest.mark.parametrize("kind", [k for k in CODES.values() if not k.retryable], ids=lambda k: k.__name__)
def test_what_a_pause_cannot_mend_is_raised_at_once(kind):
    with pytest.raises(kind, match=r"^for good$"):
        attempts(lambda n: kind("for good"), Retry())


def test_the_deadline_ends_with_the_last_error_and_its_details():
    async def body():
        begin = asyncio.get_running_loop().time()
        timeouts = []

        async def attempt(timeout):
            timeouts.append(timeout)
            await asyncio.sleep(3)
            raise StalePlacement("moved", block=7, message="kept")

        with pytest.raises(StalePlacement) as caught:
            await Retry(deadline_seconds=10, call_seconds=5).run(attempt, rng=random.Random(0))
        return asyncio.get_running_loop().time() - begin, timeouts, caught.value

    (passed, timeouts, error), _ = rig.run(body())
    assert 9 < passed < 13
    assert str(error) == "moved (given up after 10 s)"
    assert error.details == {"block": 7, "message": "kept"}
    assert timeouts[0] == 5
    # No attempt is given more time than is left.
    assert timeouts[-1] < 5


def test_one_attempt_is_made_even_without_time():
    result, starts, timeouts = attempts(lambda n: None, Retry(deadline_seconds=0))
    assert (result, len(starts), timeouts) == ("done", 1, [0.001])


def test_errors_outside_the_tree_pass_through():
    with pytest.raises(ZeroDivisionError):
        attempts(lambda n: ZeroDivisionError(), Retry())
