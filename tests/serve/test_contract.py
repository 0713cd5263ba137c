"""What the OpenAPI document promises, against thousands of requests made from it, good and bad."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served_run import ServedRun

pytestmark = [pytest.mark.engine, pytest.mark.cluster]

CASES = 200  # good and as many bad ones of each operation
MOST = 2000
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def test_no_server_error_and_no_answer_outside_the_contract(served: ServedRun) -> None:
    contract = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    made: Counter[str] = Counter()
    for found in contract.get_all_operations():
        operation = found.ok()
        # Half of what a body may be is what it must not be.
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _check(operation, mode, made)
    assert made.total() >= MOST, made


def _check(operation: APIOperation, mode: GenerationMode, made: Counter[str]) -> None:
    @settings(
        max_examples=CASES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        made[f"{operation.label} {mode.value}"] += 1
        case.call_and_validate(checks=CHECKS, timeout=60)

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong about a GET without parameters
        check()
