"""The names of classes of models that were trained elsewhere."""

import pytest

from sharedkd.errors import ConfigError
from sharedkd.modeling.classes import check_class_names


def test_other_orders_are_refused():
    check_class_names("k", "v", ["red", "green"], ("red", "green"))
    with pytest.raises(
        ConfigError, match="k=v: .* red, green, the data have green, red: in another order"
    ):
        check_class_names("k", "v", ["red", "green"], ["green", "red"])
    with pytest.raises(ConfigError, match="with other names"):
        check_class_names("k", "v", ["red", "green"], ["green", "blue"])
