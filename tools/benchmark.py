#!/usr/bin/env python
"""Time a distillation step beside what it is made of, and other methods. Needs no weights or data.

    tools/benchmark.py --config-file configs/faster_rcnn_sharedkd.py --device cpu \\
        --image-size 320 --batch-size 2 --methods fgd,mgd,semckd --json output/benchmark.json
    tools/benchmark.py --config-file configs/faster_rcnn_sharedkd.py --schemes

`overhead` is a distillation step over the plain student's step plus the teacher's forward, both as
Detectron2 runs them, as the median over the rounds. Memory is measured in a process for each arm.
With `--schemes`, a step of each scheme of docs/schemes.md, over the plain student's.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
import logging
from pathlib import Path

import torch
from arguments import errors_in_words, names

from sharedkd.config import load_config
from sharedkd.lab.benchmark import Benchmark, measure
from sharedkd.lab.output import write_json
from sharedkd.lab.performance import table
from sharedkd.lab.schemes import benches, measure_schemes
from sharedkd.methods import with_method

logging.getLogger("detectron2.sharedkd").setLevel(logging.ERROR)  # teachers are not trained here


def benchmark(args):
    """What is measured of the pair, of its other methods and of its variants; or of its schemes."""

    def config(*overrides):
        overrides = [*args.overrides, f"train.device={args.device}", *overrides]
        return load_config(args.config_file, overrides, keep_teacher=True, without_data=True)

    def bench(*overrides, method=None):
        cfg = config(*overrides)
        cfg = with_method(cfg, method) if method else cfg
        return Benchmark(cfg, args.image_size, args.batch_size)

    if args.schemes:
        found = benches(config(), args.image_size, args.batch_size)
        return measure_schemes(found, args.rounds, args.starts)
    methods = {name: bench(method=name) for name in args.methods}
    variants = {override: bench(override) for override in args.variant}
    return measure(bench(), methods, variants, args.rounds, args.starts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a pair")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--image-size", type=int, default=320, metavar="PIXELS", help="shorter side"
    )
    parser.add_argument("--batch-size", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times for each arm")
    parser.add_argument(
        "--starts", type=int, default=3, metavar="N", help="processes that a peak is the median of"
    )
    parser.add_argument("--methods", type=names, default=[], metavar="A,B")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="key=value",
        help="a distillation step with this override, too (may be given several times)",
    )
    parser.add_argument("--schemes", action="store_true", help="the schemes of docs/schemes.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if min(args.rounds, args.starts, args.batch_size) < 1:
        parser.error("--rounds, --starts and --batch-size are 1 or more")
    if args.schemes and (args.methods or args.variant):
        parser.error("--schemes goes without --methods and --variant")
    if args.image_size < 32:
        parser.error("--image-size is 32 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    with errors_in_words():
        result = {"command": sys.argv, **benchmark(args)}
    if args.json:
        write_json(args.json, result)
    print(table(result))
