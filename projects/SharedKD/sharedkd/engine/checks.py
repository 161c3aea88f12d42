"""Checks of a run's data sets, classes, evaluators, device and learning-rate schedule."""

import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from sharedkd.config.build import construct, makes
from sharedkd.config.own_data import class_names, reading_of
from sharedkd.data.coco import CocoSummary, read_registered
from sharedkd.errors import FAILED, ConfigError, Findings
from sharedkd.modeling.classes import check_class_names
from sharedkd.modeling.detectors import num_classes, read_config
from sharedkd.modeling.meta_arch import SharedKD, of_students
from sharedkd.modeling.teachers import FrozenTeacher, Teacher, teacher_key
from sharedkd.values import check_number
from sharedkd.weights.loading import parts_of

__all__ = [
    "DataSets",
    "check_class_order",
    "check_classes",
    "check_datasets",
    "check_device",
    "check_ends",
    "check_evaluation",
    "check_sample",
    "check_scheduler",
    "check_unlabelled",
    "names_of",
    "key_of",
]


@dataclass
class DataSets:
    """Summaries of the COCO-format data sets of a run, FAILED for a file that cannot be read."""

    train: List[CocoSummary] = field(default_factory=list)
    test: List[CocoSummary] = field(default_factory=list)

    def usable(self, split: str) -> List[CocoSummary]:
        """The summaries of ``split`` without an error."""
        return [x for x in getattr(self, split) if x and not x.refused]

    @property
    def repairs(self) -> List[str]:
        """What was repaired in memory, a line for each file and kind."""
        usable = [*self.usable("train"), *self.usable("test")]
        return list(
            dict.fromkeys(f"{x.json_file}: {repair}" for x in usable for repair in x.repairs)
        )

    def complete(self, split: str) -> bool:
        """Whether no data set of ``split`` has an error."""
        return len(self.usable(split)) == len(getattr(self, split))


def check_datasets(
    cfg: DictConfig, own: Mapping[str, List[CocoSummary]], eval_only: bool, findings: Findings
) -> DataSets:
    """Check every COCO-format data set that the config names.

    Every process does so, since repaired data are registered anew.

    Args:
        own: summaries of own data, see :class:`~sharedkd.config.load.Loaded`.
        eval_only: leave out the training data.
        findings: receives an error for each unknown name and each faulty file.
    """
    found = DataSets(**own)
    read = (
        {f"{cfg.data.name}_train": own["train"], f"{cfg.data.name}_val": own["test"]} if own else {}
    )
    for split in ("test",) if eval_only else ("train", "test"):
        key, files = f"dataloader.{split}.dataset.names", []
        names = OmegaConf.select(cfg, key)
        for name in [names] if isinstance(names, str) else names or []:
            files += read[name] if name in read else _registered(cfg, name, split, findings)
        if files:
            setattr(found, split, files)
    return found


def _registered(cfg: DictConfig, name: str, split: str, findings: Findings) -> List[CocoSummary]:
    """What the files of a registered data set hold; none if it has no json file."""
    key = f"dataloader.{split}.dataset.names"
    if name not in DatasetCatalog.list():
        fix = "set data.train_json, data.train_images, data.val_json and data.val_images of COCO-format "
        fix += "data, or register it in a LazyConfig file"
        findings.add(ConfigError(key, name, "is not registered", fix))
        return [FAILED]
    reading = reading_of(cfg, split, findings)
    data = read_registered(name, key, train=split == "train", reading=reading)
    if data is None:
        return []
    for error in data.errors:
        findings.add(error)
    findings.warnings += data.warnings
    return data.files or [FAILED]


def check_classes(
    cfg: DictConfig, student: nn.Module, summary: CocoSummary, key: str = "model"
) -> None:
    """Compare the number of classes of a student, ``key`` in the config, with that of its data.

    Raises:
        ConfigError: the two numbers differ.
    """
    count = num_classes(student)
    if count not in (None, len(summary.classes)):
        problem = f"is how many classes the student has; {summary.key}={summary.json_file} has "
        problem += str(len(summary.classes))
        fix = "set both to the same number; own data's is ${data.num_classes}"
        place = key_of(OmegaConf.select(cfg, key), "num_classes", key) or key
        raise ConfigError(place, count, problem, fix)


