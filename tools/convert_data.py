#!/usr/bin/env python
"""Write COCO json from a YOLO data set or from Pascal VOC's xml files; images stay where they are.

    tools/convert_data.py yolo data.yaml OUT      # OUT/train.json, OUT/val.json
    tools/convert_data.py voc FOLDER OUT          # one for each list of ImageSets/Main, or OUT/all.json

Of YOLO, boxes and polygons are converted, of VOC boxes.  The overrides to train with are printed.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from arguments import errors_in_words

from sharedkd.lab.convert import convert_voc, convert_yolo

if __name__ == "__main__":
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("format", choices=["yolo", "voc"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with errors_in_words():
        written = {"yolo": convert_yolo, "voc": convert_voc}[args.format](args.source, args.out)
    for split, (path, folder) in written.items():
        if split in ("train", "val"):
            print(f"data.{split}_json={path} data.{split}_images={folder}")
