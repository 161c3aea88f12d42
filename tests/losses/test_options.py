"""A number of a loss that cannot be meant is refused when the loss is built, with its key."""

import inspect
import math

import pytest

from sharedkd import losses
from sharedkd.errors import ConfigError

POSITIVE = [
    (losses.CWD, "temperature"),
    (losses.DKD, "temperature"),
    (losses.FGD, "temperature"),
    (losses.FKD, "temperature"),
    (losses.SemCKD, "temperature"),
    (losses.FeatureFusion, "fit"),
    (losses.GanKD, "discriminator"),
    (losses.GanKD, "hidden"),
    (losses.GanKD, "layers"),
]


def required(loss):
    """A loss's weights without a default, all one."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: 1.0 for p in parameters if p.default is p.empty}


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "1", True, None], ids=repr)
@pytest.mark.parametrize("loss, key", POSITIVE, ids=lambda x: getattr(x, "__name__", x))
def test_numbers_above_zero(loss, key, value):
    with pytest.raises(ConfigError, match=rf"^{key}={value!r}: .*use a (whole )?number (of|above)"):
        loss(**{**required(loss), key: value})


@pytest.mark.parametrize("loss, key", POSITIVE, ids=lambda x: getattr(x, "__name__", x))
def test_such_numbers_are_taken(loss, key):
    assert getattr(loss(**{**required(loss), key: 2}), key) == 2
