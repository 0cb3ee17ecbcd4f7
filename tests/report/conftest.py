"""The runs that tests of the report read."""

import pytest

from report_runs import write_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs"))
