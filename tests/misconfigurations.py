"""Ways to misconfigure a run or to feed it badly, each with the one error that it has to give.

A case is (overrides, key, words): what the command line adds to a run that is fine, the key that the
error has to name, and what else its line has to contain.  Overrides may be a function of a
:class:`Bad`, which makes bad files.
"""

import json

import tiny
import torch

MISSING = "/no/such/file"


class Bad:
    """Makes bad files out of good ones.

    Args:
        shapes: the folder of a good data set.
        weights: good weights of the teacher.
        folder: where bad files go.
    """

    def __init__(self, shapes, weights, folder):
        self.shapes, self.weights, self.folder = shapes, weights, folder

    def json(self, change, split="train"):
        """An override that names a changed copy of a json."""
        path = self.folder / f"{split}.json"
        data = json.loads((self.shapes / f"{split}.json").read_text())
        change(data)
        path.write_text(json.dumps(data))
        return [f"data.{split}_json={path}"]

    def file(self, key, content, name="weights.pth"):
        """An override that names a file with these bytes, or this object saved by torch."""
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return [f"{key}={path}"]

    def state(self):
        return torch.load(self.weights, weights_only=True)["model"]

    def wide_teacher(self):
        """An untrained teacher whose backbone's stages are four times as wide."""
        path = self.folder / "wide.py"
        path.write_text(
            f"import sys; sys.path.insert(0, {str(tiny.ROOT / 'tests')!r})\n"
            "import tiny\nmodel = tiny.node('faster_rcnn', 50)\n"
        )
        return [f"model.teacher.config={path}", "model.teacher.weights=''"]

    def other_shape(self):
        state = self.state()
        state["backbone.fpn_lateral2.weight"] = torch.zeros(7, 7, 1, 1)
        return {"model": state}

    def one_less(self):
        state = self.state()
        del state["backbone.bottom_up.res3.0.conv1.weight"]
        return {"model": state}


def first(part, **change):
    """Changes the first item of a part of a json."""
    return lambda bad: bad.json(lambda data: data[part][0].update(change))


def every(part, **change):
    """Changes all items of a part of a json: what a few have may be repaired."""
    return lambda bad: bad.json(lambda data: [row.update(change) for row in data[part]])


def train(key, value, *words):
    return ([f"train.{key}={value}"], f"train.{key}", [str(value), *words])


def fitnets(options):
    """A stage of the command line's."""
    loss = f"{{_target_:sharedkd.losses.FitNets,{options}}}"
    return f"{{_target_:sharedkd.modeling.stages.Stage,loss:{loss}}}"


#: Keys whose errors keep a model from being built, or come after it.
BUILDING = ("optimizer", "model", "train.compile", "train.inherit", "train.init_checkpoint")


def parts(key):
    """The parts of a config in which an error of ``key`` may hide others; None: in all."""
    if key in ("override", "train", "--config-file"):
        return None
    if key.startswith("model.stages.") and not key.endswith(".loss"):
        return {".".join(key.split(".")[:3])}
    if key == "model.roi_heads.num_classes":  # is compared with the data
        return {"model", "data"}
    for part in ("data", "lr_multiplier", "train.amp"):  # dataloader, too
        if key.startswith(part):
            return {part}
    return {"model"} if key.startswith(BUILDING) else {key}


FURTHER = "{_target_:sharedkd.FrozenTeacher,config:COCO-Detection/nothing.yaml}"
TEACHER, INIT, JSON = "model.teacher.weights", "train.init_checkpoint", "data.train_json"
LOADER, CROSS, SAME = "dataloader.train", "model.stages.cross", "model.stages.identical"

