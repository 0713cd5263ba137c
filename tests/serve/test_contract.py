"""What the OpenAPI document promises, against thousands of requests made from it, good and bad."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served_run import ServedRun

pytestmark = [pytest.mark.engine, pytest.mark.cluster]

CASES = 400  # of an operation with a body or parameters
MOST = 2000
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
made: Counter[str] = Counter()


@pytest.fixture(scope="module")
def openapi(served: ServedRun):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("openapi")


@schema.parametrize()
@settings(
    max_examples=CASES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_server_error_and_no_answer_outside_the_contract(case: Case) -> None:
    made[case.operation.label] += 1
    case.call_and_validate(checks=CHECKS, timeout=60)


def test_there_were_as_many_as_that() -> None:
    assert made.total() >= MOST, made
