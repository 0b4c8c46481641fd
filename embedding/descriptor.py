# SPDX-License-Identifier: Apache-2.0
"""A block's descriptor: what kernels know of it, as 32 words of 8 bytes, one line of a table's int64[blocks, FIELDS].

Invariant: the words of the lock stay while contents come and go; all others change only under the lock as
``embedding/lock.py`` says: those that pulls read (BUCKETS to CHUNKS) while the block is shut, the rest under the mutex.
"""

# Words 0 and 1 are the lock.
BUCKETS = 8  # address of the index; 0: the block is not stored here
COUNT = 9  # buckets
CHUNKS = 10  # address of the chunk table

# Of views (``embedding/view_kernels.py``).
STAMP = 11  # the stamp that changes leave in words of the index, where it stands there
SAVING = 12  # 1: what changes is saved first, for a view that is not read yet
SAVED = 13  # where the next key is saved
SAVED_ROOM = 14  # how many more can be
SKETCH_SAVED = 15  # 1: the sketch is saved, or there is none

ENTRIES = 16  # keys in the index
ENTRY_ROOM = 17  # keys that fit before it must grow
ROWS = 18  # rows in memory
NEXT = 19  # first slot that was never used
FREE = 20  # 1 + first slot of the chain of slots given back, 0: none; a free row begins with the same of the next
FREE_ROWS = 21  # how many are in that chain
SLOT_ROOM = 22  # slots that have memory
PENDING_KEYS = 23  # keys that are counted but not admitted
SPILLED_ROWS = 24  # rows in the spill file

SKETCH = 25  # address of the sketch that counts keys without a row, 0: none
HAND = 26  # bucket at which the next sweep of eviction begins
HAND_OF_HEAT = 27  # bucket at which the next search for cold rows begins
VERSION = 28  # operations that changed the block
LIFE = 29  # another number whenever the block gets a whole new content
LEFT = 30  # the highest version of a row that was evicted (``embedding/versions.py``)

FIELDS = 32
DESCRIPTOR_BYTES = 8 * FIELDS
