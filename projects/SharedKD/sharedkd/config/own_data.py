"""The group `data`: own data in COCO format, read, repaired and registered."""

import os
from contextlib import suppress
from typing import Any, Dict, List, Mapping, Optional, Set, Union

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    get_detection_dataset_dicts,
)
from omegaconf import DictConfig, ListConfig, OmegaConf

from sharedkd.data.coco import CocoData, CocoSummary, read_classes, read_coco
from sharedkd.data.images import ImageMapper
from sharedkd.data.loader import build_train_loader
from sharedkd.data.notes import Reading
from sharedkd.data.unlabelled import read_unlabelled, register_unlabelled
from sharedkd.errors import FAILED, ConfigError, Findings
from sharedkd.modeling.classes import registered_classes, saved_classes

from .build import makes, target_of
from .classic import build_loader

__all__ = [
    "add_unlabelled",
    "class_names",
    "has_own_data",
    "read_own_data",
    "reading_of",
]


def has_own_data(cfg: DictConfig) -> bool:
    """Whether the labelled data are those of ``cfg.data``; if not, it is there for images without labels."""
    data = cfg.data
    named = {name for split in ("train", "test") for name in _names(cfg, split)}
    ours = {f"{data.name}_train", f"{data.name}_val"}
    return bool(data.train_json or data.val_json or not named or named & ours)


def _names(cfg: DictConfig, split: str) -> List[str]:
    """The names of the registered data sets of a loader, ``train`` or ``test``."""
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
    return [names] if isinstance(names, str) else list(names or ())


def read_own_data(cfg: DictConfig, findings: Findings) -> Dict[str, List[CocoSummary]]:
    """Read and register the data of ``cfg.data``, and count its classes.

    Sets ``data.num_classes``, to which the model refers (80 if no file says it), and ``data.classes``,
    their names, which are saved with the run.

    Args:
        cfg: the whole config; its loaders' mappers say how images are read.
        findings: receives the errors in the data, and a warning for each kind of repair.

    Returns:
        ``train`` and ``test`` -> a summary of each file; FAILED for a file that is no COCO json.
    """
    train = findings.step(_read, cfg, "train", findings)
    classes = train.categories if train is not FAILED else None
    val = findings.step(_read, cfg, "val", findings, classes)
    if FAILED not in (train, val):
        _warn_of_overlap(train, val, findings)
    if train is not FAILED:
        findings.step(_weigh_pseudo, cfg, train)
    found = [x for x in (train, val) if x is not FAILED and x.categories]
    given = cfg.data.get("num_classes")
    if found and given not in (None, len(found[0].classes)):
        problem = f"contradicts the {len(found[0].classes)} categories of {cfg.data.train_json}"
        fix = "leave it out: classes are counted"
        findings.add(ConfigError("data.num_classes", given, problem, fix))
    cfg.data.num_classes = len(found[0].classes) if found else 80
    cfg.data.classes = found[0].classes if found else None
    both = {"train": train, "test": val}
    return {
        split: x.files or [FAILED] if x is not FAILED else [FAILED] for split, x in both.items()
    }


def _read(
    cfg: DictConfig, split: str, findings: Findings, classes: Optional[Mapping[int, str]] = None
) -> CocoData:
    """The data of a split, registered if they have no errors."""
    data, key, images_key = cfg.data, f"data.{split}_json", f"data.{split}_images"
    files, roots = (_paths(cfg, name, findings) for name in (key, images_key))
    if not files or not roots:
        return FAILED
    if len(roots) not in (1, len(files)):
        problem = f"names {len(roots)} folders for the {len(files)} files of {key}"
        raise ConfigError(images_key, roots, problem, "name one folder, or one for each file")
    found = read_coco(
        files,
        roots if len(roots) == len(files) else roots * len(files),
        key,
        images_key,
        train=split == "train",
        classes=classes,
        reading=reading_of(cfg, split, findings),
    )
    if data.masks and not found.errors:
        found.refuse([_no_masks(x) for x in found.files if not x.has_masks])
    for error in found.errors:
        findings.add(error)
    findings.warnings += found.warnings
    if not found.errors:
        found.register(f"{data.name}_{split}")
    return found


def add_unlabelled(cfg: DictConfig, findings: Findings) -> None:
    """Read and register the images of ``data.unlabelled_images``, if it is set, and let the loader add them.

    Args:
        cfg: the whole config, whose labelled data are registered.
        findings: receives warnings of what was left out.

    Raises:
        ConfigError: see :func:`~sharedkd.data.unlabelled.read_unlabelled`; or a loader that has no place
            for them.
    """
    data, key, loader = cfg.data, "data.unlabelled_images", cfg.dataloader.train
    name = f"{data.name}_unlabelled"
    if OmegaConf.select(loader, "unlabelled.names") == name:  # of a run's saved config
        del loader["unlabelled"], loader["unlabelled_ratio"]
    if data.unlabelled_images is None:
        if data.unlabelled_json is not None:
            fix = f"add {key}=FOLDER"
            raise ConfigError("data.unlabelled_json", data.unlabelled_json, "has no folder", fix)
        return
    folders = _paths(cfg, key, findings)
    if not folders:
        return
    if data.unlabelled_json is not None and len(folders) > 1:
        problem = f"goes with one folder, and {key} names {len(folders)}"
        raise ConfigError("data.unlabelled_json", data.unlabelled_json, problem, "name one folder")
    _check_loader(cfg, key, data.unlabelled_images)
    labelled, held_out = (_images(cfg, split) for split in ("train", "test"))
    reading = reading_of(cfg, "train", findings)
    records, warnings = read_unlabelled(
        folders, data.unlabelled_json, labelled, held_out, key, "data.unlabelled_json", reading
    )
    findings.warnings += warnings
    register_unlabelled(name, records)
    loader.unlabelled = L(get_detection_dataset_dicts)(
        names="${data.name}_unlabelled", filter_empty=False
    )
    loader.unlabelled_ratio = "${data.unlabelled_ratio}"


