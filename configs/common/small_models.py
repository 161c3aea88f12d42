"""Detectors small enough to train on a CPU.

A ResNet of any depth, a 128-wide FPN, 256-wide heads and 64 sampled regions an image.
"""

from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config

# Torchvision's normalisation: what ImageNet ResNet-18/34/50 weights were trained with.
IMAGENET_RGB = dict(
    pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375], input_format="RGB"
)
FPN_WIDTH = 128
ANCHORS = [16, 32, 64, 128, 256]


def _small_backbone(model, depth, width=FPN_WIDTH):
    model.backbone.out_channels = width
    bottom_up = model.backbone.bottom_up
    bottom_up.freeze_at = 0
    bottom_up.stem.norm = "${..stages.norm}"
    # With the weights' own statistics: those of a few small images a step are worse.  From random
    # weights, BN.
    bottom_up.stages.update(depth=depth, norm="FrozenBN")
    if depth < 50:
        del bottom_up.stages.stride_in_1x1  # basic blocks have no 1x1 convolution
    else:
        bottom_up.stages.stride_in_1x1 = False


def small_mask_rcnn(depth, num_classes, width=FPN_WIDTH):
    """Mask R-CNN with a ResNet of the given depth and an FPN of the given width."""
    model = get_config("common/models/mask_rcnn_fpn.py").model
    model.update(IMAGENET_RGB)
    _small_backbone(model, depth, width)
    model.proposal_generator.head.in_channels = width
    model.proposal_generator.anchor_generator.sizes = [[s] for s in ANCHORS]
    model.proposal_generator.update(pre_nms_topk=(500, 300), post_nms_topk=(300, 200))
    heads = model.roi_heads
    heads.update(num_classes=num_classes, batch_size_per_image=64)
    heads.box_pooler.sampling_ratio = heads.mask_pooler.sampling_ratio = 2
    heads.box_head.update(
        input_shape=ShapeSpec(channels=width, height=7, width=7), fc_dims=[256, 256]
    )
    heads.box_predictor.input_shape = ShapeSpec(channels=256)
    heads.mask_head.update(
        input_shape=ShapeSpec(channels=width, height=14, width=14), conv_dims=[128, 128, 128]
    )
    return model


def tiny_mask_rcnn(depth, num_classes, width=64):
    """Mask R-CNN for images of about 100 pixels that learns within minutes from random weights."""
    model = small_mask_rcnn(depth, num_classes, width)
    model.backbone.norm = model.backbone.bottom_up.stages.norm = "BN"
    heads = model.roi_heads
    heads.batch_size_per_image = 32
    # Anchors are half as large as Detectron2's, so the sizes that share a level are, too.
    # RoIAlign on the CPU costs a backbone's time with more than one sample a cell.
    for pooler in (heads.box_pooler, heads.mask_pooler):
        pooler.update(canonical_box_size=112, sampling_ratio=1)
    heads.box_predictor.cls_agnostic_bbox_reg = True
    heads.mask_head.update(conv_dims=[width, width], num_classes=1)  # whatever the class
    return model


def small_faster_rcnn(depth, num_classes, width=FPN_WIDTH):
    """Faster R-CNN with a ResNet of the given depth and an FPN of the given width."""
    model = small_mask_rcnn(depth, num_classes, width)
    for key in [k for k in model.roi_heads if k.startswith("mask_")]:
        del model.roi_heads[key]
    return model


def small_retinanet(depth, num_classes):
    """RetinaNet with a ResNet of the given depth."""
    model = get_config("common/models/retinanet.py").model
    model.update(IMAGENET_RGB)
    _small_backbone(model, depth)
    model.num_classes = num_classes
    model.backbone.top_block.in_channels = 512 if depth < 50 else 2048
    model.head.update(input_shape=[ShapeSpec(channels=FPN_WIDTH)] * 5, conv_dims=[128, 128])
    model.anchor_generator.sizes = [[s, s * 2 ** (1 / 3), s * 2 ** (2 / 3)] for s in ANCHORS]
    return model


def small_cascade_mask_rcnn(depth, num_classes):
    """Cascade Mask R-CNN with a ResNet of the given depth."""
    model = small_mask_rcnn(depth, num_classes)
    cascade = get_config("common/models/cascade_rcnn.py").model.roi_heads
    for box_head, box_predictor in zip(cascade.box_heads, cascade.box_predictors):
        box_head.update(model.roi_heads.box_head)
        box_predictor.input_shape = model.roi_heads.box_predictor.input_shape
    cascade.update({k: v for k, v in model.roi_heads.items() if k in cascade and k != "_target_"})
    model.roi_heads = cascade
    return model


def small_fcos(depth, num_classes):
    """FCOS with a ResNet of the given depth."""
    model = get_config("common/models/fcos.py").model
    model.update({k: v for k, v in IMAGENET_RGB.items() if k != "input_format"})
    _small_backbone(model, depth)
    model.num_classes = num_classes
    model.backbone.top_block.in_channels = FPN_WIDTH
    model.head.update(input_shape=[ShapeSpec(channels=FPN_WIDTH)] * 5, conv_dims=[128, 128])
    return model
