# SPDX-License-Identifier: Apache-2.0
"""A model in parts whose servers speak TLS, asked as from other machines: hedging waits for several encrypted answers at once."""

import numpy as np
import pytest
from fleet_rig import Asked, both, check
from security_rig import Authority, from_elsewhere, opened, texts_of, tls_fields, write_tokens

from oarlock.proto.rpc.tls_socket import TlsSocket


@pytest.fixture
def secured(tmp_path):
    """What servers go by, and what a client gives."""
    fields = tls_fields(tmp_path, Authority(tmp_path))
    path = write_tokens(tmp_path / "tokens")
    mine = write_tokens(tmp_path / "read", f'read = "{texts_of(path)["read"]}"')
    return opened(token_file=path, **fields), opened(token_file=mine, tls_ca=fields["tls_ca"])


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "grpc"])
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_rows_come_whole_and_who_hangs_is_passed_by(model, servers, kind, frames, secured, monkeypatch):
    security, reader = secured
    far = from_elsewhere(monkeypatch)
    fleet = servers.parts(model.store, 2, replicas=2, security=security)
    with Asked(kind, [each.address for each in fleet], frames=frames, security=reader) as client:
        for some in np.array_split(np.tile(model.keys, 4), 40):
            check(client.lookup(both(some)), model, some, 1)
        # Large enough for many records of TLS.
        many = np.resize(model.keys, 20_000)
        check(client.lookup(both(many)), model, many, 1)
        favourites = [max(fleet[:2], key=lambda each: each.service.lookups)]
        favourites += [max(fleet[2:], key=lambda each: each.service.lookups)]
        for each in favourites:
            each.service.go.clear()
        for _ in range(30):
            check(client.lookup(both(model.keys)), model, model.keys, 1)
        assert 2 <= client.counts.hedges_won <= client.counts.hedges <= 20
        for each in favourites:
            each.stop()
        for _ in range(30):
            check(client.lookup(both(model.keys)), model, model.keys, 1)
    assert bool(far) == frames
    assert all(isinstance(each, TlsSocket) for each in far)
