#!/usr/bin/env python
"""Measure how far apart the feature levels of a pair are, before, during and after training.

    tools/analyze_features.py --config-file output/student/config.yaml --output output/student/features
    tools/analyze_features.py --config-file configs/custom_coco.py --output output/student/features \\
        --checkpoint plain=output/plain/model_final.pth,distilled=output/student/model_final.pth $DATA

All level pairs student-teacher, student-student and teacher-teacher, on images of the config's
validation set: the losses' aligned MSE, cosine, and linear CKA. The initial weights are always the
first state; without --checkpoint, all that the run's folder holds follow. docs/analysis.md has the
definitions. Writes features.md (start there), features.json and pictures.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
import shlex
from pathlib import Path

from arguments import errors_in_words

from sharedkd.lab.analysis.features import analyze_features, named_checkpoints

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a pair")
    parser.add_argument(
        "--checkpoint",
        type=named_checkpoints,
        metavar="FILE,NAME=FILE,...",
        help="states of the student after the initial one (default: those of the run's folder)",
    )
    parser.add_argument("--images", type=int, default=48, metavar="N")
    parser.add_argument("--pictures", type=int, default=2, metavar="N", help="images with maps")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    with errors_in_words():
        report = analyze_features(
            args.config_file,
            args.checkpoint,
            args.images,
            args.output,
            args.overrides,
            args.pictures,
            command=shlex.join(["tools/analyze_features.py", *sys.argv[1:]]),
        )
    print(report)
