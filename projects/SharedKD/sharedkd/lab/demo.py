"""The embedded example of tools/demo.py: three training commands, a table, two pictures, a report."""

import shlex
import time
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, Mapping, Sequence

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from torch import nn

from sharedkd.config import load_config, student_only
from sharedkd.engine.parts import build
from sharedkd.errors import ConfigError
from sharedkd.lab.analysis.pictures import loss_curves, side_by_side
from sharedkd.modeling.detectors import count_parameters

from .report import write_report
from .runs import Run, short, tool
from .tables import results_table

__all__ = ["run_demo", "seconds_per_image"]

TITLES = {
    "teacher": "teacher, ResNet-50",
    "plain": "plain student, ResNet-18",
    "sharedkd": "Shared-KD student, ResNet-18",
}


def run_demo(root: Path, output: Path, overrides: Sequence[str] = ()) -> str:
    """Draw data, train what is not trained yet, compare, and say where pictures and report are.

    Args:
        root: the repository.
        output: folder of the runs, the table and the pictures.
        overrides: ``key=value`` for the configs of all three runs.

    Returns:
        the table.

    Raises:
        ConfigError: an override that cannot be applied, an output folder with other runs in it, or
            a run that failed.
    """
    begin = time.perf_counter()
    configs = root / "configs/quickstart"
    _announce(1, "draw the data set")
    shapes = load_config(str(configs / "plain.py"), overrides, without_data=True).shapes
    print(f"      {shapes.train} + {shapes.val} images in {short(instantiate(shapes))}")

    arms = {name: _run(configs / f"{name}.py", root, output, overrides) for name in TITLES}
    for arm in arms.values():
        if not arm.has_these_settings():
            _refuse(arm.folder, "holds a run with other settings")
    teacher, student = arms["teacher"], arms["sharedkd"]
    if student.started and not (teacher.finished and student.is_younger(teacher)):
        _refuse(student.folder, f"holds a student of another teacher than {short(teacher.weights)}")
    for number, (name, title) in enumerate(TITLES.items(), start=2):
        _announce(number, f"train and evaluate: {title}")
        arms[name].finish(root)

    _announce(5, "compare")
    models = {name: _model(arm) for name, arm in arms.items()}
    cfg = arms["plain"].cfg
    mapper = instantiate(cfg.dataloader.test.mapper)
    samples = DatasetCatalog.get(f"{cfg.data.name}_val")
    times = seconds_per_image(models, [mapper(sample) for sample in samples[:30]])
    table = results_table(
        [
            {
                "name": title,
                **arms[name].record["results"],
                "parameters": count_parameters(models[name]),
                "seconds_per_image": times[name],
            }
            for name, title in TITLES.items()
        ]
    )
    columns = ("plain", "sharedkd", "teacher")
    files = [output / name for name in ("table.md", "detections.png", "losses.png")]
    files[0].write_text(table + "\n")
    side_by_side(
        f"{cfg.data.name}_val", {TITLES[n]: models[n] for n in columns}, mapper, str(files[1])
    )
    loss_curves(
        {n: str(arms[n].folder / "metrics.json") for n in ("plain", "sharedkd")}, str(files[2])
    )
    print(f"\n{table}\n")
    print(
        f"A small example: {shapes.train} drawn images, {cfg.train.max_iter} iterations a student, random "
        f"initial weights, and one seed.\n{shapes.val} validation images and one seed cannot tell "
        "small differences from chance; docs/results.md has measurements.\n"
    )
    for path in [*files, write_report(output)]:
        print(short(path))
    export = tool("export_student.py", root)
    export += ["--config-file", short(student.folder / "config.yaml")]
    export += ["--format", "torchscript,onnx", "--output", short(output / "deployed")]
    print(
        f"\nThe student as a file that needs neither this package nor Detectron2:\n{shlex.join(export)}\n"
    )
    print(f"{(time.perf_counter() - begin) / 60:.1f} minutes")
    return table


def seconds_per_image(
    models: Mapping[str, nn.Module], inputs: Sequence[Dict[str, Any]], warm_up: int = 3
) -> Dict[str, float]:
    """Median time of inference on one image, in seconds.

    The models take turns, so that whatever else the machine does hits them alike.

    Args:
        models: name to a Detectron2 model in evaluation mode.
        inputs: mapped test images.
        warm_up: untimed images per model.
    """
    times: Dict[str, List[float]] = {name: [] for name in models}
    with torch.no_grad():
        for sample in [*inputs[:warm_up], *inputs]:
            for name, model in models.items():
                start = time.perf_counter()
                model([sample])
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    return {name: median(values[min(warm_up, len(inputs)) :]) for name, values in times.items()}


def _model(run: Run) -> nn.Module:
    """The trained detector, alone and in evaluation mode."""
    cfg = student_only(run.cfg)
    cfg.train.init_checkpoint = str(run.weights)
    return build(cfg, trained=True).eval()


def _run(config: Path, root: Path, output: Path, overrides: Sequence[str]) -> Run:
    """The run of a config; the overrides of folders are left out for the default output folder."""
    folder = output.resolve() / config.stem
    extra: List[str] = []
    if output.resolve() != root / "output/demo":
        extra.append(f"train.output_dir={folder}")
        if config.stem == "sharedkd":
            extra.append(f"model.teacher.weights={output.resolve() / 'teacher/model_final.pth'}")
    return Run(config, [*extra, *overrides], folder)


def _refuse(folder: Path, reason: str) -> None:
    raise ConfigError(
        "--output", short(folder), reason, "remove that folder, or name another with --output DIR"
    )


def _announce(number: int, what: str) -> None:
    print(f"[{number}/5] {what}", flush=True)
