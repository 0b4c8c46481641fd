# SPDX-License-Identifier: Apache-2.0
"""The benchmark of look-ups over TLS comes to its end, leaves nothing behind, and goes by TCP where it says so."""

from typing import Any

import pytest

from oarlock.benchmarks.by_tcp import as_from_another_machine
from oarlock.benchmarks.serving_tls import BY, SIZES_OF_REQUESTS
from oarlock.proto.rpc import sockets


@pytest.mark.slow
def test_it_comes_to_its_end(run_tiny: Any) -> None:
    result, _ = run_tiny("serving_tls")
    assert result["failed"] == 0
    sizes = {str(n) for n in SIZES_OF_REQUESTS}
    for name in ("tls_vs_none", "tls_vs_none_rows_per_second"):
        assert set(result[name]) == set(BY)
        assert all(set(each) == sizes and min(each.values()) > 0 for each in result[name].values())
    assert set(result["frames_vs_grpc_tls"]) == sizes


def test_sockets_of_this_machine_are_left_alone_for_a_while() -> None:
    connect = sockets.connect
    with as_from_another_machine(), pytest.raises(ConnectionRefusedError):
        sockets.connect(sockets.ABSTRACT + "any", "127.0.0.1:1")
    assert sockets.connect is connect
