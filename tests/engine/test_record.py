"""run.json, read."""

import hashlib
from pathlib import Path

import pytest

import sharedkd
from sharedkd.engine.hooks.record import read_record, versions
from sharedkd.errors import ConfigError


def test_a_record_that_is_there_or_not(tmp_path):
    assert read_record(tmp_path) == {}
    (tmp_path / "run.json").write_text('{"iterations": 3}')
    assert read_record(tmp_path) == {"iterations": 3}


@pytest.mark.parametrize("content", ['{"iterations"', "", "\x00"])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json=.*run\.json: cannot be read: .*delete it"):
        read_record(tmp_path)


def test_the_version_tells_apart_states_of_any_file_of_the_package():
    files = sorted(Path(sharedkd.__file__).parent.rglob("*.py"))
    assert any(path.parent.name == "losses" for path in files)
    content = b"".join(path.read_bytes() for path in files)
    assert versions()["sharedkd"] == hashlib.sha256(content).hexdigest()[:8]
