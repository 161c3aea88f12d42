#!/usr/bin/env python
"""Write one HTML file that shows what happened in a training run or a comparison.

    tools/report.py output/comparison
    tools/report.py output/student --output student.html

The folder is a comparison's, a run's, or one that holds runs (such as that of the demo). The file has
all in it, needs no network, and is DIR/report.html by default. What tools/analyze_features.py wrote
to DIR/features and tools/visualize_pair.py to DIR/detections becomes part of it; without them the
report says how to make them. docs/report.md tells what is in it.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from sharedkd.errors import SharedKDError
from sharedkd.lab.compare.events import write_events
from sharedkd.lab.report import write_report
from sharedkd.lab.runs import short
from sharedkd.lab.scores import read_comparison

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: DIR/report.html")
    parser.add_argument("--features", type=Path, metavar="DIR", help="default: DIR/features")
    parser.add_argument("--detections", type=Path, metavar="DIR", help="default: DIR/detections")
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="of a comparison: its settings, results and pictures to DIR/tensorboard, too",
    )
    args = parser.parse_args()
    try:
        if args.tensorboard:
            write_events(args.folder, read_comparison(args.folder, "--tensorboard"))
        path = write_report(args.folder, args.output, args.features, args.detections)
    except (SharedKDError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{short(path)} ({path.stat().st_size / 1024:,.0f} kB)")
