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
import prologue  # noqa: F401

# isort: split
from detectron2.engine import default_argument_parser

from sharedkd.engine.launch import launch
from sharedkd.engine.run import run

if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    overrides = next(action for action in parser._actions if action.dest == "opts")
    overrides.nargs = "*"  # Detectron2's take flags that come after them for overrides, too
    launch(run, parser.parse_intermixed_args())
