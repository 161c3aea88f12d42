"""Imported first by every tool, before anything is loaded that asks for it.

Nothing comes from the current directory by accident: an empty entry of PYTHONPATH means that directory,
`python -m` and spawned processes put it before the standard library. It stays where PYTHONPATH names it.

Idle OpenMP threads sleep: such as spin slow a CPU run down several times as soon as anything else wants
a core. GNU's spin for as long as Python takes from one operation to the next, though: to wake one takes
several times that. A user's own OMP_WAIT_POLICY or GOMP_SPINCOUNT is left alone.
What Detectron2 and PyTorch warn about in their own code is not shown.
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

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "500")  # some microseconds

import warnings  # noqa: E402  only now from the standard library for certain

warnings.filterwarnings("ignore", module=r"(detectron2|fvcore|pycocotools|torch|torchvision)(\.|$)")
