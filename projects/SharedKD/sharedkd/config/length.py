"""The length of a run: iterations, or epochs of its own data."""

from typing import List, Optional

from omegaconf import DictConfig, OmegaConf

from sharedkd.errors import ConfigError

from .defaults import TRAIN_DEFAULTS

__all__ = ["alone", "images_per_step", "settle_length"]

_OTHER = {"train.epochs": "train.max_iter", "train.max_iter": "train.epochs"}
_TIMES, _LEAST = 10, 100  # how often an open period comes in a run, and its least length


def alone(override: str) -> List[str]:
    """The overrides for one ``key=value``: a length takes the place of one in the other unit.

    >>> alone("train.epochs=50")
    ['train.max_iter=null', 'train.epochs=50']
    """
    key, _, value = override.partition("=")
    other = _OTHER.get(key) if value not in ("null", "None") else None
    return [f"{other}=null", override] if other else [override]


def images_per_step(cfg: DictConfig) -> Optional[int]:
    """Images per step of all processes together; None: the loader does not say."""
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    return batch * cfg.train.accumulate if isinstance(batch, int) else None


def settle_length(cfg: DictConfig, images: Optional[int]) -> None:
    """Replace ``train.epochs`` by its iterations, and periods that are open by a tenth of the run, at least 100.

    Args:
        images: of the training data; 0: they could not be read; None: they are not own data.

    Raises:
        ConfigError: the length is not given, given twice, or cannot be counted.
    """
    try:
        _settle_iterations(cfg, images)
    finally:  # so that other errors can be found, too
        period = max(cfg.train.max_iter // _TIMES, _LEAST)
        if cfg.train.eval_period is None:
            cfg.train.eval_period = period
        if cfg.train.checkpointer.period is None:
            cfg.train.checkpointer.period = period


def _settle_iterations(cfg: DictConfig, images: Optional[int]) -> None:
    train, epochs = cfg.train, cfg.train.epochs
    if epochs is not None:
        train.epochs, batch = None, images_per_step(cfg)
        if train.max_iter is not None:
            problem = f"and train.max_iter={train.max_iter} are both the length of the run"
            raise ConfigError("train.epochs", epochs, problem, "set one of them to None")
        train.max_iter = TRAIN_DEFAULTS["max_iter"]
        if images is None or batch is None:
            problem = "is for own data, whose images are counted"
            raise ConfigError("train.epochs", epochs, problem, "use train.max_iter")
        if images:
            train.max_iter = max(round(epochs * images / batch), 1)
    elif train.max_iter is None:
        train.max_iter = TRAIN_DEFAULTS["max_iter"]
        fix = "set it, or train.epochs of own data"
        raise ConfigError("train.max_iter", None, "the run has no length", fix)
