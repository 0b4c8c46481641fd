# SPDX-License-Identifier: Apache-2.0
"""What can be observed: log lines, stage times, traces, and metrics for Prometheus."""
