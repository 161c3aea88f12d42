"""The pages under test, and the tiny data set of the whole-run tests."""

import importlib.util
import re
import sys

import pytest
import tiny
from e2e.conftest import workspace  # noqa: F401

DOCS = tiny.ROOT / "docs"


@pytest.fixture(scope="session")
def generate():
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def blocks():
    """(page, language) -> its code blocks of that language."""

    def read(page, language):
        text = (DOCS / page).read_text()
        return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)

    return read
