"""Two students that train together and teach each other: a ResNet-18 and a ResNet-50."""

from detectron2.config import LazyCall as L

from sharedkd.config import shared_kd_stages
from sharedkd.modeling.teachers import Peer

from ..common.small_models import small_faster_rcnn
from ..custom_coco import data, dataloader, lr_multiplier, model, optimizer, train

model.teacher = None
train.inherit = []  # from no trained teacher
model.stages.identical.teacher = "large"
model.peers = dict(
    large=L(Peer)(
        student=small_faster_rcnn(depth=50, num_classes="${data.num_classes}"),
        stages=shared_kd_stages(),
    )
)
