"""What `train` and `data` may hold: a value with one meaning is converted, any other is refused."""

import pytest
import tiny
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from sharedkd import ConfigError
from sharedkd.config import load_config
from sharedkd.config.defaults import Train
from sharedkd.config.structure import settle
from sharedkd.errors import Findings

CONFIG = str(tiny.ROOT / "configs/custom_coco.py")

CONVERTED = {
    "train.max_iter=1e3": 1000,
    "train.max_iter='10'": 10,
    "train.max_iter=20.0": 20,
    "train.clip_grad_norm=5": 5.0,
    "train.clip_grad_norm='1e-3'": 0.001,
    "train.amp.enabled=1": True,
    "train.amp.enabled='false'": False,
    "train.init_sha256=12345678": "12345678",
    "train.inherit=neck": ["neck"],
    "train.eval_period=${train.checkpointer.period}": 300,
    "train.ddp.bucket_cap_mb=3": 3,  # DistributedDataParallel's own
    "train.checkpointer.max_to_keep=null": None,
    "data.short_edge=64": [64],
    "data.short_edge=['64',96]": [64, 96],
}


@pytest.mark.parametrize("override", CONVERTED)
def test_a_value_with_one_meaning_is_converted(override):
    found = OmegaConf.select(
        load_config(CONFIG, [override], without_data=True), override.partition("=")[0]
    )
    assert repr(found) == repr(CONVERTED[override])  # the type, too


REFUSED = {
    "train.max_iter=True": "train.max_iter=True: is no whole number; use a whole number of 1 or more",
    "train.amp.enabled=2": "train.amp.enabled=2: is neither true nor false; use True or False",
    "train.output_dir=1e3": "train.output_dir=1000.0: is not a name or path; write it as text",
    "train.eval_periods=3": "train.eval_periods=3: no such key; did you mean eval_period?",
    "train.eval_period=${nothing}": "train.eval_period=: cannot be read: Interpolation key 'nothing'",
    "train.max_iter=???": "train.max_iter=???: is not set; add train.max_iter=... to the command",
    "train.on_nonfinite=go": "train.on_nonfinite=go: no such name; use one of stop, skip_step",
    "train.writers=[wandb,x]": "train.writers=x: no such name; use one of wandb, mlflow",
    "data.short_edge=[64,big]": "data.short_edge='big': is no whole number",
    "data=5": "data=5: is no group of keys; use data.NAME=VALUE",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_has_none_is_refused_in_one_line(override):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIG, [override], without_data=True)
    assert str(error.value).startswith(REFUSED[override])
    assert "\n" not in str(error.value)


def test_all_mistakes_of_a_group_at_once_and_defaults_stand_in():
    findings = Findings()
    given = OmegaConf.create({"max_iter": -1, "amp": {"dtype": "int8"}, "sed": 3, "log_period": 7})
    train = settle(Train, given, "train", findings)
    assert [e.key for e in findings.errors] == ["train.max_iter", "train.amp.dtype", "train.sed"]
    assert (train["max_iter"], train["amp"]["dtype"], train["log_period"]) == (90000, None, 7)


def test_a_pair_reads_images_as_its_loader_delivers_them(tmp_path):
    """Else its teacher would see the channels in another order."""
    cfg = tiny.config("custom_coco.py")
    del cfg.model.input_format
    LazyConfig.save(cfg, str(tmp_path / "pair.yaml"))
    loaded = load_config(str(tmp_path / "pair.yaml"), without_data=True)
    assert loaded.model.input_format == "RGB"
