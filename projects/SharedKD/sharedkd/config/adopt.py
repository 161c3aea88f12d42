"""Configs written for plain Detectron2: reproducible loaders for them, and own data by ``data.*``."""

from typing import Any, Iterator, Sequence, Union

from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler
from omegaconf import DictConfig, ListConfig, OmegaConf

from sharedkd.data.images import ImageMapper
from sharedkd.data.loader import build_test_loader, build_train_loader
from sharedkd.errors import ConfigError, Findings

from .build import makes, target_of
from .classic import YamlMapper, is_classic
from .defaults import DATA_DEFAULTS
from .plain import leaves

__all__ = ["adopt_loaders", "check_mappers", "show_larger_images", "use_own_data"]

# Nodes of a model whose `num_classes` are not those of the data's objects.
_OF_OTHERS = ("backbone", "sem_seg_head", "teacher", "teachers")
# Of `data`, what mappers read.
_OF_MAPPERS = (
    ("train", "image_range"),
    ("train", "strong_augmentation"),
    ("test", "image_range"),
)
# What only the configs of configs/custom_coco*.py read.
_SIZES = ("short_edge", "test_short_edge", "max_size", "num_classes", "masks")


def adopt_loaders(cfg: DictConfig) -> None:
    """Replace Detectron2's loaders in a config by this package's, which a resumed run needs.

    A training loader with options that this package's lacks stays as it is.
    """
    train, test = (cfg.dataloader.get(split) for split in ("train", "test"))
    if target_of(train) is build_detection_train_loader:
        sampler = train.get("sampler")
        if target_of(sampler) is RepeatFactorTrainingSampler:
            threshold = OmegaConf.select(sampler, "repeat_factors.repeat_thresh")
            if threshold is not None:
                del train["sampler"]
                train.repeat_threshold = threshold
        known = "dataset mapper total_batch_size num_workers aspect_ratio_grouping repeat_threshold"
        if {*train} <= {"_target_", *known.split()}:
            train._target_ = build_train_loader
            train.update(seed="${train.seed}", on_bad_image="error", max_bad_images=0.01)
    if target_of(test) is build_detection_test_loader and not {"sampler", "collate_fn"} & {*test}:
        test._target_ = build_test_loader


def show_larger_images(cfg: DictConfig) -> None:
    """Let the loaders also deliver the images as a teacher with a ``scale`` sees them.

    With a mapper of one's own, or teachers of several scales, the teacher enlarges the student's images.
    Without such a teacher they do not, whatever a run's saved config says.
    """
    scales = {*_scales(cfg.model.get("teacher")), *_scales(cfg.model.get("teachers"))} - {1}
    if len(scales) > 1:
        return
    larger = scales.pop() if scales else 1
    for split in ("train", "test"):
        mapper = OmegaConf.select(cfg, f"dataloader.{split}.mapper")
        if isinstance(mapper, DictConfig) and mapper.get("larger", 1) != larger:
            if target_of(mapper) is DatasetMapper:
                mapper._target_ = ImageMapper
            if target_of(mapper) in (ImageMapper, YamlMapper):
                mapper.larger = larger


def _scales(node: Any) -> Iterator[float]:
    """The scales of a teacher, of those that a :class:`TeacherMean` has, or of a group of teachers."""
    if isinstance(node, ListConfig):
        children = list(node)
    elif isinstance(node, DictConfig) and "_target_" in node:
        yield node.get("scale", 1)
        children = [node.get("teachers")]
    else:
        children = list(node.values()) if isinstance(node, DictConfig) else []
    for child in children:
        yield from _scales(child)


