# SPDX-License-Identifier: Apache-2.0
"""The benchmark of compression comes to its end; sizes and what is left out are no matter of the machine."""

from oarlock.benchmarks.compress import measure


def test_every_case_is_told():
    result = measure(rows=50, turns=2)
    by_name = {
        (c["dim"], c["codec"], c["k"], c["rounding"], c["zstd"], c["error_feedback"]): c for c in result["cases"]
    }
    assert len(by_name) == len(result["cases"]) == 30
    for case in result["cases"]:
        assert case["encode_ns"] > 0
        assert case["decode_ns"] > 0
    assert by_name[16, "int8", 0, "nearest", 0, False]["bytes_per_row"] == 20
    assert by_name[64, "topk", 8, "nearest", 0, True]["bytes_per_row"] == 40
    assert by_name[64, "none", 0, "nearest", 0, False]["left_out"] == 0
    off = [by_name[64, c, 0, "nearest", 0, False]["left_out"] for c in ("float16", "bfloat16", "int8")]
    assert 0 < off[0] < off[1] < off[2] < 0.02
