"""JSON that every reader takes."""

import json
import math
from typing import Any, Mapping

__all__ = ["strict_json"]


def strict_json(value: Any) -> bytes:
    """``value`` as indented JSON with null for the floats that JSON does not have."""
    return (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
