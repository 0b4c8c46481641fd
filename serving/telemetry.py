# SPDX-License-Identifier: Apache-2.0
"""What a serving process lets be observed, read off its own counters at a scrape. Called from the thread of the page."""

from typing import Any

from oarlock.serving.follow import Following
from oarlock.serving.fronting import InFront
from oarlock.serving.http_server import HttpServer
from oarlock.serving.models import Models
from oarlock.serving.rest import Rest
from oarlock.serving.service import ServingService
from oarlock.telemetry.registry import Source


def serving_source(service: ServingService) -> Source:
    """Return the source of the metrics of ``service``."""

    def source() -> dict[str, Any]:
        serving = service.serving
        found: dict[str, Any] = {
            "oarlock_serving_ready": int(serving.ready),
            "oarlock_serving_pinned": int(serving.pinned),
            "oarlock_serving_problem": int(bool(serving.problem)),
            "oarlock_serving_swaps_total": serving.swaps,
            "oarlock_serving_failed_loads_total": serving.failures,
            "oarlock_serving_load_seconds": serving.load_seconds,
            "oarlock_serving_lookup_seconds": service.lookup_seconds,
            "oarlock_serving_nearest_seconds": service.nearest_seconds,
            "oarlock_serving_asked_keys_total": service.asked.copy(),
            "oarlock_serving_missing_keys_total": service.missing.copy(),
        }
        if isinstance(serving, Following):
            found |= {
                "oarlock_serving_freshness_seconds": serving.freshness,
                "oarlock_serving_followed_rows_total": serving.counts.rows,
                "oarlock_serving_followed_tombstones_total": serving.counts.tombstones,
                "oarlock_serving_followed_bytes_total": serving.counts.bytes,
                "oarlock_serving_followed_whole_blocks_total": serving.counts.whole_blocks,
                "oarlock_serving_recall_lag_seconds": serving.recall_lags,
                "oarlock_serving_recall_waiting_keys": {n: each.waiting for n, each in serving.indexes.items()},
                "oarlock_serving_recall_rebuilds_total": {n: each.rebuilds for n, each in serving.indexes.items()},
            }
        if isinstance(serving, InFront):
            counts = serving.servers.counts
            found |= {
                "oarlock_serving_hedges_total": counts.hedges,
                "oarlock_serving_hedges_won_total": counts.hedges_won,
                "oarlock_serving_failovers_total": counts.failovers,
            }
        if serving.ready:
            snapshot = serving.current
            found |= {
                "oarlock_serving_run": snapshot.version.run,
                "oarlock_serving_cut": snapshot.version.cut,
                "oarlock_serving_age_seconds": snapshot.version.age(),
                "oarlock_serving_rows": {name: table.rows for name, table in snapshot.tables.items()},
                "oarlock_serving_table_bytes": {name: table.nbytes for name, table in snapshot.tables.items()},
            }
        return found

    return source


def prediction_source(models: Models) -> Source:
    """Return the source of the metrics of predictions, if there are any."""

    def source() -> dict[str, Any]:
        predictor = models.predictor
        if predictor is None:
            return {}
        batcher = predictor.batcher
        return {
            "oarlock_serving_prediction_seconds": predictor.seconds,
            "oarlock_serving_predicted_samples_total": predictor.samples,
            "oarlock_serving_batch_samples": batcher.batch_samples,
            "oarlock_serving_waiting_samples": batcher.waiting,
            "oarlock_serving_overloaded_total": batcher.overloaded,
        }

    return source


def http_source(server: HttpServer, rest: Rest) -> Source:
    """Return the source of what was asked over HTTP."""

    def source() -> dict[str, Any]:
        return {
            "oarlock_serving_http_responses_total": {str(status): n for status, n in server.answered.copy().items()},
            "oarlock_serving_http_connections": server.connections,
            "oarlock_serving_http_denied_total": dict(rest.denied.copy()),
        }

    return source
