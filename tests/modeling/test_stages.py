"""When a stage is on and how much it weighs, at every boundary, by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert weights(**options) == expected


def test_fractions_follow_the_length_of_the_run():
    half = stage(start=0.5)
    assert [half.weight_at(i, 100) for i in (49, 50)] == [0, 1]
    assert [half.weight_at(i, 9000) for i in (4499, 4500)] == [0, 1]


def test_fractions_are_rounded_to_the_nearest_iteration():
    # 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996
    assert sum(weights(max_iter=100, end=0.07)) == 7
    assert sum(weights(max_iter=100, end=0.29)) == 29
    assert weights(start=0.26) == [0, 0, 0] + [1] * 7


BAD = {
    "weight": dict(weight=-1.0),
    "start": dict(start=-1),
    "ramp": dict(ramp=-0.1),
    "end": dict(end=-5),
    "decay": dict(decay=-1),
}


@pytest.mark.parametrize("name", BAD)
def test_negative_values(name):
    with pytest.raises(ConfigError, match=rf"^key\.{name}=-.* negative"):
        stage(**BAD[name]).check("key")


def test_not_a_number():
    with pytest.raises(ConfigError, match=r"^key\.weight=nan: "):
        stage(weight=math.nan).check("key")


@pytest.mark.parametrize(
    "times", [dict(start=5, end=5), dict(start=5, end=4), dict(start=0.5, end=0.3)]
)
def test_end_that_is_not_after_the_start(times):
    with pytest.raises(
        ConfigError, match=rf"^key\.end={times['end']}: is not after start={times['start']};"
    ):
        stage(**times).check("key")


times = st.one_of(
    st.integers(-2, 30), st.floats(-0.2, 1.5), st.sampled_from([math.nan, math.inf, "soon", None])
)


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(
    st.one_of(
        st.floats(0, 5, allow_subnormal=False),
        st.sampled_from([math.nan, math.inf, -1.0, "much", None, True]),
    ),
    times,
    times,
    times,
    st.integers(1, 30),
)
def test_a_stage_is_refused_or_on_within_its_span_alone(weight, start, ramp, end, max_iter):
    stage = Stage(CrossLayer(), weight, start, ramp, end)
    try:
        stage.check("key")
    except ConfigError:
        return
    found = [stage.weight_at(i, max_iter) for i in range(max_iter)]
    assert all(0 <= w <= weight for w in found)
    first, last = stage.span(max_iter)
    assert [i for i, w in enumerate(found) if w > 0] == list(range(first, last))
    on = found[first:last]
    assert on == sorted(on)  # it only grows
