# SPDX-License-Identifier: Apache-2.0
"""The shard: a server process that owns blocks, answers pulls and applies pushes."""