def check_class_order(
    cfg: DictConfig,
    model: nn.Module,
    inherited: Sequence[str],
    classes: Sequence[str],
    eval_only: bool,
    findings: Findings,
) -> None:
    """Compare class names with those that a teacher or checkpoint was trained for, if they are known.

    Args:
        inherited: the student's tensors that are copies of its teacher's.
        classes: class names of the data, in order.
        eval_only: ``train.init_checkpoint`` is evaluated.
        findings: receives an error for each model whose class scores are used and mean other classes.
    """
    path = str(cfg.train.init_checkpoint or "")
    names = names_of(os.path.join(os.path.dirname(path), "config.yaml")) if path else None
    if eval_only:
        findings.step(check_class_names, "train.init_checkpoint", path, names or classes, classes)
        return
    if names and len(names) == len(classes) and names != list(classes):
        problem = (
            "is a detector of other classes, or in another order: its class scores mean others here"
        )
        fix = "change nothing if they are to be trained anew"
        findings.warn("train.init_checkpoint", path, problem, fix)
    stages = getattr(model, "stages", {}).values()
    dense = not hasattr(getattr(model, "student", model), "roi_heads")
    # Source -> the remedies of its own.
    readers: Dict[Optional[str], Tuple[str, ...]] = {
        stage.teacher: () for stage in stages if stage.loss.reads_scores(dense)
    }
    if "head" in parts_of(inherited):
        readers.setdefault(None, ("set train.inherit=[neck]",))
    for name, teacher in getattr(model, "sources", {}).items():
        path = getattr(teacher, "name", None)
        if name in readers and path and num_classes(model.student) == num_classes(teacher.detector):
            key = f"{teacher_key(name)}.config"
            names = names_of(path)
            findings.step(check_class_names, key, path, names or classes, classes, *readers[name])


def names_of(config: str) -> Optional[List[str]]:
    """The class names of a run's saved config or of a model-zoo name; None if they are unknown."""
    try:
        return class_names(read_config(config))
    except ConfigError:
        return None


def key_of(model: DictConfig, name: str, key: str = "model") -> str:
    """The config key of ``name`` in the student or a part of it; "" if it is in none."""
    student = key if model.get("student") is None else f"{key}.student"
    waiting = [(student, model.get("student", model))]
    for key, node in waiting:
        if name in node:
            return f"{key}.{name}"
        waiting += [(f"{key}.{k}", v) for k, v in node.items() if isinstance(v, DictConfig)]
    return ""


def check_sample(student: nn.Module, sample: Mapping[str, Any]) -> None:
    """Check that the first record of the data loader has the masks that the student needs.

    Raises:
        ConfigError: ``student`` has a mask head, and ``sample`` no masks.
    """
    heads = getattr(student, "roi_heads", None)
    if getattr(heads, "mask_on", False) and not sample["instances"].has("gt_masks"):
        key = "dataloader.train.mapper.use_instance_mask"
        problem = "the student has a mask head, which cannot be trained without masks"
        fix = "use data.masks=True and data with segmentations, or a student without masks"
        raise ConfigError(key, False, problem, fix)


def check_unlabelled(cfg: DictConfig, model: nn.Module) -> None:
    """Check that something learns from images without labels.

    Raises:
        ConfigError: ``model`` is a plain detector, or no stage compares maps alone.
    """
    if isinstance(model, SharedKD):
        if model.unlabelled_stages:
            return
        names = ", ".join(of_students(model, "stages")) or "there is none"
        problem = f"no stage learns from them: {names}"
        fix = "label them by tools/label_images.py, or use a method that compares maps alone, such as "
        fix += "shared_kd or pkd"
    else:
        problem = "nothing learns from them without distillation"
        fix = "label them by tools/label_images.py, or add --teacher"
    found = OmegaConf.select(cfg, "data.unlabelled_images")
    key = "dataloader.train.unlabelled" if found is None else "data.unlabelled_images"
    raise ConfigError(key, found, problem, fix)


