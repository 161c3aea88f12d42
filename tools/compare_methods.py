#!/usr/bin/env python
"""Train a pair's student with several distillation methods, all else equal, and compare them.

When the command runs again, it skips finished runs and continues an interrupted one.

    tools/compare_methods.py --config-file configs/custom_coco.py --methods none,shared_kd,fgd \\
        --seeds 0,1,2 --output output/comparison data.train_json=... (the pair's other keys)
    tools/compare_methods.py --list

A method is a recipe's name (--list), the path of a recipe or of a config, `none` (the student without a
teacher, always listed), `inherit` (starts from the teacher's FPN and heads, without a loss), `config`
(the config's own stages), several joined by + (fgd+dkd), one with its weights times a number (fgd:4), one
with a key of its own (fgd:optimizer.lr=0.01), or `none@fgd`: the plain student, trained for as long as
fgd takes.

With --shard 0/2 and --shard 1/2 the same command, on two machines that share the folder or with two
CUDA_VISIBLE_DEVICES, splits the work; run it once more for arms such as none@fgd, which wait for others.
--jobs 2 trains two arms side by side: each needs the memory of one, and takes longer.

--students trains several detectors with the same teacher, and shows AP against latency and size:

    tools/compare_methods.py --teacher large.yaml --teacher-weights large.pth --latency-ms 30 \\
        --students r50.yaml,r50.yaml:depth=18,small.py --methods none,shared_kd data.train_json=...

A student is a config or a name in the model zoo, perhaps with keys of its own (r50.yaml:KEY=VALUE:...);
KEY=VALUE alone is of --config-file. depth=18 is --depth 18 of one student; width=0.5 (of FPN and heads) is for
classic yamls.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
from collections import defaultdict
from pathlib import Path

from arguments import add_config_arguments, errors_in_words, names, overrides_of

from sharedkd.engine.interrupt import interruptible
from sharedkd.lab.compare.comparison import Comparison
from sharedkd.lab.compare.students import Student, run_students
from sharedkd.lab.report import write_report
from sharedkd.lab.runs import short
from sharedkd.methods import known_methods

ROOT = Path(__file__).resolve().parent.parent


def list_methods() -> None:
    """Name, paper, families, and the parameters of the losses for the published pairs of a family."""
    for method in known_methods():
        counts = defaultdict(list)
        for family in method.stages:
            counts[method.parameters(family)].append(family)
        sizes = "; ".join(f"{', '.join(f)}: {n / 1e6:.2f} M" for n, f in counts.items())
        print(f"{method.name:20} {method.paper} ({sizes})")


def seeds(text: str):
    return [int(x) for x in names(text)]


def shard(text: str):
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text} is not i/n with 0 <= i < n")
    return i, n


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the methods and stop")
    parser.add_argument("--config-file", metavar="FILE", help="of a pair, or of any detector")
    parser.add_argument("--students", type=names, default=[], metavar="A,B,...")
    parser.add_argument("--latency-ms", type=float, metavar="MS", help="an image may take so long")
    parser.add_argument(
        "--methods",
        type=names,
        default=[],
        metavar="A,B,...",
        help="default: none, and what the config itself trains",
    )
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], metavar="0,1,...")
    parser.add_argument("--output", type=Path, default=Path("output/comparison"), metavar="DIR")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="arms trained side by side"
    )
    add_config_arguments(parser, method=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.list:
        list_methods()
        sys.exit()
    if not (args.config_file or args.students):
        parser.error("--config-file is missing")
    if args.latency_ms is not None and not args.students:
        parser.error("--latency-ms needs --students")
    if args.latency_ms is not None and not args.latency_ms > 0:
        parser.error("--latency-ms is not above 0")
    common = (args.methods, args.seeds, args.output, overrides_of(args, args.overrides), args.jobs)
    with errors_in_words():
        with interruptible("the same command continues"):
            if args.students:
                students = [Student.of(text, args.config_file) for text in args.students]
                for name in run_students(ROOT, students, *common, args.shard, args.latency_ms):
                    write_report(args.output / name)
            else:
                comparison = Comparison(ROOT, args.config_file, *common)
                comparison.prepare()
                comparison.run(args.shard)
        page = write_report(args.output)
        tables = (args.output / "report.md").read_text().partition("## How to read this")[0]
        print(f"\n{tables}{short(args.output / 'report.md')}\n{short(page)}")
