# SPDX-License-Identifier: Apache-2.0
"""What the entry points of all processes share, besides cores and options."""

import gc

from oarlock.client.entry import keep_what_is_loaded


def test_what_is_loaded_is_no_part_of_later_searches_for_garbage():
    before = gc.get_freeze_count()
    kept: list[int] = []
    keep_what_is_loaded()
    try:
        assert gc.get_freeze_count() > before
        assert not any(each is kept for each in gc.get_objects())
    finally:
        gc.unfreeze()
    assert any(each is kept for each in gc.get_objects())