def check_evaluation(cfg: DictConfig, data: DataSets, findings: Findings) -> None:
    """Build the evaluators and their data, so that an error shows before hours of training."""
    nodes = cfg.dataloader.get("evaluator")
    if nodes is None or not data.complete("test"):
        return
    if "test" not in cfg.dataloader:
        problem, fix = "is missing, and there is an evaluator", "set it, or leave out the evaluator"
        findings.add(ConfigError("dataloader.test", None, problem, fix))
        return
    findings.step(construct, cfg.dataloader.test, "dataloader.test")
    for i, node in enumerate(nodes if isinstance(nodes, ListConfig) else [nodes]):
        key = f"dataloader.evaluator{f'[{i}]' if isinstance(nodes, ListConfig) else ''}"
        name = node.get("dataset_name") if isinstance(node, Mapping) else None
        if name is not None and name not in DatasetCatalog.list():
            key, fix = f"{key}.dataset_name", "name the test data"
            findings.add(ConfigError(key, name, "is not registered", fix))
        elif name is None or MetadataCatalog.get(name).get("json_file"):
            evaluator = findings.step(construct, node, key)
            if evaluator is not FAILED and not isinstance(evaluator, DatasetEvaluator):
                fix = "use a subclass of detectron2.evaluation.DatasetEvaluator"
                findings.add(ConfigError(key, type(evaluator).__name__, "is no evaluator", fix))
        # any other evaluator may write the annotations into a json file as soon as it is built


def check_ends(cfg: DictConfig) -> None:
    """Check that a stage that ends where its teacher is outgrown can.

    Raises:
        ConfigError: the teacher or the student is not evaluated on the way.
    """
    train, stages = cfg.train, cfg.model.get("stages")
    for name, stage in stages.items() if isinstance(stages, DictConfig) else ():
        ends = isinstance(stage, DictConfig) and stage.get("end") == "teacher"
        if not ends or train.fast_dev_run or stage.get("weight") == 0:
            continue
        key, fix = f"model.stages.{name}.end", "set it, or use a time"
        source, peers = stage.get("teacher"), cfg.model.get("peers") or {}
        others = cfg.model.get("teachers") or {}
        node = cfg.model.get("teacher") if source is None else others.get(source)
        if source in peers or makes(node, Teacher) and not makes(node, FrozenTeacher):
            problem = f"{source or 'the teacher'} is no trained detector, and is not evaluated"
            raise ConfigError(key, "teacher", problem, "use a time")
        if train.eval_teacher is False:
            raise ConfigError(key, "teacher", "train.eval_teacher=False: its AP is not known", fix)
        if train.eval_period == 0 or cfg.dataloader.get("evaluator") is None:
            where = "train.eval_period=0" if train.eval_period == 0 else "dataloader.evaluator=None"
            raise ConfigError(key, "teacher", f"{where}: the student's AP is not known", fix)


def check_scheduler(scheduler: Any) -> None:
    """Check a multiplier of the learning rate, a function of the progress of the run (0 to 1).

    Raises:
        ConfigError: it raises an error, or returns a negative, infinite or NaN value.
    """
    for where in (0.0, 0.5, 1 - 1e-6):
        try:
            value = scheduler(where)
        except Exception as e:
            problem = f"cannot be evaluated at {where:g} of the run: {e}"
            fix = "use a ParamScheduler of fvcore"
            raise ConfigError("lr_multiplier", type(scheduler).__name__, problem, fix) from e
        check_number(f"lr_multiplier at {where:g} of the run", value, least=0)


def check_device(name: str) -> None:
    """Raise a ConfigError if this machine has no device ``name``."""
    try:
        there = torch.empty(1, device=name).device.type in ("cpu", "cuda")
    except Exception:
        there = False
    if not there:
        fix = "use train.device=cpu"
        raise ConfigError("train.device", name, "there is no such device here", fix)
    if (
        torch.device(name).type == "cpu"
        and comm.get_world_size() > 1
        and dist.get_backend() == "nccl"
    ):
        problem = "is set in the config, and these processes talk over NCCL, which GPUs alone have"
        raise ConfigError("train.device", name, problem, "add train.device=cpu to the command")
