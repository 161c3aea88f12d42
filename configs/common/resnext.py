"""ResNeXt-101-32x8d for LazyConfig models; Detectron2's make_default_stages covers plain ResNets only."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

INIT = "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl"
PIXEL_STD = [57.375, 57.120, 58.395]


def use_x101(model):
    """Give a R50 detector's LazyConfig node a ResNeXt-101-32x8d bottom-up network."""
    blocks, widths = [3, 4, 23, 3], [64, 256, 512, 1024, 2048]
    model.backbone.bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=n,
            stride_per_block=[1 if i == 0 else 2] + [1] * (n - 1),
            in_channels=widths[i],
            out_channels=widths[i + 1],
            bottleneck_channels=256 * 2**i,  # 32 groups of 8 channels, doubling
            num_groups=32,
            norm="FrozenBN",
            stride_in_1x1=False,
        )
        for i, n in enumerate(blocks)
    ]
    model.pixel_std = PIXEL_STD
    return model
