# SPDX-License-Identifier: Apache-2.0
"""Launch: from a user's words to a job that runs, in one process or as local processes."""
