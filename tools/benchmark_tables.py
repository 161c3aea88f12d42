#!/usr/bin/env python
"""Keep what tools/benchmark.py --json wrote, and fill the tables of docs/performance.md from all that is kept.

tools/benchmark_tables.py output/benchmark docs/results/performance docs/performance.md
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from sharedkd.lab.performance import document, keep

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the files")
    parser.add_argument("records", type=Path, help="folder of the records of all machines")
    parser.add_argument("document", type=Path)
    args = parser.parse_args()
    try:
        keep(args.folder, args.records)
        document(args.records, args.document)
    except ValueError as e:
        sys.exit(f"error: {e}")
