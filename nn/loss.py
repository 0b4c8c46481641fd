# SPDX-License-Identifier: Apache-2.0
"""Losses: the nodes at which a backward pass starts.

Invariant: a loss is the mean over the batch, so its gradient does not grow with the batch. Pure functions.
"""

from oarlock.embedding.spec import check_name
from oarlock.nn.graph import Label, Node, check_nodes
from oarlock.proto.errors import InvalidArgument

LOSSES = ("binary_cross_entropy",)


def binary_cross_entropy(logit: Node, *, label: str) -> Node:
    """Return the mean of ``-y log s(z) - (1 - y) log(1 - s(z))`` for the logit z and the feed ``label`` y in [0, 1].

    Computed from the logit as ``max(z, 0) - z y + log(1 + exp(-|z|))``, which neither overflows nor loses small
    losses; s is the sigmoid. So ``logit`` must not have passed through a sigmoid. The gradient is
    ``(s(z) - y) / batch``.
    """
    check_nodes("binary_cross_entropy", [logit])
    check_name("label", label)
    if logit.width != 1:
        raise InvalidArgument(f"binary_cross_entropy({logit.name}): {logit.width} columns; give a logit of width 1")
    if logit.operation == "sigmoid" or getattr(logit.detail, "activation", None) == "sigmoid":
        raise InvalidArgument(f"binary_cross_entropy({logit.name}): give the logit, from before the sigmoid")
    return Node("binary_cross_entropy", (logit,), 1, Label(label))
