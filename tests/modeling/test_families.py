"""Every family of detectors as student and as teacher; docs/families.md says what comes of it."""

import families
import pytest


@pytest.mark.parametrize("name", families.QUICK)
def test_rows_do_what_the_page_says(name):
    row = families.BY_NAME[name]
    found = families.outcomes(row)
    assert families.line(name) == f"| {name} | {' | '.join(map(str, found))} |"
    messages = [message for x in found for message in x.refused.values()]
    text = families.PAGE.read_text()
    assert all(message.partition(": ")[2] in text and "\n" not in message for message in messages)


@pytest.mark.nightly
def test_the_page_is_what_all_rows_do():
    """Write it anew with: .venv/bin/python tests/families.py"""
    found = {row.name: families.outcomes(row) for row in families.ROWS}
    assert families.page(found) == families.PAGE.read_text()
