"""The tiny data set of the whole-run tests."""

from e2e.conftest import train, workspace  # noqa: F401
