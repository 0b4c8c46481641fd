# SPDX-License-Identifier: Apache-2.0
"""The worker: leases splits, reads and encodes them, pulls rows, computes, and pushes gradients."""
