#!/usr/bin/env python
"""Label images by a teacher: write its sure detections as a COCO json to train on.

    tools/label_images.py --teacher output/teacher --images more --output pseudo.json \\
        --data-json train.json --data-images train --threshold 0.6,cell=0.8

Then train with data.train_json=[train.json,pseudo.json] data.train_images=[train,more].  Classes are
matched by name with those of --data-json, whose images are left out; so is an image without a sure
detection.  It is done once, before the training; each object keeps its score.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse

from arguments import add_teacher_arguments, errors_in_words

from sharedkd.lab.label import label_images

if __name__ == "__main__":
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add_teacher_arguments(parser, required=True)
    parser.add_argument("--images", required=True, metavar="FOLDER", help="what to label")
    parser.add_argument("--list", metavar="FILE", help="a COCO json: only the images it lists")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument(
        "--threshold",
        default="0.5",
        metavar="X|NAME=X",
        help="least score; by class: 0.5,cell=0.8 (default: 0.5)",
    )
    parser.add_argument("--data-json", metavar="FILE", help="labels of people, with the classes")
    parser.add_argument(
        "--data-images", metavar="FOLDER", help="of --data-json (default: --images)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the teacher's config")
    args = parser.parse_intermixed_args()
    with errors_in_words():
        found = label_images(
            args.teacher,
            args.images,
            args.output,
            args.threshold,
            args.teacher_weights,
            args.data_json,
            args.data_images,
            args.list,
            args.overrides,
        )
    counts = ", ".join(f"{name} {count}" for name, count in found.objects.most_common())
    print(f"{args.output}: {found.images} images, {found.objects.total()} objects ({counts})")
    if found.unreadable:
        print(f"{found.unreadable} images that cannot be loaded are left out")
    if found.empty:
        print(f"{found.empty} images without a sure detection are left out")
    if args.data_json:
        folders = f"[{args.data_images or args.images},{args.images}]"
        print(f"data.train_json=[{args.data_json},{args.output}] data.train_images={folders}")
