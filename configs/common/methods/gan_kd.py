"""GAN-KD for one-stage detectors: the student's maps should pass for the teacher's."""

from detectron2.config import LazyCall as L

from sharedkd import Stage
from sharedkd.losses import GanKD
from sharedkd.modeling.stages import stage_dict

paper = (
    "in the style of GAN-Knowledge Distillation for One-Stage Object Detection, IEEE Access 2020"
)

# Published: the adversarial loss is added to the detector's losses with weight 1.  The
# discriminators' weight of 1 is ours: with SGD it is their learning rate relative to the student's;
# AdamW divides it out again.
_stages = L(stage_dict)(gan_kd=L(Stage)(loss=L(GanKD)(discriminator=1.0), weight=1.0))

# Student's family -> what `model.stages` becomes.  Two-stage detectors are ours.
stages = dict(faster_rcnn=_stages, mask_rcnn=_stages, retinanet=_stages, fcos=_stages)
