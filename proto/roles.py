# SPDX-License-Identifier: Apache-2.0
"""Roles: what somebody who talks to a job's processes is there for. A token stands for one of them.

    read    looks: status, rows, digests, metrics
    train   is one of the job's own processes
    admin   changes what the job does, and looks

Invariant: ROLES goes from who may do the least harm to who may do the most; a caller that has several tokens uses the first
that is enough. OWN is the order in which the job's own processes do: their questions are not those of tools, of which there may
be too many.
"""

READ, TRAIN, ADMIN = "read", "train", "admin"
ROLES = (READ, TRAIN, ADMIN)
OWN = (TRAIN, ADMIN, READ)

# Who may call a method.
EVERYBODY = frozenset(ROLES)
MEMBERS = frozenset({TRAIN})
LOOKERS = frozenset({READ, ADMIN})
ADMINS = frozenset({ADMIN})
