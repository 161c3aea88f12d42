"""What `train` and `data` may hold: a value with one meaning is converted, any other is refused."""

import pytest
import tiny
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from sharedkd import ConfigError
from sharedkd.config import load_config
from sharedkd.config.defaults import Data, Train
from sharedkd.config.structure import settle
from sharedkd.errors import Findings


def settled(key, value):
    """What becomes of one value, and the errors."""
    findings = Findings()
    group, _, name = key.partition(".")
    given = OmegaConf.create({})
    OmegaConf.update(given, name, value)
    found = settle({"train": Train, "data": Data}[group], given, group, findings)
    return OmegaConf.select(OmegaConf.create(found), name), findings.errors


CONVERTED = [
    ("train.max_iter", 1e3, 1000),
    ("train.max_iter", "10", 10),
    ("train.max_iter", "1e3", 1000),
    ("train.clip_grad_norm", 5, 5.0),
    ("train.clip_grad_norm", "1e-3", 0.001),
    ("train.amp.enabled", 1, True),
    ("train.amp.enabled", "false", False),
    ("train.init_sha256", 12345678, "12345678"),
    ("train.inherit", "neck", ["neck"]),
    ("train.ddp.bucket_cap_mb", 3, 3),  # DistributedDataParallel's own
    ("train.checkpointer.max_to_keep", None, None),
    ("data.short_edge", 64, [64]),
    ("data.short_edge", ["64", 96.0], [64, 96]),
]


@pytest.mark.parametrize("key,value,expected", CONVERTED)
def test_a_value_with_one_meaning_is_converted(key, value, expected):
    found, errors = settled(key, value)
    assert errors == [] and repr(found) == repr(expected)  # the type, too


REFUSED = [
    ("train.max_iter", True, "=True: is no whole number; use a whole number of 1 or more"),
    ("train.max_iter", 1.5, "=1.5: is no whole number"),
    ("train.clip_grad_norm", "nan", "=nan: is not finite; use a number above 0, or null"),
    ("train.amp.enabled", 2, "=2: is neither true nor false; use True or False"),
    ("train.output_dir", 1e3, "=1000.0: is not a name or path; write it as text"),
    ("train.eval_periods", 3, "=3: no such key; did you mean eval_period?"),
    ("train.on_nonfinite", "go", "=go: no such name; use one of stop, skip_step"),
    ("train.writers", ["wandb", "x"], "=x: no such name; use one of wandb, mlflow"),
    ("train.inherit", {"neck": True}, "={'neck': True}: is no list; use [], [A] or [A,B]"),
    ("data.short_edge", [64, "big"], "='big': is no whole number"),
    ("train.checkpointer", 5, "=5: is no group of keys; use train.checkpointer.NAME=VALUE"),
]


@pytest.mark.parametrize("key,value,words", REFUSED)
def test_what_has_none_is_refused_in_one_line(key, value, words):
    _, (error,) = settled(key, value)
    assert str(error).startswith(key + words) and "\n" not in str(error)


def test_all_mistakes_of_a_group_at_once_and_defaults_stand_in():
    findings = Findings()
    wrong = {"max_iter": -1, "amp": {"dtype": "int8"}, "sed": 3, "log_period": 7, "writers": 0}
    train = settle(Train, OmegaConf.create(wrong), "train", findings)
    keys = ["train.max_iter", "train.amp.dtype", "train.sed", "train.writers"]
    assert [e.key for e in findings.errors] == keys
    assert (train["max_iter"], train["amp"]["dtype"], train["log_period"]) == (90000, None, 7)
    assert train["writers"] == []


def test_values_may_refer_to_keys_that_a_config_leaves_out(tmp_path):
    """A pair also reads images as its loader delivers them: else its teacher would see other colours."""
    cfg = tiny.config("custom_coco.py")
    del cfg.model.input_format, cfg.train.max_iter, cfg.train.epochs
    LazyConfig.save(cfg, str(tmp_path / "pair.yaml"))
    period = ["train.eval_period=${train.max_iter}"]
    loaded = load_config(str(tmp_path / "pair.yaml"), period, without_data=True)
    assert loaded.train.eval_period == loaded.train.max_iter == 90000
    assert loaded.model.input_format == "RGB"
    wrong = ["train.eval_period=${nothing}", "train.max_iter=???"]
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "pair.yaml"), wrong, without_data=True)
    assert [str(e) for e in error.value.errors] == [
        "train.max_iter=???: is not set; add train.max_iter=... to the command",
        "train.eval_period=: cannot be read: Interpolation key 'nothing' not found; correct this key",
    ]
