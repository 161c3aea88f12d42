"""The embedded example: plain.py, distilled from the teacher that teacher.py trains."""

from pathlib import Path

from sharedkd.config import distill

from .plain import data, dataloader, lr_multiplier, model, optimizer, shapes, train

_runs = Path(train.output_dir).parent

model = distill(
    student=model,
    teacher=str(Path(__file__).resolve().with_name("teacher.py")),
    weights=str(_runs / "teacher/model_final.pth"),
)
train.output_dir = str(_runs / "sharedkd")
