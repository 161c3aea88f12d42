#!/usr/bin/env python
"""Check a training run before it starts: all errors and warnings at once, what it is, what it costs.

    tools/preflight.py --config-file configs/custom_coco.py data.train_json=train.json ...

Takes what the training command takes and writes nothing. Exit status 0: ready; 1: there are errors.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
import json
from pathlib import Path

from arguments import add_config_arguments, overrides_of

from sharedkd.lab.output import write_json
from sharedkd.lab.preflight import as_text, preflight

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the run")
    parser.add_argument("--resume", action="store_true", help="the run is to be continued")
    parser.add_argument("--no-steps", action="store_true", help="do not measure two steps")
    parser.add_argument(
        "--json", metavar="FILE", help="write the report there; - prints it instead"
    )
    add_config_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    found = preflight(
        args.config_file,
        overrides_of(args, args.overrides),
        args.resume,
        measure=not args.no_steps,
    )
    if args.json and args.json != "-":
        write_json(Path(args.json), found)
    print(json.dumps(found, indent=1) if args.json == "-" else as_text(found))
    sys.exit(not found["ok"])