#: Of a plain Faster R-CNN.
PLAIN = {
    # the command
    "unknown part of the config": (["optimzer.lr=1"], "override", ["optimzer", "optimizer"]),
    "override without value": (["train.max_iter"], "override", ["train.max_iter", "key=value"]),
    "override below a number": (["train.max_iter.x=1"], "override", ["train.max_iter.x"]),
    "a value to be quoted": (
        ["data.train_json=a(1).json"],
        "override",
        ["a(1).json", "\"data.train_json='a(1).json'\""],
    ),
    "train is no group": (["train=5"], "train", ["5", "train.NAME=VALUE"]),
    # keys and values of train
    "unknown key of train.amp": (["train.amp.enabld=True"], "train.amp.enabld", ["enabled"]),
    "amp is a switch": (["train.amp=True"], "train.amp", ["True", "train.amp.NAME"]),
    "no iterations": train("max_iter", 0, "1 or more"),
    "evaluation period": train("eval_period", -1, "0 or more"),
    "log period": train("log_period", 0, "1 or more"),
    "checkpoint period": train("checkpointer.period", 0, "1 or more"),
    "checkpoints to keep": train("checkpointer.max_to_keep", 0, "or null"),
    "clipping at zero": train("clip_grad_norm", 0, "above 0"),
    "accumulate nothing": train("accumulate", 0, "1 or more"),
    "seed too large": train("seed", 2**40, "at most"),
    "amp in words": train("amp.enabled", "perhaps", "True or False"),
    "amp type": (
        ["train.amp.enabled=True", "train.amp.dtype=int8"],
        "train.amp.dtype",
        ["int8", "float16"],
    ),
    "float16 on the CPU": (
        ["train.amp.enabled=True", "train.amp.dtype=float16"],
        "train.amp.dtype",
        ["float16", "bfloat16"],
    ),
    "layout perhaps": train("channels_last", "nhwc", "True or False"),
    "development run": train("fast_dev_run", "please", "True or False"),
    "device not there": train("device", "cuda:77", "train.device=cpu"),
    "device name": train("device", "gpu", "train.device=cpu"),
    "device is a number": train("device", 0, "train.device=cpu"),
    "compiling and recomputing": (
        ["train.compile=True", "train.activation_checkpointing=True"],
        "train.compile",
        ["train.activation_checkpointing", "use one of them"],
    ),
    "inheriting without a teacher": (["train.inherit=[neck]"], "train.inherit", ["no teacher"]),
    "no output folder": (["train.output_dir=''"], "train.output_dir", ["as text"]),
    "something to inherit": (["train.inherit=[1.5]"], "train.inherit", ["1.5", "as text"]),
    "ddp is no number": train("ddp", 5, "train.ddp.NAME"),
    # the output folder
    "output folder is a file": (
        lambda bad: bad.file("train.output_dir", b"something", "notes.txt"),
        "train.output_dir",
        ["is a file", "choose a folder"],
    ),
    "output folder below a file": (
        lambda bad: [x + "/run" for x in bad.file("train.output_dir", b"something", "notes.txt")],
        "train.output_dir",
        ["is a file"],
    ),
    "output folder not writable": (
        ["train.output_dir=/proc/run"],
        "train.output_dir",
        ["cannot be written to", "another folder"],
    ),
    "output folder with another run": (
        lambda bad: (
            bad.file("train.output_dir", b"model_0000001.pth", "last_checkpoint")
            and [f"train.output_dir={bad.folder}"]
        ),
        "train.output_dir",
        ["another run's checkpoint", "--resume"],
    ),
    "output folder with weights": (
        lambda bad: (
            bad.file("train.output_dir", b"precious", "model_final.pth")
            and [f"train.output_dir={bad.folder}"]
        ),
        "train.output_dir",
        ["model_final.pth", "choose another folder"],
    ),
    # optimizer and schedule
    "learning rate below zero": (["optimizer.lr=-1"], "optimizer.lr", ["-1", "negative"]),
    "learning rate nan": (["optimizer.lr=nan"], "optimizer.lr", ["nan", "not finite"]),
    "learning rate infinite": (["optimizer.lr=inf"], "optimizer.lr", ["not finite"]),
    "learning rate in words": (["optimizer.lr=fast"], "optimizer.lr", ["fast", "no number"]),
    "weight decay": (["optimizer.weight_decay=-0.1"], "optimizer.weight_decay", ["-0.1"]),
    "unknown optimizer": (
        ["optimizer._target_=torch.optim.Adam7"],
        "optimizer._target_",
        ["torch.optim.Adam7"],
    ),
    "option of another optimizer": (["optimizer.nesterov=True"], "optimizer", ["nesterov"]),
    "optimizer without parameters": (["optimizer.params=null"], "optimizer.params", ["train"]),
    "a class that is no optimizer": (
        ["optimizer={_target_:torch.nn.Identity,params:{_target_:torch.nn.Identity}}"],
        "optimizer",
        ["Identity", "no optimizer"],
    ),
    "schedule below zero": (
        ["lr_multiplier.scheduler.start_value=-1", "lr_multiplier.warmup_factor=1"],
        "lr_multiplier at 0 of the run",
        ["-1", "negative"],
    ),
    "warm-up in words": (["lr_multiplier.warmup_length=long"], "lr_multiplier", ["ParamScheduler"]),
    "option of the schedule": (["lr_multiplier.warmup=3"], "lr_multiplier", ["warmup"]),
    "no schedule": (["lr_multiplier=null"], "--config-file", ["lr_multiplier", "configs/"]),
    "schedule to nan": (
        ["lr_multiplier.scheduler.end_value=nan"],
        "lr_multiplier at 0 of the run",
        ["nan", "not finite"],
    ),
    # loading
    "empty batch": ([f"{LOADER}.total_batch_size=0"], f"{LOADER}.total_batch_size", ["1 or more"]),
    "workers": ([f"{LOADER}.num_workers=-1"], f"{LOADER}.num_workers", ["-1", "0 or more"]),
    "option of the loader": ([f"{LOADER}.shuffle=True"], LOADER, ["shuffle"]),
    "image format of another model": (
        [f"{LOADER}.mapper.image_format=BGR"],
        f"{LOADER}.mapper.image_format",
        ["BGR", "RGB"],
    ),
    "image size in words": (["data.short_edge=[large]"], "data.short_edge", ["large", "whole"]),
    "an augmentation that fails": (
        [f"{LOADER}.mapper.augmentations.0.short_edge_length=[large]"],
        f"{LOADER}.mapper",
        ["cannot load"],
    ),
    "unknown key of data": (["data.shortedge=9"], "data.shortedge", ["9", "mean short_edge"]),
    "another data set": (
        [f"{LOADER}.dataset.names=nothing"],
        f"{LOADER}.dataset.names",
        ["nothing", "not registered"],
    ),
    "evaluator of another data set": (
        ["dataloader.evaluator.dataset_name=nothing"],
        "dataloader.evaluator.dataset_name",
        ["nothing", "not registered"],
    ),
    "unknown evaluator": (
        ["dataloader.evaluator._target_=detectron2.evaluation.CocoEvaluator"],
        "dataloader.evaluator._target_",
        ["detectron2.evaluation.CocoEvaluator", "no such class"],
    ),
    "a class that is no evaluator": (
        ["dataloader.evaluator={_target_:torch.nn.Identity}"],
        "dataloader.evaluator",
        ["Identity", "DatasetEvaluator"],
    ),
    "option of the evaluator": (["dataloader.evaluator.fast=1"], "dataloader.evaluator", ["fast"]),
    # data
    "json not named": (["data.val_json=null"], "data.val_json", ["not set", "data.val_json=PATH"]),
    "images not named": (["data.train_images=null"], "data.train_images", ["not set"]),
    "json missing": ([f"data.train_json={MISSING}"], JSON, [MISSING, "name an existing"]),
    "images missing": ([f"data.train_images={MISSING}"], "data.train_images", [MISSING]),
    "json is a folder": (["data.train_json=/tmp"], JSON, ["/tmp"]),
    "image file missing": (
        first("images", file_name="gone.png"),
        "data.train_images",
        ["gone.png"],
    ),
    "objects of no category": (every("annotations", category_id=99), JSON, ["category 99"]),
    "classes of two files differ": (
        lambda bad: bad.json(lambda data: data["categories"][0].update(name="blob")),
        "data.val_json",
        ["blob", "same list of categories"],
    ),
    "repairs that are not wanted": (
        lambda bad: [
            *bad.json(lambda data: data["annotations"][0].pop("area"), split="val"),
            "data.repair=False",
        ],
        "data.val_json",
        ["1 of", "have no area", "data.repair=True"],
    ),
    "range of images": (["data.image_range=[5,5]"], "data.image_range", ["5", "lo below hi"]),
    "folders for several files": (
        ["data.train_json=[a,b]", "data.train_images=[a,b,c]"],
        "data.train_images",
        ["3 folders", "2 files", "one for each"],
    ),
    "number of classes": (["data.num_classes=4"], "data.num_classes", ["4", "leave it out"]),
    "student's number of classes": (
        ["model.roi_heads.num_classes=80", "model.roi_heads.box_predictor.num_classes=80"],
        "model.roi_heads.num_classes",
        ["80", "data.num_classes"],
    ),
    # the student and its weights
    "unknown model": (
        ["model._target_=detectron2.modeling.RCNN"],
        "model._target_",
        ["modeling.RCNN"],
    ),
    "option of the model": (["model.backbone.colour=1"], "model.backbone", ["colour"]),
    "depth of no network": (
        ["model.backbone.bottom_up.stages.depth=19"],
        "model.backbone.bottom_up.stages",
        ["19"],
    ),
    "student weights missing": ([f"{INIT}={MISSING}.pkl"], INIT, [MISSING, "no such file"]),
    "student weights of another backbone": (
        lambda bad: bad.file(
            INIT, {"model": {"backbone.bottom_up.res2.9.conv1.weight": torch.ones(1)}}
        ),
        INIT,
        ["another backbone", "from scratch"],
    ),
    "student weights are text": (lambda bad: bad.file(INIT, b"hello"), INIT, ["cannot be read"]),
}

