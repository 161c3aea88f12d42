"""Detectors for phones and small boards."""

from detectron2.config import LazyCall as L

from sharedkd.modeling.torchvision_backbone import TorchvisionBackbone

from .small_models import small_faster_rcnn

FPN_WIDTH = 96
# The last map of each stride; torchvision's model has 24, 40, 112 and 960 channels there.
MOBILENET_V3_LARGE = dict(c2="features.3", c3="features.6", c4="features.12", c5="features.16")


def mobile_faster_rcnn(num_classes):
    """Faster R-CNN with MobileNetV3-Large and an FPN of 96 channels."""
    model = small_faster_rcnn(18, num_classes, FPN_WIDTH)
    model.backbone.bottom_up = L(TorchvisionBackbone)(
        name="mobilenet_v3_large", features=MOBILENET_V3_LARGE
    )
    model.backbone.in_features = list(MOBILENET_V3_LARGE)
    return model
