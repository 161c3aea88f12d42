import logging
import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Detectron2 opens its console log once in a process, on a stream that pytest closes after that test.
logging.raiseExceptions = False


@pytest.fixture
def sharedkd_log(caplog):
    """What the package and Detectron2 log, also after a run has set up loggers that do not propagate."""
    logger = logging.getLogger("detectron2")
    level, propagate = logger.level, logger.propagate
    logger.propagate = False  # the root has the same handler: nothing is to be counted twice
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagate
