#!/usr/bin/env python
"""The embedded example: draw data, train a teacher, a plain and a distilled student, compare them.

When it runs again, it skips finished runs and continues an interrupted one.  Overrides go to all
three runs, for example:

    tools/demo.py --output output/demo_short train.max_iter=20
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from arguments import errors_in_words

from sharedkd.engine.interrupt import interruptible
from sharedkd.lab.demo import run_demo

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output/demo", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    with errors_in_words(), interruptible("the same command continues"):
        run_demo(ROOT, args.output, args.overrides)
