"""The embedded example of tools/demo.py: three training commands, what they find, a report."""

import shlex
import time
from pathlib import Path
from typing import List, Sequence

from detectron2.config import instantiate

from sharedkd.config import load_config
from sharedkd.lab.analysis.models import Source
from sharedkd.lab.analysis.visualize import table, visualize

from .report import write_report
from .runs import Run, short, tool

__all__ = ["run_demo"]

TITLES = {
    "teacher": "teacher, ResNet-50",
    "plain": "plain student, ResNet-18",
    "sharedkd": "Shared-KD student, ResNet-18",
}


def run_demo(root: Path, output: Path, overrides: Sequence[str] = ()) -> str:
    """Draw data, train what is not trained yet, compare, and return the table.

    ``root`` is the repository; runs, table and pictures go to ``output``; the configs of all runs get
    the ``overrides``.
    """
    begin = time.perf_counter()
    configs = root / "configs/quickstart"
    print("[1/5] draw the data set", flush=True)
    shapes = load_config(str(configs / "plain.py"), overrides, without_data=True).shapes
    print(f"      {shapes.train} + {shapes.val} images in {short(instantiate(shapes))}")

    arms = {name: _run(configs / f"{name}.py", root, output, overrides) for name in TITLES}
    teacher, student = arms["teacher"], arms["sharedkd"]
    for arm in arms.values():
        arm.check(teacher if arm is student else None)
    for number, (name, title) in enumerate(TITLES.items(), start=2):
        print(f"[{number}/5] train and evaluate: {title}", flush=True)
        arms[name].finish(root)

    print("[5/5] compare", flush=True)
    models = [
        Source(TITLES[name], arms[name].folder / "config.yaml", arms[name].weights)
        for name in ("plain", "sharedkd", "teacher")
    ]
    command = tool("visualize_pair.py", root)
    command += [short(output), "--output", short(output / "detections")]
    found = visualize(models, output / "detections", command=shlex.join(command))
    (output / "table.md").write_text(table(found) + "\n")
    print(f"\n{table(found)}\n\n{found['sentence']}\n")
    print(
        f"A small example: {shapes.train} drawn images, {student.cfg.train.max_iter} iterations a student, "
        "random initial weights, and one seed.\nThe Shared-KD student starts with the teacher's FPN and heads; "
        f"docs/results.md has what that alone gains.\n{shapes.val} validation images and one seed cannot tell "
        "small differences from chance.\n"
    )
    for path in (output / "table.md", output / "detections/detections.md", write_report(output)):
        print(short(path))
    export = tool("export_student.py", root)
    export += ["--config-file", short(student.folder / "config.yaml")]
    export += ["--format", "torchscript,onnx", "--output", short(output / "deployed")]
    print(
        f"\nThe student as a file that needs neither this package nor Detectron2:\n{shlex.join(export)}\n"
    )
    print(f"{(time.perf_counter() - begin) / 60:.1f} minutes")
    return table(found)


def _run(config: Path, root: Path, output: Path, overrides: Sequence[str]) -> Run:
    """The run of a config; the overrides of folders are left out for the default output folder."""
    folder = output.resolve() / config.stem
    extra: List[str] = []
    if output.resolve() != root / "output/demo":
        extra.append(f"train.output_dir={folder}")
        if config.stem == "sharedkd":
            extra.append(f"model.teacher.weights={output.resolve() / 'teacher/model_final.pth'}")
    return Run(config, [*extra, *overrides], folder)
