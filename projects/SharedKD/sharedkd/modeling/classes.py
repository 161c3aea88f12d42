"""The names of the classes that detectors were trained for, in their order."""

import json
from typing import Any, List, Optional, Sequence, Union

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from sharedkd.errors import ConfigError

__all__ = ["check_class_names", "registered_classes", "saved_classes", "some_of"]


def saved_classes(cfg: Union[DictConfig, CfgNode], unloaded: bool = False) -> Optional[List[str]]:
    """The class names in a run's saved config, or of a classic config's registered data; None if unknown.

    Args:
        unloaded: see :func:`registered_classes`.
    """
    if isinstance(cfg, CfgNode):
        return registered_classes(cfg.DATASETS.TRAIN, unloaded)
    return list(OmegaConf.select(cfg, "data.classes") or ()) or None


def registered_classes(names: Any, unloaded: bool = False) -> Optional[List[str]]:
    """The classes of one or several registered data sets; None if they are not known.

    Args:
        unloaded: read those of a COCO json that Detectron2 has not loaded yet: it sets them then.
    """
    for name in [names] if isinstance(names, str) else names or ():
        if name in MetadataCatalog:
            metadata = MetadataCatalog.get(name)
            known = metadata.get("thing_classes")
            return _of_json(metadata) if unloaded and known is None else known
    return None


def _of_json(metadata: Metadata) -> Optional[List[str]]:
    """The classes of a registered COCO json in Detectron2's order."""
    path = metadata.get("json_file")
    if metadata.get("evaluator_type") != "coco" or not path or not PathManager.isfile(path):
        return None
    try:
        with PathManager.open(path) as f:
            categories = json.load(f)["categories"]
        return [x["name"] for x in sorted(categories, key=lambda x: x["id"])]
    except (ValueError, KeyError, TypeError):  # reported where the data are read
        return None


def check_class_names(
    key: str,
    value: str,
    theirs: Sequence[str],
    ours: Sequence[str],
    otherwise: str = "use another model",
) -> None:
    """Compare the classes of a model that was trained elsewhere with those of the data.

    Args:
        key, value: the config key that names the model, and what it holds.
        theirs, ours: class names of the model and of the data, in order.
        otherwise: the second remedy.

    Raises:
        ConfigError: they differ, or have another order.
    """
    if list(theirs) == list(ours):
        return
    how = "in another order" if sorted(theirs) == sorted(ours) else "with other names"
    raise ConfigError(
        key,
        value,
        f"was trained for the classes {some_of(theirs)}, the data have {some_of(ours)}: {how}",
        f"give the categories of the json the ids that they had there, or {otherwise}",
    )


def some_of(names: Sequence[str]) -> str:
    """Names for a message, the first ten of them."""
    return ", ".join(names[:10]) + ", ..." * (len(names) > 10)