def _images(cfg: DictConfig, split: str) -> Set[str]:
    """Absolute names of the images of the registered data sets of a loader."""
    found: Set[str] = set()
    for name in _names(cfg, split):
        if name in DatasetCatalog:
            with suppress(OSError):  # a file that is not there is reported where data are checked
                found |= {os.path.abspath(x["file_name"]) for x in DatasetCatalog.get(name)}
    return found


def _weigh_pseudo(cfg: DictConfig, train: CocoData) -> None:
    """Let the loader draw images with pseudo-labels as often as ``data.pseudo_weight`` says."""
    weight, loader = cfg.data.pseudo_weight, cfg.dataloader.train
    if weight == 1:
        return
    if not train.pseudo_files and not train.errors:
        problem, fix = "no json of data.train_json is by tools/label_images.py", "leave it out"
        raise ConfigError("data.pseudo_weight", weight, problem, fix)
    _check_loader(cfg, "data.pseudo_weight", weight)
    loader.pseudo_weight = "${data.pseudo_weight}"


def _check_loader(cfg: DictConfig, key: str, value: Any) -> None:
    """Check that the training loader is this package's, which alone reads ``key``."""
    if target_of(cfg.dataloader.train) not in (build_train_loader, build_loader):
        fix = (
            "use Detectron2's loader, without options that this package's lacks, or this package's"
        )
        raise ConfigError(key, value, "is not read by this config's dataloader.train", fix)


def _no_masks(summary: CocoSummary) -> ConfigError:
    return ConfigError(
        summary.key,
        summary.json_file,
        f"{summary.unmasked} of {summary.objects} objects have no segmentation, and data.masks is true",
        "use a config without masks, such as configs/custom_coco.py",
    )


def _paths(cfg: DictConfig, key: str, findings: Findings) -> List[str]:
    """The one or several paths of a key; none if it holds something else, which is reported."""
    value = OmegaConf.select(cfg, key)
    paths = list(value) if isinstance(value, ListConfig) else [value]
    if paths and all(isinstance(x, str) and x for x in paths):
        return paths
    findings.add(ConfigError(key, value, "is not set", f"add {key}=PATH to the command"))
    return []


def reading_of(cfg: DictConfig, split: str, findings: Findings) -> Reading:
    """How a run reads the images and annotations of a split, ``train`` or ``val``."""
    loader = "train" if split == "train" else "test"
    mapper = OmegaConf.select(cfg, f"dataloader.{loader}.mapper")
    ours = makes(mapper, ImageMapper)
    span = OmegaConf.select(cfg, f"dataloader.{loader}.mapper.image_range")
    if span is not None and not (len(span) == 2 and span[0] < span[1]):
        fix = "use null or [lo,hi], lo below hi"
        findings.add(ConfigError("data.image_range", list(span), "is no range", fix))
        span = None
    # Another mapper may read images of any depth in a way of its own.
    scales = ours if ours or target_of(mapper) is DatasetMapper else None
    own = cfg.get("data")
    masks = "dataloader.train.mapper.use_instance_mask" if own is None else "data.masks"
    return Reading(
        masks=OmegaConf.select(cfg, masks, default=True),
        repair=True if own is None else own.repair,
        max_size=None if own is None else own.max_size,
        image_range=None if span is None else list(span),
        scales=scales,
    )


def _warn_of_overlap(train: CocoData, val: CocoData, findings: Findings) -> None:
    both = len({*train.image_files} & {*val.image_files})
    if both and not {x.json_file for x in train.files} & {x.json_file for x in val.files}:
        findings.warn(
            val.files[0].key,
            ", ".join(x.json_file for x in val.files),
            f"{both} of its {len(val.image_files)} images are trained on, too: figures say little "
            "about other images",
            "use images held out of training",
        )


def class_names(cfg: Union[DictConfig, CfgNode]) -> Optional[List[str]]:
    """The class names, in order, of the data that a config trains on; None if they are unknown.

    A run's saved config says them; else they are those of ``data.train_json``, if it is there, or of the
    registered data set.
    """
    known = saved_classes(cfg)
    if known or isinstance(cfg, CfgNode):
        return known
    files = OmegaConf.select(cfg, "data.train_json")
    files = [files] if isinstance(files, str) else files or []
    if files and all(os.path.isfile(os.path.expanduser(x)) for x in files):
        return read_classes([os.path.expanduser(x) for x in files]) or None
    return registered_classes(OmegaConf.select(cfg, "dataloader.train.dataset.names"))
