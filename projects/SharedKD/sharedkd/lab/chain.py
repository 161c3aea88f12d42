"""A chain of teacher assistants: each student is the teacher of the next one."""

from pathlib import Path
from typing import List, Optional, Sequence

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
    """
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
