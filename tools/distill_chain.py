#!/usr/bin/env python
"""Train ever smaller detectors, each with the one before it as its teacher (teacher assistants).

When the command runs again, it skips finished runs and continues an interrupted one.
Overrides go to the runs of all students, and so does the method (default: shared_kd). R101 -> R50 -> R18:

    tools/distill_chain.py --teacher r101.yaml --teacher-weights r101.pth --students r50.yaml,r18.yaml \\
        --output output/chain train.max_iter=90000
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from arguments import add_config_arguments, errors_in_words, names

from sharedkd.engine.interrupt import interruptible
from sharedkd.lab.chain import run_chain

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--students",
        type=names,
        required=True,
        metavar="A,B,...",
        help="configs, from large to small",
    )
    parser.add_argument("--output", type=Path, default=Path("output/chain"), metavar="DIR")
    add_config_arguments(parser, depth=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if not args.teacher:
        parser.error("name the first teacher by --teacher")
    method = [f"distill.method={args.method}"] if args.method else []
    with errors_in_words(), interruptible("the same command continues"):
        run_chain(
            ROOT,
            args.teacher,
            args.teacher_weights,
            args.students,
            args.output,
            [*method, *args.overrides],
        )
