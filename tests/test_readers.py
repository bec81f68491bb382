"""Any bytes give a value or one line, whichever file they stand in; see reader_cases.py."""

import random

import pytest

from tests.reader_cases import Bench, readers

hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

READERS = readers()
EACH = settings(  # derandomize: the same inputs in every run
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module", params=READERS, ids=[reader.name for reader in READERS])
def bench(request, tmp_path_factory):
    """A reader with its valid file, in the current folder."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Bench(request.param, folder)


@EACH
@given(data=st.binary(max_size=2000))
def test_any_bytes_give_a_value_or_one_line(bench, data):
    bench.try_one(data)


@EACH
@given(seed=st.integers(0, 2**32))
def test_a_damaged_file_gives_a_value_or_one_line(bench, seed):
    bench.try_one(bench.damaged(random.Random(seed)))
