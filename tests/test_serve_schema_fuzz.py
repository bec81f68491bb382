"""Requests made from the server's own description: every answer is one that it describes.

SCHEMA_EXAMPLES=1000 python -m pytest -s tests/test_serve_schema_fuzz.py      # a long run
"""

import os
from collections import Counter

import pytest

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
pytest.importorskip("PIL", reason="pip install pillow")
schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

import serve  # noqa: E402
from tests.searching import make_finder, write_photos  # noqa: E402
from tests.serving import WHOLE, in_thread  # noqa: E402
from util.connections import ConnectionLimits  # noqa: E402

NEGATIVE = schemathesis.GenerationMode.NEGATIVE
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", 12))  # of each route
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
]


def test_every_answer_is_one_that_is_described(tiny_positions):
    schemathesis.checks.load_all_checks()
    checks = [schemathesis.checks.CHECKS.get_one(name) for name in CHECKS]
    got = Counter()
    write_photos()
    finder = make_finder(WHOLE, photos="photos")
    with in_thread(serve.Limits(), ConnectionLimits(), finder) as (port, _):
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        for found in schema.get_all_operations():
            route = found.ok()

            @seed(0)
            @given(case=route.as_strategy() | route.as_strategy(NEGATIVE))
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def ask(case):
                reply = case.call()
                got[case.path, reply.status_code] += 1
                case.validate_response(reply, checks=checks)

            ask()
    for (path, status), count in sorted(got.items()):
        print(f"{path}: {count} x {status}")
    assert {path for path, _ in got} >= {"/health", "/api/search", "/scan_sentence_image_score"}
