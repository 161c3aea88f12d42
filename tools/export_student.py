#!/usr/bin/env python
"""Write a trained student into a file that runs without this package, and check that file.

    tools/export_student.py --config-file output/student/config.yaml --format torchscript,onnx \\
        --output output/deployed
    tools/export_student.py --config-file configs/custom_coco.py --weights model_final.pth \\
        --images street.jpg --format onnx --output output/deployed data.num_classes=3

Formats: torchscript and onnx. Beside each file lies a .json with classes,
input, resizing and outputs. docs/deployment.md has an example.

The weights are --weights, else train.init_checkpoint of this command, else, with the config.yaml of a
run, what that run saved last.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
import logging
from pathlib import Path

from arguments import add_config_arguments, errors_in_words, names, overrides_of
from omegaconf import OmegaConf

from sharedkd.config import load_config
from sharedkd.engine.checkpoint import has_run
from sharedkd.lab.export import FORMATS, export_student, table
from sharedkd.lab.output import write_json
from sharedkd.modeling.detectors import weights_of


def size(text: str):
    height, width = map(int, text.lower().split("x"))
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not HxW")
    return height, width


def config(args):
    """The config with the weights to export; without data where images are named and data are not."""
    cfg = load_config(args.config_file, args.overrides, keep_teacher=True, without_data=True)
    named = OmegaConf.select(cfg, "data.val_json") or []
    annotations = [named] if isinstance(named, str) else named
    there = annotations and all(map(os.path.isfile, annotations))
    if "data" in cfg and (not args.images or there):
        cfg = load_config(args.config_file, args.overrides, keep_teacher=True)
    if args.weights:
        cfg.train.init_checkpoint = args.weights
    elif not any(x.startswith("train.init_checkpoint=") for x in args.overrides):
        run = Path(args.config_file).parent
        if Path(args.config_file).name == "config.yaml" and has_run(run):
            cfg.train.init_checkpoint = weights_of(str(run))
    return cfg


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", metavar="FILE", help="the student's checkpoint")
    parser.add_argument(
        "--format", type=names, default=["torchscript"], metavar="A,B", help=", ".join(FORMATS)
    )
    parser.add_argument("--output", default="output/deployed", metavar="DIR")
    parser.add_argument(
        "--images", action="append", default=[], metavar="FILE", help="instead of validation images"
    )
    parser.add_argument(
        "--size", type=size, metavar="HxW", help="of the timed image (default: of the largest)"
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="0: no latencies")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    add_config_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    args.overrides = overrides_of(args, args.overrides)
    for name in ("detectron2", "fvcore"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with errors_in_words():
        cfg = config(args)
        result = export_student(
            cfg, args.format, args.output, args.images, args.size, max(args.rounds, 0)
        )
    if args.json:
        write_json(args.json, {"command": sys.argv, **result})
    print(table(result))
    for error in result["refused"]:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(bool(result["refused"]))
