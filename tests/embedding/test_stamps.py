# SPDX-License-Identifier: Apache-2.0
"""Stamps of views: how words hold them, and that each says one phase however often they come round."""

import numpy as np

from oarlock.embedding import index
from oarlock.embedding.stamps import ROUND, Track, bits_of, stamp_of, wears_out


def test_words_hold_stamp_and_record_or_slot():
    for record in (0, 1, index.VALUE, index.VALUE + 1, index.RECORD):
        for stamp in (0, 5, 7):
            word = np.int64(index.filed(np.int64(stamp << index.STAMP_BIT | 99), np.int64(record)))
            assert word >= index.SPILLED
            assert (index.record_of(word), (word & index.STAMPS) >> index.STAMP_BIT) == (record, stamp)
            assert index.records_of(np.array([word], np.uint32)).tolist() == [record]
            back = np.int64(index.placed(word, np.int64(17)))
            assert (back, back < index.PENDING) == (stamp << index.STAMP_BIT | 17, True)


def test_stamps_go_round_and_each_says_one_phase():
    assert [stamp_of(phase) for phase in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 1]
    assert bits_of(0, 0) == 0
    assert bits_of(6, 9) == 1 << 6 | 1 << 7 | 1 << 1
    rng = np.random.default_rng(5)
    lost = 0
    for _ in range(200):
        track, words = Track(), {}
        for phase in range(1, 40):
            known = track.known
            worn = wears_out(track, phase)
            words = {key: (0 if worn >> stamp_of(p) & 1 else s, p) for key, (s, p) in words.items()}
            assert track.known in (known, 0)
            lost += known > 0 and track.known == 0
            for stamp, at in words.values():
                assert stamp == stamp_of(at) if at >= track.floor else stamp == 0
                assert stamp != stamp_of(phase)
            assert not track.known or phase - track.known < ROUND
            if rng.random() < 0.2:  # the view is read
                oldest = track.known or phase
                old = bits_of(track.floor, oldest)
                words = {key: (0 if old >> s & 1 else s, p) for key, (s, p) in words.items()}
                track.floor = max(track.floor, oldest)
                if rng.random() < 0.5:
                    track.known = phase
            for key in rng.integers(30, size=4).tolist():
                words[key] = stamp_of(phase), phase
    assert lost > 10
