# SPDX-License-Identifier: Apache-2.0
"""The benchmark of row caches in whole jobs: its data, how it reads pages, and, slow, that it comes to its end."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from oarlock.benchmarks import cache_job
from oarlock.benchmarks.cache_job import BOUNDS, HOT, HOT_BOUNDS, SCALES, SIZES, busiest, generate, measure


def test_a_tenth_of_the_samples_has_the_hot_value(tmp_path):
    generate(tmp_path / "clicks", 4000, test=500)
    generate(tmp_path / "hot", 4000, hot=HOT)
    shares = []
    for name in ("clicks", "hot"):
        train = pq.read_table(tmp_path / name / "train.parquet")
        shares.append(float((train["f0"].to_numpy() == SIZES[0] - 1).mean()))
        assert 0.2 < train["label"].to_numpy().mean() < 0.8
    assert shares[0] < 0.01
    assert abs(shares[1] - HOT) < 0.03
    assert pq.read_table(tmp_path / "clicks" / "test.parquet").num_rows == 500
    assert not (tmp_path / "hot" / "test.parquet").exists()


def test_samples_of_one_name_and_method_are_added_up(monkeypatch):
    page = b"""# HELP oarlock_a_total x
oarlock_a_total{worker="0",table="t"} 3
oarlock_a_total{worker="0",table="u"} 4
oarlock_rpc_client_sent_bytes_total{method="Shard.Pull"} 1e+06
oarlock_rpc_client_sent_bytes_total{method="Shard.Push"} 5
oarlock_b 0.5
"""

    class Page:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self):
            return page

    monkeypatch.setattr(cache_job.urllib.request, "urlopen", lambda *_, **__: Page())
    assert cache_job.scraped("host:1") == {
        "oarlock_a_total": 7.0,
        "oarlock_rpc_client_sent_bytes_total:Shard.Pull": 1e6,
        "oarlock_rpc_client_sent_bytes_total:Shard.Push": 5.0,
        "oarlock_b": 0.5,
    }


def test_the_busiest_shard_is_the_one_that_sends_most():
    shards = [{"asked": 100, "sent": 100, "pull_seconds": 2e-3}, {"asked": 300, "sent": 120, "pull_seconds": 1e-3}]
    assert np.allclose(busiest({"shards": shards}), (0.3, 5.0))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_case_comes_to_its_end(tmp_path):
    result = measure(SCALES["tiny"], tmp_path)
    assert [job["bound"] for job in result["jobs"]] == [None, *BOUNDS]
    assert all(0.5 < job["auc"] < 1 for job in result["jobs"])
    assert result["jobs"][0]["hit_rate"] == 0
    assert result["jobs"][-1]["hit_rate"] > 0
    assert all(result["hot_key_cut"][str(bound)] > 1.3 for bound in HOT_BOUNDS)
