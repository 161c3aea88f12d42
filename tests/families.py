"""Small detectors of every family, and what distillation says to each; as a program, it writes docs/families.md."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import tiny
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    Backbone,
    PanopticFPN,
    ProposalNetwork,
    SemanticSegmentor,
    build_model,
)
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.projects.point_rend import add_pointrend_config
from detectron2.structures import Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

from sharedkd import FrozenTeacher, SharedKD
from sharedkd.errors import ConfigError
from sharedkd.methods import Method, known_methods
from sharedkd.modeling.detectors import family
from sharedkd.modeling.preparation import image_channels, prepare_images
from sharedkd.modeling.torchvision_backbone import TorchvisionBackbone

PAGE = tiny.ROOT / "docs/families.md"
STUFF = 4  # classes of semantic segmentation

# --- detectors ----------------------------------------------------------------------------------


def zoo(name):
    return model_zoo.get_config(f"common/models/{name}.py").model


def faster():
    return tiny.node("faster_rcnn")


def cascade():
    node = tiny.node("cascade_mask_rcnn")
    for key in [k for k in node.roi_heads if k.startswith("mask_")]:
        del node.roi_heads[key]
    return node


def keypoint():
    node, heads = faster(), zoo("keypoint_rcnn_fpn").roi_heads
    for key in ("keypoint_in_features", "keypoint_pooler", "keypoint_head"):
        node.roi_heads[key] = heads[key]
    shape = ShapeSpec(channels=128, width=14, height=14)
    node.roi_heads.keypoint_head.update(input_shape=shape, conv_dims=[16])
    node.roi_heads.keypoint_pooler.sampling_ratio = 2
    return node


def stuff_head(norm="GN"):
    shapes = {name: ShapeSpec(stride=s, channels=128) for name, s in zip(P2, (4, 8, 16, 32))}
    return L(SemSegFPNHead)(
        input_shape=shapes,
        num_classes=STUFF,
        conv_dims=32,
        common_stride=4,
        norm=norm,
        ignore_value=255,
    )


P2 = ("p2", "p3", "p4", "p5")


def panoptic():
    node = tiny.node("mask_rcnn")
    node._target_ = PanopticFPN
    node.sem_seg_head = stuff_head()
    return node


def segmentor():
    node = faster()
    means = {k: node[k] for k in ("pixel_mean", "pixel_std")}
    return L(SemanticSegmentor)(backbone=node.backbone, sem_seg_head=stuff_head(), **means)


def proposals():
    node = faster()
    means = {k: node[k] for k in ("pixel_mean", "pixel_std")}
    rpn = node.proposal_generator
    return L(ProposalNetwork)(backbone=node.backbone, proposal_generator=rpn, **means)


def c4():
    node = zoo("mask_rcnn_c4")
    node.backbone.freeze_at = 0
    node.roi_heads.update(num_classes=tiny.CLASSES, batch_size_per_image=8)
    node.proposal_generator.update(pre_nms_topk=(100, 50), post_nms_topk=(50, 20))
    for key in [k for k in node.roi_heads if k.startswith("mask_")]:
        del node.roi_heads[key]
    return node


def classic(name, **keys):
    """A model of the zoo's yaml, small where that is a matter of keys."""
    config = get_cfg()
    add_pointrend_config(config)
    config.merge_from_file(model_zoo.get_config_file(name))
    keys = {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.ROI_HEADS.NUM_CLASSES": tiny.CLASSES,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "INPUT.FORMAT": "RGB",
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    config.merge_from_list([x for pair in keys.items() for x in pair])
    return build_model(config)


def dc5():
    return classic("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml")


def pointrend():
    return classic(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        MODEL__ROI_MASK_HEAD__NAME="PointRendMaskHead",
        MODEL__ROI_MASK_HEAD__FC_DIM=32,
        MODEL__ROI_MASK_HEAD__POOLER_TYPE="",
        MODEL__ROI_MASK_HEAD__POINT_HEAD_ON=True,
        MODEL__POINT_HEAD__NUM_CLASSES=tiny.CLASSES,
        MODEL__POINT_HEAD__FC_DIM=32,
    )


def group_norm(node):
    node.backbone.norm = "GN"
    if "head" in node:
        node.head.norm = "GN"
    node.backbone.bottom_up.stem.norm = node.backbone.bottom_up.stages.norm = "GN"
    return node


def with_norm(norm):
    node = faster()
    node.backbone.bottom_up.stem.norm = node.backbone.bottom_up.stages.norm = norm
    return node


def resnext():
    node = tiny.node("faster_rcnn", depth=50)
    node.backbone.bottom_up.stages.num_groups = 8
    return node


def regnet():
    node = faster()
    node.backbone.bottom_up = L(RegNet)(
        stem_class=SimpleStem,
        stem_width=16,
        block_class=ResBottleneckBlock,
        depth=5,
        w_a=24.0,
        w_0=24,
        w_m=2.5,
        group_width=8,
        norm="BN",
        out_features=["s1", "s2", "s3"],
    )
    node.backbone.update(in_features=["s1", "s2", "s3"], top_block=None)
    return levels(node, [4, 8, 16])


def levels(node, strides):
    """Make the heads of a two-stage detector read the levels of these strides."""
    names = [f"p{s.bit_length() - 1}" for s in strides]
    rpn, heads = node.proposal_generator, node.roi_heads
    rpn.in_features = names
    rpn.anchor_generator.update(sizes=[[4 * s] for s in strides], strides=strides)
    pooled = names[:-1] if len(names) > 1 else names
    heads.box_in_features = pooled
    heads.box_pooler.scales = [1 / s for s in strides[: len(pooled)]]
    return node


def without_stride_4():
    node = faster()
    node.backbone.in_features = ["res3", "res4", "res5"]
    return levels(node, [8, 16, 32, 64])


def three_levels():
    node = without_stride_4()
    node.backbone.top_block = None
    return levels(node, [8, 16, 32])


def one_level():
    node = faster()
    node.backbone.update(in_features=["res4"], top_block=None)
    return levels(node, [16])


def giou():
    node = faster()
    node.roi_heads.box_predictor.update(box_reg_loss_type="giou", cls_agnostic_bbox_reg=True)
    return node


class BiFPN(Backbone):
    """A round of weighted fusion up and down, after EfficientDet."""

    def __init__(self, bottom_up, in_features, channels):
        super().__init__()
        self.bottom_up, self.in_features, shapes = bottom_up, in_features, bottom_up.output_shape()
        self.narrow = nn.ModuleList(nn.Conv2d(shapes[n].channels, channels, 1) for n in in_features)
        self.smooth = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_features
        )
        self.weights = nn.Parameter(torch.ones(len(in_features), 2))
        self._out_features = [f"p{shapes[n].stride.bit_length() - 1}" for n in in_features]
        self._out_feature_strides = {
            p: shapes[n].stride for p, n in zip(self._out_features, in_features)
        }
        self._out_feature_channels = dict.fromkeys(self._out_features, channels)

    @property
    def size_divisibility(self):
        return max(self._out_feature_strides.values())

    def forward(self, x):
        maps = self.bottom_up(x)
        x = [conv(maps[name]) for conv, name in zip(self.narrow, self.in_features)]
        share = self.weights.relu() / (self.weights.relu().sum(1, keepdim=True) + 1e-4)
        for i in range(len(x) - 2, -1, -1):
            above = nn.functional.interpolate(x[i + 1], scale_factor=2.0)
            x[i] = share[i, 0] * x[i] + share[i, 1] * above
        for i in range(1, len(x)):
            x[i] = share[i, 0] * x[i] + share[i, 1] * nn.functional.max_pool2d(x[i - 1], 2)
        return dict(zip(self._out_features, (conv(y) for conv, y in zip(self.smooth, x))))


