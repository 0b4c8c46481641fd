# SPDX-License-Identifier: Apache-2.0
"""The coordinator: membership, placement, work and checkpoints of one job. It decides; it moves no rows."""
