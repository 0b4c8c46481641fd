# SPDX-License-Identifier: Apache-2.0
"""Recipes: one model each, in one file that reads top to bottom."""