def bifpn():
    node = faster()
    old = node.backbone
    names = ["res2", "res3", "res4", "res5"]
    node.backbone = L(BiFPN)(bottom_up=old.bottom_up, in_features=names, channels=128)
    return levels(node, [4, 8, 16, 32])


def torchvision(name, **features):
    def build():
        node = faster()
        node.backbone.bottom_up = L(TorchvisionBackbone)(name=name, features=features)
        node.backbone.in_features = list(features)
        return node

    return build


mobilenet_v2 = torchvision(
    "mobilenet_v2", c2="features.3", c3="features.6", c4="features.13", c5="features.18"
)
mobilenet_v3 = torchvision(
    "mobilenet_v3_large", c2="features.3", c3="features.6", c4="features.12", c5="features.16"
)
efficientnet = torchvision(
    "efficientnet_b0", c2="features.2", c3="features.3", c4="features.5", c5="features.8"
)


def channels(count):
    def build():
        node = faster()
        node.backbone.bottom_up.stem.in_channels = count
        node.update(pixel_mean=[110.0] * count, pixel_std=[50.0] * count)
        node.input_format = "L" if count == 1 else "RGB"
        return node

    return build


class Custom(nn.Module):
    """A meta-architecture of its own: a backbone, a loss, and nothing else of Detectron2."""

    def __init__(self):
        super().__init__()
        self.backbone = instantiate(faster().backbone)
        self.score = nn.Conv2d(128, 1, 1)
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 110.0))
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 50.0))

    def features(self, inputs):
        return self.backbone(prepare_images(self, inputs).tensor)

    def forward(self, inputs):
        return {"loss_score": sum(self.score(x).mean() for x in self.features(inputs).values())}


