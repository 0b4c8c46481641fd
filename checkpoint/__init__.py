# SPDX-License-Identifier: Apache-2.0
"""What a cut is on disk; ``docs/checkpoint.md`` describes the bytes.

Reading order: ``format`` (names, versions), ``block_file`` (one block), ``manifest`` (one cut), ``files`` (the disk),
``store`` (write, commit, restore, delete).
"""
