# SPDX-License-Identifier: Apache-2.0
"""How a process talks: the job's description, where blocks live, pull and push, membership, retries."""
