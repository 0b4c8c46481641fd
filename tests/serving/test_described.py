# SPDX-License-Identifier: Apache-2.0
"""What the HTTP side says of itself is true: Schemathesis reads the process's own OpenAPI document, and asks what it allows, and
what it does not."""

import contextlib
from functools import partial
from typing import Any

import pytest
from http_rig import Http
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from predict_rig import Job
from serving_rig import served

from oarlock.proto.security import Security, SecuritySpec
from oarlock.serving.rest import ROUTES

schemathesis = pytest.importorskip(
    "schemathesis", reason="pip install schemathesis: the HTTP side is not driven by its document"
)

# Of each operation and mode.
INPUTS = 500
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = Job("dlrm", tmp_path_factory.mktemp("dlrm"))
    security = Security(SecuritySpec(read_requests_per_second=0.0))
    yield from served(partial(Http, security=security), job.store, job.predictor())


def drive(operation: Any, url: str, mode: str, most: int, models: list[str]) -> dict[int, int]:
    """Ask an operation ``most`` things, every other one of a model that there is; return how many answers had each status."""
    strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]
    told: dict[int, int] = {}

    @seed(1)
    @settings(
        max_examples=most,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(case=strategy)
    def ask(case: Any) -> None:
        if "name" in case.path_parameters and sum(told.values()) % 2:
            case.path_parameters["name"] = models[sum(told.values()) // 2 % len(models)]
        response = case.call(base_url=url, timeout=20)
        told[response.status_code] = told.get(response.status_code, 0) + 1
        case.validate_response(response, checks=checks)

    # What takes nothing cannot be asked wrongly.
    with contextlib.suppress(Unsatisfiable):
        ask()
    return told


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_answers_are_those_of_the_document(http: Http, mode: str) -> None:
    """Every status, header and body is one that the document has, whether what was asked is allowed or not."""
    url = f"http://{http.address}"
    schema = schemathesis.openapi.from_url(f"{url}/v2/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    # All but the document, which was asked for already.
    assert len(operations) == len(ROUTES) - 1
    models = http.json("GET", "/v2")[1]["models"]
    for operation in operations:
        most = INPUTS if operation.method == "post" else INPUTS // 10
        found = drive(operation, url, mode, most, models)
        print(operation.label, found)
        assert found or mode == "negative"