#: Of a pair of Mask R-CNNs with Shared-KD.
PAIR = {
    "teacher not in the zoo": (
        ["model.teacher.config=COCO-Detection/nothing.yaml"],
        "model.teacher.config",
        ["COCO-Detection/nothing.yaml", "model zoo"],
    ),
    "teacher not named": (["model.teacher.config=???"], "model.teacher.config", ["not set"]),
    "teacher's config broken": (
        lambda bad: bad.file("model.teacher.config", b"model = (", "broken.py"),
        "model.teacher.config",
        ["cannot be read", "correct that file"],
    ),
    "teacher without weights": (["model.teacher.weights=null"], TEACHER, ["set it to"]),
    "teacher weights missing": ([f"{TEACHER}={MISSING}.pth"], TEACHER, [MISSING, "no such file"]),
    "teacher weights cut short": (
        lambda bad: bad.file(TEACHER, bad.weights.read_bytes()[:100000]),
        TEACHER,
        ["cannot be read"],
    ),
    "teacher weights of another shape": (
        lambda bad: bad.file(TEACHER, bad.other_shape()),
        TEACHER,
        ["fpn_lateral2", "another shape"],
    ),
    "teacher weights with one less": (
        lambda bad: bad.file(TEACHER, bad.one_less()),
        TEACHER,
        ["res3.0.conv1", "missing"],
    ),
    "precision of the teacher": (
        ["model.teacher.precision=int8"],
        "model.teacher.precision",
        ["int8", "bfloat16"],
    ),
    "teacher in half precision on the CPU": (
        ["model.teacher.precision=float16"],
        "model.teacher.precision",
        ["float16", "bfloat16"],
    ),
    "option of the teacher": (["model.teacher.speed=9"], "model.teacher", ["speed"]),
    "part to inherit": (["train.inherit=[tail]"], "train.inherit", ["tail", "neck"]),
    "teachers as a list": (["model.teachers=[a]"], "model.teachers", ["is no group of nodes"]),
    "no teacher for a stage": (["model.teacher=null"], f"{SAME}.loss", ["needs a teacher"]),
    "no such teacher for a stage": (
        [f"{SAME}.teacher=large"],
        f"{SAME}.teacher",
        ["large", "no source of maps"],
    ),
    "a further teacher that is not in the zoo": (
        [f"model.teachers.large={FURTHER}", f"{SAME}.teacher=large"],
        "model.teachers.large.config",
        ["COCO-Detection/nothing.yaml", "model zoo"],
    ),
    "unknown stage": (["model.stages.crosss.weight=1"], "model.stages.crosss", ["is not a Stage"]),
    "ends with its teacher, whose AP is unknown": (
        [f"{SAME}.end=teacher", "train.eval_teacher=False"],
        f"{SAME}.end",
        ["teacher", "train.eval_teacher=False"],
    ),
    "ends with its teacher, and is not evaluated": (
        [f"{SAME}.end=teacher", "train.eval_teacher=null", "train.eval_period=0"],
        f"{SAME}.end",
        ["teacher", "train.eval_period=0"],
    ),
    "a share beside a fixed weight": (
        [f"{SAME}.weight=2", f"{SAME}.share=0.1"],
        f"{SAME}.share",
        ["0.1", f"{SAME}.weight=auto"],
    ),
    "stage without loss": ([f"{SAME}.loss=null"], f"{SAME}.loss", ["None", "L(LOSS)"]),
    "unknown loss": (
        [f"{CROSS}.loss._target_=sharedkd.losses.Nothing"],
        f"{CROSS}.loss._target_",
        ["sharedkd.losses.Nothing", "no such class"],
    ),
    "a class that is no loss": (
        [f"{CROSS}.loss={{_target_:torch.nn.Identity}}"],
        f"{CROSS}.loss",
        ["no distillation loss"],
    ),
    "option of a stage": ([f"{CROSS}.wait=1"], CROSS, ["wait"]),
    "option of a loss": ([f"{CROSS}.loss.nothing=1"], f"{CROSS}.loss", ["nothing"]),
    "tap": ([f"{SAME}.loss.tap=neck"], f"{SAME}.loss.tap", ["neck", "fpn"]),
    "share": ([f"{SAME}.loss.share=all"], f"{SAME}.loss.share", ["all", "dense"]),
    "direction": ([f"{CROSS}.loss.direction=up"], f"{CROSS}.loss.direction", ["up", "mutual"]),
    "pairs": ([f"{CROSS}.loss.pairs=some"], f"{CROSS}.loss.pairs", ["some", "dense"]),
    "no strides": ([f"{SAME}.loss.strides=[]"], f"{SAME}.loss.strides", ["[]", "null"]),
    "strides in words": ([f"{SAME}.loss.strides=all"], f"{SAME}.loss.strides", ["all", "null"]),
    "strides in parts": ([f"{SAME}.loss.strides=[4.5]"], f"{SAME}.loss.strides", ["4.5"]),
    "a stride twice": ([f"{SAME}.loss.strides=[8,8]"], f"{SAME}.loss.strides", ["[8, 8]"]),
    "weight below zero": ([f"{SAME}.weight=-1"], f"{SAME}.weight", ["-1", "negative"]),
    "adapter": (
        [f"model.stages.fit={fitnets('tap:fpn,adapter:2')}"],
        "model.stages.fit.loss.adapter",
        ["2", "odd"],
    ),
    "no adapter where widths differ": (
        lambda bad: [*bad.wide_teacher(), f"model.stages.fit={fitnets('tap:backbone,adapter:0')}"],
        "model.stages.fit.loss.adapter",
        ["64 channels", "256", "use null"],
    ),
    "masks without segmentations": (
        lambda bad: bad.json(lambda data: [a.pop("segmentation") for a in data["annotations"]]),
        JSON,
        ["no segmentation", "configs/custom_coco.py"],
    ),
    "mask head without masks": (
        ["data.masks=False"],
        f"{LOADER}.mapper.use_instance_mask",
        ["mask head", "data.masks=True"],
    ),
}
