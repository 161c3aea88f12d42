"""The pages under test, and the tiny data set of the whole-run tests."""

import re

import pytest
import tiny
from e2e.conftest import workspace  # noqa: F401


@pytest.fixture(scope="session")
def blocks():
    """(page, language) -> its code blocks of that language."""

    def read(page, language):
        text = (tiny.ROOT / "docs" / page).read_text()
        return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)

    return read
