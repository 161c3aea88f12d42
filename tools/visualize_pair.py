#!/usr/bin/env python
"""Show what trained detectors find: side by side, AP per class and size, kinds of mistakes.

    tools/visualize_pair.py output/comparison --output output/comparison/detections
    tools/visualize_pair.py output/student --models plain=output/plain/model_final.pth \\
        --output output/student/detections
    tools/visualize_pair.py --config-file configs/custom_coco.py key=value --output DIR \\
        --models plain=A.pth distilled=B.pth

The folder is a comparison's, a run's, or one that holds runs (such as that of the demo). Of a
comparison, --models names methods; beside runs they come first: what these are compared with. The
teacher is added where a config has one. Pictures show the images where two models differ most;
docs/analysis.md has the definitions. Writes detections.md (start there), detections.json and pictures.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
import shlex
from pathlib import Path

from arguments import errors_in_words, names

from sharedkd.lab.analysis.models import sources
from sharedkd.lab.analysis.visualize import table, visualize

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("given", nargs="*", metavar="DIR key=value")
    parser.add_argument("--config-file", type=Path, metavar="FILE")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--seed", type=int, metavar="N", help="of a comparison")
    parser.add_argument("--images", type=int, metavar="N", help="of the validation set (all)")
    parser.add_argument("--pictures", type=int, default=6, metavar="N", help="images drawn")
    parser.add_argument("--score-threshold", type=float, default=0.5, metavar="X")
    parser.add_argument(
        "--between",
        type=names,
        default=[],
        metavar="A,B",
        help="the models whose difference chooses the images (the first two)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_intermixed_args()
    folders = [x for x in args.given if "=" not in x]
    if len(folders) > 1:
        parser.error(f"several folders: {' '.join(folders)}")
    folder = Path(folders[0]) if folders else None
    with errors_in_words():
        found = visualize(
            sources(folder, args.config_file, args.models, args.seed),
            args.output,
            [x for x in args.given if "=" in x],
            args.images,
            args.pictures,
            args.score_threshold,
            args.between,
            command=shlex.join(["tools/visualize_pair.py", *sys.argv[1:]]),
        )
    print(table(found), found["sentence"], args.output / "detections.md", sep="\n\n")