class Necked(Custom):
    """Its pyramid is a neck over the backbone's stages, which returns a list."""

    def __init__(self):
        super().__init__()
        self.backbone = self.backbone.bottom_up
        self.neck = Neck([128, 256, 512], 128)

    def features(self, inputs):
        return dict(enumerate(self.neck(super().features(inputs))))


class Neck(nn.Module):
    def __init__(self, widths, width):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 1) for c in widths)

    def forward(self, maps):
        return [conv(maps[name]) for conv, name in zip(self.convs, ("res3", "res4", "res5"))]


class Transformer(nn.Module):
    """As DETR: the backbone is inside another module, and no pyramid is in sight."""

    def __init__(self):
        super().__init__()
        self.detr = nn.Sequential(instantiate(faster().backbone.bottom_up))


class Twice(Custom):
    """Runs its backbone on the images and on their mirror images."""

    def features(self, inputs):
        images = prepare_images(self, inputs).tensor
        self.backbone(images.flip(-1))
        return self.backbone(images)


@dataclass(frozen=True)
class Row:
    """A detector of the table.

    Args:
        name: for the table.
        build: its LazyConfig node or model.
        partner: name of the row that stands on the other side.
        pyramid: the key, if it needs one.
    """

    name: str
    build: Optional[Callable] = None
    partner: str = "Faster R-CNN"
    pyramid: Optional[str] = None


