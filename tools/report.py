#!/usr/bin/env python
"""Write one HTML file that shows what happened in a training run or a comparison.

    tools/report.py output/comparison
    tools/report.py output/student --output student.html
    tools/report.py --config-file configs/custom_coco.py train.output_dir=output/student ...

The folder is a comparison's, a run's, or one that holds runs (such as that of the demo); with the
arguments of a training command, the folder of that run. The file has
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

from arguments import add_config_arguments, overrides_of

from sharedkd.config import load_config
from sharedkd.errors import SharedKDError
from sharedkd.lab.compare.events import write_events
from sharedkd.lab.report import write_report
from sharedkd.lab.runs import short
from sharedkd.lab.scores import read_comparison


def _folder(args: argparse.Namespace) -> Path:
    """The output folder of the run that the arguments of a training command start."""
    cfg = load_config(args.config_file, overrides_of(args, args.folder), without_data=True)
    return Path(cfg.train.output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="*", metavar="DIR | key=value")
    parser.add_argument("--config-file", metavar="FILE", help="of a run, in place of its folder")
    add_config_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: DIR/report.html")
    parser.add_argument("--features", type=Path, metavar="DIR", help="default: DIR/features")
    parser.add_argument("--detections", type=Path, metavar="DIR", help="default: DIR/detections")
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="of a comparison: its settings, results and pictures to DIR/tensorboard, too",
    )
    args = parser.parse_intermixed_args()
    if not args.config_file and len(args.folder) != 1:
        parser.error("name one folder, or --config-file")
    try:
        folder = Path(args.folder[0]) if not args.config_file else _folder(args)
        if args.tensorboard:
            write_events(folder, read_comparison(folder, "--tensorboard"))
        path = write_report(folder, args.output, args.features, args.detections)
    except (SharedKDError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{short(path)} ({path.stat().st_size / 1024:,.0f} kB)")
