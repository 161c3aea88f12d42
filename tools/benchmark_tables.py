#!/usr/bin/env python
"""Fill the tables of docs/performance.md from what tools/benchmark.py --json wrote.

tools/benchmark_tables.py docs/results/performance docs/performance.md
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
from pathlib import Path

from sharedkd.lab.performance import document

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the *.json files")
    parser.add_argument("document", type=Path)
    args = parser.parse_args()
    try:
        document(args.folder, args.document)
    except ValueError as e:
        sys.exit(f"error: {e}")
