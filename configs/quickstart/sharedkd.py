"""The embedded example: plain.py, distilled from the teacher that teacher.py trains."""

from pathlib import Path

from detectron2.config import LazyCall as L

from sharedkd import FrozenTeacher, SharedKD
from sharedkd.config import shared_kd_stages

from .plain import data, dataloader, lr_multiplier, model, optimizer, shapes, train

_runs = Path(train.output_dir).parent
# It starts with copies of the teacher's FPN and heads.
train.update(output_dir=str(_runs / "sharedkd"), inherit=["neck", "head"])
model = L(SharedKD)(
    student=model,
    teacher=L(FrozenTeacher)(
        config=str(Path(__file__).with_name("teacher.py")),
        weights=str(_runs / "teacher/model_final.pth"),
    ),
    # Three times the default: this run stops early, when a strong teacher is ahead.
    stages=shared_kd_stages(share=3.0, balance=None),  # no level is constant here
    input_format="${dataloader.train.mapper.image_format}",
)
