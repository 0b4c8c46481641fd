# SPDX-License-Identifier: Apache-2.0
"""Oarlock: a parameter server for sparse recommender training on CPU clusters."""

__version__ = "0.1.0"
