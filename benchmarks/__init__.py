# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: what things cost, as ratios measured in one run. Outside the layers: nothing imports it."""
