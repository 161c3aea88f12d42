"""A chain of teacher assistants: each student is the teacher of the next one."""

from pathlib import Path
from typing import List, Optional, Sequence

from omegaconf import DictConfig

from sharedkd.config import load_config
from sharedkd.config.build import construct
from sharedkd.modeling.meta_arch import SharedKD
from sharedkd.modeling.teachers import FrozenTeacher

from .report import write_report
from .runs import Run, short
from .tables import results_table

__all__ = ["run_chain"]


def run_chain(
    root: Path,
    teacher: str,
    weights: Optional[str],
    students: Sequence[str],
    output: Path,
    overrides: Sequence[str] = (),
) -> str:
    """Train each student with the one before it as its teacher, and return a table of them.

    Improved Knowledge Distillation via Teacher Assistant (AAAI 2020).  Started again, it skips
    finished links and continues an interrupted one.

    Args:
        root: the repository.
        teacher, weights: of the first student, as the training command's flags take them.
        students: their configs, from the largest to the smallest.
        output: the folder of the links' runs, the table and the report.
        overrides: ``key=value`` for the configs of all students.

    Raises:
        ConfigError: a link that cannot be trained, before the first one is.
    """
    first = [f"distill.teacher={teacher}", *([f"distill.weights={weights}"] if weights else [])]
    _check_links([load_config(config, [*first, *overrides]) for config in students])
    before: Optional[Run] = None
    rows: List[dict] = []
    for number, config in enumerate(students, start=1):
        folder = output.resolve() / f"{number}_{Path(config).stem}"
        pairing = [f"distill.teacher={teacher}"]
        pairing += [f"distill.weights={weights}"] if weights else []
        link = Run(Path(config), [*pairing, *overrides, f"train.output_dir={folder}"], folder)
        print(f"[{number}/{len(students)}] {short(teacher)} teaches {config}", flush=True)
        link.check(before)
        link.finish(root)
        size = link.record["parameters"]["student"]
        rows.append({"name": f"{number}: {config}", "parameters": size, **link.record["results"]})
        before, teacher, weights = link, str(folder), None
    table = results_table(rows)
    (output / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\n{short(write_report(output))}")
    return table


def _check_links(cfgs: Sequence[DictConfig]) -> None:
    """Build each student as a pair with the one before it, whose weights do not matter here."""
    for teacher, cfg in zip(cfgs, cfgs[1:]):
        if cfg.model.get("teachers") or cfg.model.get("peers"):
            continue  # which are a part of the pair
        theirs = construct(teacher.model.student, "model.student")
        SharedKD(
            student=construct(cfg.model.student, "model.student"),
            teacher=FrozenTeacher(
                theirs,
                "",
                teacher.model.input_format,
                fold=False,
                **{k: cfg.model.teacher[k] for k in ("scale", "pyramid") if k in cfg.model.teacher},
            ),
            stages=construct(cfg.model.stages, "model.stages"),
            input_format=cfg.model.input_format,
            pyramid=cfg.model.get("pyramid"),
        )