ROWS = [
    Row("Faster R-CNN", faster),
    Row("Mask R-CNN", lambda: tiny.node("mask_rcnn")),
    Row("Cascade R-CNN", cascade),
    Row("Cascade Mask R-CNN", lambda: tiny.node("cascade_mask_rcnn"), "Mask R-CNN"),
    Row("Keypoint R-CNN", keypoint),
    Row("Panoptic FPN", panoptic, "Mask R-CNN"),
    Row("PointRend", pointrend, "Mask R-CNN"),
    Row("RPN alone", proposals),
    Row("Faster R-CNN, C4", c4),
    Row("Faster R-CNN, DC5", dc5),
    Row("RetinaNet", lambda: tiny.node("retinanet"), "RetinaNet"),
    Row("RetinaNet, GN", lambda: group_norm(tiny.node("retinanet")), "RetinaNet"),
    Row("FCOS", lambda: tiny.node("fcos"), "FCOS"),
    Row("RetinaNet with Faster R-CNN", lambda: tiny.node("retinanet")),
    Row("FCOS with RetinaNet", lambda: tiny.node("fcos"), "RetinaNet"),
    Row("semantic segmentor", segmentor),
    Row("ResNeXt", resnext),
    Row("RegNet", regnet),
    Row("GIoU loss, class-agnostic boxes", giou),
    Row("GN", lambda: group_norm(faster())),
    Row("SyncBN", lambda: with_norm("SyncBN")),
    Row("FrozenBN", lambda: with_norm("FrozenBN")),
    Row("pyramid without stride 4", without_stride_4),
    Row("pyramid of three levels", three_levels),
    Row("pyramid of one level", one_level),
    Row("BiFPN", bifpn),
    Row("MobileNetV2", mobilenet_v2),
    Row("MobileNetV3-Large", mobilenet_v3),
    Row("EfficientNet-B0", efficientnet),
    Row("gray images", channels(1), "gray images"),
    Row("gray images with RGB", channels(1)),
    Row("images of 4 channels", channels(4), "images of 4 channels"),
    Row("images of 6 channels", channels(6), "images of 6 channels"),
    Row("images of 6 channels with RGB", channels(6)),
    Row("meta-architecture of one's own", Custom),
    Row("backbone and neck, `pyramid=neck`", Necked, pyramid="neck"),
    Row("transformer without a pyramid", Transformer),
    Row("backbone that runs twice a step", Twice),
]
BY_NAME = {row.name: row for row in ROWS}
#: Built and stepped in the ordinary tests; all others in the nightly ones.
QUICK = (
    "Keypoint R-CNN",
    "semantic segmentor",
    "pyramid of one level",
    "backbone and neck, `pyramid=neck`",
)

# --- running them -------------------------------------------------------------------------------


