"""What a run takes, in words."""

import pytest

from sharedkd.engine.hooks.cost import in_words


@pytest.mark.parametrize(
    "seconds, steps, words",
    [
        (0.25, 90_000, "0.25 s a step on a CPU, about 6.2 h"),
        (2, 600, "2 s a step on a CPU, about 20 min"),
        (0.1234, 100, "0.123 s a step on a CPU, about 12 s"),
    ],
)
def test_the_unit_suits_the_length(seconds, steps, words):
    said = in_words(seconds, steps, 1234.4, "a CPU")
    assert said == f"measured: {words} without evaluations; 1234 MB at the peak"
