"""When a stage is on and how much it weighs, at every boundary, by hand."""

import math

import pytest

from sharedkd.errors import ConfigError
from sharedkd.losses import CrossLayer
from sharedkd.modeling.stages import Stage


def stage(**options):
    return Stage(CrossLayer(), **options)


def weights(max_iter=10, **options):
    it = stage(**options)
    return [it.weight_at(i, max_iter) for i in range(max_iter)]


BY_HAND = {
    "always": (dict(weight=2.0), [2] * 10),
    "start": (dict(weight=2.0, start=3), [0, 0, 0, 2, 2, 2, 2, 2, 2, 2]),
    "end is exclusive": (dict(weight=2.0, end=4), [2, 2, 2, 2, 0, 0, 0, 0, 0, 0]),
    "one iteration": (dict(weight=2.0, start=4, end=5), [0, 0, 0, 0, 2, 0, 0, 0, 0, 0]),
    "ramp": (dict(weight=2.0, ramp=4), [0.5, 1, 1.5, 2, 2, 2, 2, 2, 2, 2]),
    "ramp of one": (dict(weight=2.0, ramp=1), [2] * 10),
    "ramp from the start": (
        dict(weight=2.0, start=2, ramp=4, end=8),
        [0, 0, 0.5, 1, 1.5, 2, 2, 2, 0, 0],
    ),
    "ended within the ramp": (
        dict(weight=2.0, start=2, ramp=4, end=4),
        [0, 0, 0.5, 1, 0, 0, 0, 0, 0, 0],
    ),
    "fractions": (
        dict(weight=2.0, start=0.2, ramp=0.4, end=0.8),
        [0, 0, 0.5, 1, 1.5, 2, 2, 2, 0, 0],
    ),
    "mixed": (dict(weight=2.0, start=1, end=0.5), [0, 2, 2, 2, 2, 0, 0, 0, 0, 0]),
    "1 is an iteration": (dict(weight=2.0, start=1), [0] + [2] * 9),
    "1.0 is the whole run": (dict(weight=2.0, start=1.0), [0] * 10),
    "ended at 1.0": (dict(weight=2.0, end=1.0), [2] * 10),
    "decay to the end of the run": (dict(weight=2.0, decay=4), [2, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5]),
    "decay to the end of the stage": (
        dict(weight=2.0, decay=0.2, end=6),
        [2, 2, 2, 2, 2, 1, 0, 0, 0, 0],
    ),
    "weight zero": (dict(weight=0.0), [0] * 10),
    "off from the first iteration": (dict(weight=2.0, end=0.0), [0] * 10),
}


@pytest.mark.parametrize("options, expected", BY_HAND.values(), ids=BY_HAND)
def test_weight_at_every_iteration(options, expected):
    stage(**options).check("key")
    found = weights(**options)
    assert found == expected
    on = range(*stage(**options).span(10)) if options["weight"] else ()
    assert [i for i, w in enumerate(found) if w] == [*on]


def test_fractions_follow_the_length_of_the_run():
    half = stage(start=0.5)
    assert [half.weight_at(i, 100) for i in (49, 50)] == [0, 1]
    assert [half.weight_at(i, 9000) for i in (4499, 4500)] == [0, 1]


def test_fractions_are_rounded_to_the_nearest_iteration():
    # 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996
    assert sum(weights(max_iter=100, end=0.07)) == 7
    assert sum(weights(max_iter=100, end=0.29)) == 29
    assert weights(start=0.26) == [0, 0, 0] + [1] * 7


@pytest.mark.parametrize("name", ["weight", "start", "ramp", "end", "decay"])
def test_what_is_no_weight_or_time(name):
    for value, words in ((-0.1, "negative"), (math.nan, "not finite"), ("soon", "is no ")):
        with pytest.raises(ConfigError, match=rf"^key\.{name}='?{value}'?: .*{words}"):
            stage(**{name: value}).check("key")


@pytest.mark.parametrize(
    "times", [dict(start=5, end=5), dict(start=5, end=4), dict(start=0.5, end=0.3)]
)
def test_end_that_is_not_after_the_start(times):
    with pytest.raises(
        ConfigError, match=rf"^key\.end={times['end']}: is not after start={times['start']};"
    ):
        stage(**times).check("key")