def model_of(row: Row, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    built = row.build()
    return built if isinstance(built, nn.Module) else instantiate(built)


def records(student: nn.Module, count: int) -> List[Dict]:
    """Two images with all that a student of its kind is trained on."""
    found = []
    for record in (tiny.record(64, 96, seed=1), tiny.record(96, 64, seed=2)):
        height, width = record["height"], record["width"]
        record["image"] = (
            record["image"][:1].expand(count, -1, -1) if count != 3 else record["image"]
        )
        truth = record["instances"]
        points = truth.gt_boxes.get_centers()[:, None].repeat(1, 17, 1)
        truth.gt_keypoints = Keypoints(torch.cat([points, 2 * torch.ones(len(truth), 17, 1)], 2))
        if hasattr(student, "sem_seg_head"):
            record["sem_seg"] = torch.arange(height * width).view(height, width) % STUFF
            if not hasattr(student, "roi_heads"):
                del record["instances"]
        found.append(record)
    return found


@lru_cache(maxsize=None)
def methods() -> Tuple[Method, ...]:
    found = known_methods()
    return tuple(sorted(found, key=lambda method: method.name != "shared_kd"))


@dataclass
class Outcome:
    """What each recipe says to a pair.

    Args:
        works: the recipes whose losses were computed and learned from.
        refused: recipe -> the message; ``*``: the pair itself.
    """

    works: List[str] = field(default_factory=list)
    refused: Dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if "*" in self.refused:
            return "refused"
        if not self.refused:
            return f"works, all {len(self.works)}"
        return f"works, but for {', '.join(sorted(self.refused))}"


def run(student: Row, teacher: Row) -> Outcome:
    """Step a pair once, with all recipes that claim its family and accept it."""
    found = Outcome()
    try:
        ours, theirs = model_of(student, 0), model_of(teacher, 1)
        count = image_channels(ours)
        image_format = "L" if count == 1 else getattr(ours, "input_format", None) or "RGB"
        source = FrozenTeacher(theirs, "", None, pyramid=teacher.pyramid)
        options = dict(student=ours, input_format=image_format, pyramid=student.pyramid)
        SharedKD(teacher=source, **options)
        source.prepare()
    except ConfigError as e:
        found.refused["*"] = str(e)
        return found
    stages, inputs = {}, records(ours, count)
    for method in methods():
        node = method.stages.get(family(ours))
        if node is None:
            continue
        try:
            pair = SharedKD(teacher=source, stages=instantiate(node), **options)
            pair.check_record(inputs[0])
        except ConfigError as e:
            found.refused[method.name] = str(e)
            continue
        stages.update({f"{method.name}-{k}": x for k, x in instantiate(node).items() if x.weight})
        found.works.append(method.name)
    pair = SharedKD(teacher=source, stages=stages, **options).train()
    pair.to(memory_format=torch.channels_last)
    try:
        with EventStorage(0):
            losses = pair(inputs, {name: x.full for name, x in pair.stages.items()})
    except ConfigError as e:
        return Outcome(refused={"*": str(e)})
    for name, value in losses.items():
        assert value.isfinite(), (student.name, teacher.name, name)
    for method in found.works:
        assert any(name.startswith(f"distill/{method}-") for name in losses), (student.name, method)
    terms = sum(x for name, x in losses.items() if name.startswith("distill/"))
    weights = [p for p in ours.backbone.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(terms, weights, allow_unused=True)
    assert any(g is not None and g.any() for g in gradients), (student.name, teacher.name)
    return found


def outcomes(row: Row) -> Tuple[Outcome, Outcome]:
    """The row as a student of its partner, and as its teacher."""
    partner = BY_NAME[row.partner]
    return run(row, partner), run(partner, row)


# --- the page -----------------------------------------------------------------------------------

HEAD = """# Families of detectors

Each row was built at reduced size and trained for a step on the CPU, as the student and as the teacher of a small
detector of the row's own kind (a Faster R-CNN, where no other is named), with every recipe that
`tools/compare_methods.py --list` has for the student's family. *Works* means that all its losses were finite and
reached the student's backbone. `make nightly` runs the table again, and fails where this page says otherwise.

All rows were also run with Detectron2's main of June 2026 (02b5c4e), with the 18 recipes of that time. ViTDet, MViTv2,
Swin and timm's EfficientNet-B0 (timm 1.0.31), which Detectron2 0.6 does not have, were run there alone: all 18 worked,
as student and as teacher. The recipes added since (`bckd`, `crosskd`, `dist`, `foundation`, `pgd` and
`self_reflection`) were not run with them.

A detector of a family without published settings takes those of Faster R-CNN, or those of RetinaNet if its pyramid
begins at stride 8. Strides of a recipe that the pair does not have are left out, and named in the log.

| detector | as student | as teacher |
| --- | --- | --- |
"""

TAIL = """
## What the refusals say

Each is one line, before training starts (for a backbone that runs twice: in the first step).

"""


def line(name: str) -> Optional[str]:
    """The page's line of a row; None if it has none."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    return next((x for x in lines if x.startswith(f"| {name} |")), None)


def page(found: Dict[str, Tuple[Outcome, Outcome]]) -> str:
    lines, reasons = [], defaultdict(list)
    for row in ROWS:
        lines.append(f"| {row.name} | {' | '.join(map(str, found[row.name]))} |")
        for who, outcome in zip(("student", "teacher"), found[row.name]):
            for recipe, message in outcome.refused.items():
                reasons[message].append((row.name, who, recipe))
    grouped = defaultdict(list)
    for message, places in reasons.items():
        key, _, text = message.partition(": ")
        grouped[text].append((message, places))
    words = []
    for text, entries in grouped.items():
        message, _ = entries[0]
        rows = list(
            dict.fromkeys(f"{row} ({who})" for _, places in entries for row, who, _ in places)
        )
        words.append(f"- `{message}`\n  — {', '.join(rows)}")
    return HEAD + "\n".join(lines) + "\n" + TAIL + "\n".join(words) + "\n"


def main() -> None:
    found = {}
    for row in ROWS:
        found[row.name] = outcomes(row)
        print(row.name, "|", *found[row.name], flush=True)
    Path(PAGE).write_text(page(found))


if __name__ == "__main__":
    main()
