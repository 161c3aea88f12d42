"""`import sharedkd` changes nothing outside itself."""

import json
import subprocess
import sys

import tiny

#: Compares a fresh process before and after the import of every module of the package.
SCRIPT = """
import os, sys

forks = []
os.register_at_fork = lambda **hooks: forks.append(sys._getframe(1).f_globals["__name__"])

import json, logging, multiprocessing, pkgutil, random, signal, threading, warnings
import matplotlib.pyplot, numpy, scipy.stats, torch
import detectron2.checkpoint, detectron2.engine, detectron2.evaluation, detectron2.export
import detectron2.model_zoo, detectron2.projects, detectron2.utils.visualizer
from detectron2.data import DatasetCatalog
from iopath.common.file_io import g_pathmgr
from detectron2.utils.file_io import PathManager

for name in ("detectron2", "fvcore", "iopath", "torch"):
    logging.getLogger(name)  # until now there might be loggers below it alone
HOSTS = ("detectron2", "fvcore", "iopath", "omegaconf", "pycocotools", "torch.nn", "torch.optim")


def hosts():
    # Functions and classes of the libraries that a run is made of, and what is in these classes.
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(HOSTS):
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and value.__module__ == name:
                    found.update({f"{name}.{key}.{k}": id(v) for k, v in vars(value).items()})
                if callable(value):
                    found[f"{name}.{key}"] = id(value)
    return found


def state():
    loggers = {"root": logging.root, **logging.root.manager.loggerDict}
    return {
        "path handlers": [
            {prefix: id(handler) for prefix, handler in manager._path_handlers.items()}
            for manager in (PathManager, g_pathmgr)
        ],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "fork hooks": [x for x in forks if x.startswith("sharedkd")],
        "environment": dict(os.environ),
        "sys.path": list(sys.path),
        "warning filters": [repr(x) for x in warnings.filters],
        "loggers": {
            name: [x.level, x.propagate, x.disabled, *map(id, x.handlers + x.filters)]
            for name, x in loggers.items()
            if isinstance(x, logging.Logger)
        },
        "signals": [str(signal.getsignal(x)) for x in (signal.SIGINT, signal.SIGTERM)],
        "hooks": [id(sys.excepthook), id(threading.excepthook)],
        "threads": [torch.get_num_threads(), threading.active_count()],
        "torch": [str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled()],
        "draws": [torch.get_rng_state().tolist(), repr(random.getstate()), repr(numpy.random.get_state())],
        "data sets": DatasetCatalog.list(),
        "libraries": hosts(),
    }


before = state()
import sharedkd
for found in pkgutil.walk_packages(sharedkd.__path__, "sharedkd."):
    __import__(found.name)
after = state()
for key in ("loggers", "libraries"):  # new ones are nobody's
    after[key] = {name: after[key].get(name) for name in before[key]}
changed = {}
for key in before:
    if before[key] != after[key]:
        ours, theirs = before[key], after[key]
        if isinstance(ours, dict):
            names = {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)}
            ours, theirs = ({n: x.get(n) for n in names} for x in (ours, theirs))
        changed[key] = [str(ours), str(theirs)]
print(json.dumps(changed))
"""


def test_an_import_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tiny.ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
