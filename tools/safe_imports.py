"""Imported first by every tool: afterwards nothing comes from the current directory by accident.

An empty entry of PYTHONPATH means that directory, `python -m` and spawned processes put it before the
standard library. It stays where PYTHONPATH names it.
"""

import os
import sys

NAMED = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
LIBRARY = os.path.dirname(os.__file__)

if os.getcwd() not in map(os.path.abspath, NAMED):
    first = sys.path.index(LIBRARY) if LIBRARY in sys.path else len(sys.path)
    sys.path[:first] = [p for p in sys.path[:first] if p not in ("", os.getcwd())]
sys.modules["__main__"].__spec__ = None  # spawned processes find it by its path, not by its name
os.environ.update(PYTHONPATH=os.pathsep.join(NAMED), PYTHONSAFEPATH="1")
