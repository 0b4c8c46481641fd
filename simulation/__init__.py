# SPDX-License-Identifier: Apache-2.0
"""Whole jobs under faults, with the counting that shows what was lost or doubled. Nothing of the system imports it."""
