#!/usr/bin/env python
"""Train or evaluate a detector, distilled or plain, from a LazyConfig.

The flags are those of Detectron2's own script; `torchrun` may start it too.  Examples:

    tools/lazyconfig_train_net.py --config-file configs/mask_rcnn_sharedkd.py --num-gpus 8
    tools/lazyconfig_train_net.py --config-file configs/mask_rcnn_sharedkd.py --resume
    tools/lazyconfig_train_net.py --config-file configs/mask_rcnn_sharedkd.py --eval-only \
        train.init_checkpoint=output/model_final.pth
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import safe_imports  # noqa: F401

# Before PyTorch is loaded: idle OpenMP threads that spin slow a CPU run down several times as soon as
# anything else wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detectron2.engine import default_argument_parser  # noqa: E402

from sharedkd.engine import run  # noqa: E402
from sharedkd.running.launch import launch  # noqa: E402

if __name__ == "__main__":
    launch(run, default_argument_parser(epilog=__doc__).parse_args())