def use_own_data(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Let a config train on own data, if the command line sets keys of ``data`` and the config has none.

    Its data sets, its evaluator and its number of classes then are those of ``data``; not if the keys are
    those of images without labels alone.

    Args:
        cfg: changed in place.
        overrides: ``key=value`` each.

    Raises:
        ConfigError: a key that a config without a group ``data`` of its own does not read, or loaders
            other than Detectron2's.
    """
    keys = {text.partition("=")[0] for text in overrides if text.startswith("data.")}
    if not keys:
        return
    read = " ".join(text for _, text in leaves(OmegaConf.to_container(cfg, resolve=False)))
    for key in _SIZES:
        if f"data.{key}" in keys and f"${{data.{key}}}" not in read:
            fix = "leave it out, and set the key that this config reads itself"
            raise ConfigError(f"data.{key}", "", "is not read by this config", fix)
    if "data" in cfg:
        return
    cfg.data = OmegaConf.create(DATA_DEFAULTS)
    own = any(not key.startswith("data.unlabelled_") for key in keys)
    if is_classic(cfg):
        cfg.data.update(masks="${MODEL.MASK_ON}", max_size="${INPUT.MAX_SIZE_TRAIN}")
    else:
        _read_as(cfg)
    if not own:
        return
    if is_classic(cfg):
        cfg.DATASETS.update(TRAIN=["${data.name}_train"], TEST=["${data.name}_val"])
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False  # images without objects are background
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = "${data.num_classes}"
        _set_mappers(cfg.dataloader)
        return
    for split, name in (("train", "${data.name}_train"), ("test", "${data.name}_val")):
        loader = cfg.dataloader.get(split)
        if (
            OmegaConf.select(cfg, f"dataloader.{split}.dataset.names") is None
            or "mapper" not in loader
        ):
            problem = f"dataloader.{split} of this config has no dataset.names and mapper to set"
            fix = "use Detectron2's loader there, or a config of configs/"
            raise ConfigError("data", sorted(keys), problem, fix)
        loader.dataset.names = name
        if split == "train" and target_of(loader.dataset) is get_detection_dataset_dicts:
            loader.dataset.setdefault("filter_empty", False)
        if target_of(loader.mapper) is DatasetMapper:
            loader.mapper._target_ = ImageMapper
    _set_mappers(cfg.dataloader)
    evaluators = cfg.dataloader.get("evaluator")
    for node in evaluators if isinstance(evaluators, ListConfig) else [evaluators]:
        if node is not None:
            node.dataset_name = "${data.name}_val"
    for node in _with_classes(cfg.model):
        node.num_classes = "${data.num_classes}"


def _set_mappers(dataloader: DictConfig) -> None:
    """Let mappers of images read the keys of ``data`` that are about them."""
    for split, key in _OF_MAPPERS:
        mapper = dataloader[split].mapper
        if makes(mapper, ImageMapper):
            mapper[key] = f"${{data.{key}}}"


def check_mappers(cfg: DictConfig, findings: Findings) -> None:
    """Refuse keys of ``data`` that are set, and that the config's mappers do not read."""
    for split, key in _OF_MAPPERS if "data" in cfg else ():
        value = cfg.data[key]
        if value and not OmegaConf.select(cfg, f"dataloader.{split}.mapper.{key}"):
            problem = f"is not read by dataloader.{split}.mapper"
            fix = "leave it out, or use sharedkd.data.images.ImageMapper with this key"
            findings.add(ConfigError(f"data.{key}", value, problem, fix))


def _read_as(cfg: DictConfig) -> None:
    """Set those keys of ``data`` that say how the config's own mapper reads images."""
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper") or {}
    if "use_instance_mask" in mapper:
        cfg.data.masks = "${dataloader.train.mapper.use_instance_mask}"
    sizes = [x.max_size for x in mapper.get("augmentations", []) if "max_size" in x]
    cfg.data.max_size = max(sizes, default=1333)


def _with_classes(node: Union[DictConfig, ListConfig]) -> Iterator[DictConfig]:
    """The nodes of a model that say how many things it tells apart, and do not refer to another one."""
    for key in range(len(node)) if isinstance(node, ListConfig) else [*node]:  # of a cascade
        child = node._get_node(key)
        if isinstance(child, (DictConfig, ListConfig)) and key not in _OF_OTHERS:
            # A mask head of one class has the same for all, such as tiny_mask_rcnn's.
            if key != "mask_head" or child.get("num_classes") != 1:
                yield from _with_classes(child)
        elif key == "num_classes" and not OmegaConf.is_interpolation(node, key):
            yield node
