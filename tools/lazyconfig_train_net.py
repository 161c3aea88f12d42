#!/usr/bin/env python
"""Train or evaluate a detector, distilled or plain, from a LazyConfig or a classic yaml.

The config is a path, or a name in Detectron2's model zoo.  With --teacher, a plain detector's config
is distilled; without, the same command trains the plain detector.  The other flags are those of
Detectron2's own script; `torchrun` may start it too.  Examples:

    tools/lazyconfig_train_net.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml \\
        --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml SOLVER.IMS_PER_BATCH=8

    tools/lazyconfig_train_net.py --config-file configs/mask_rcnn_sharedkd.py --num-gpus 8
    tools/lazyconfig_train_net.py --config-file configs/mask_rcnn_sharedkd.py --resume
    tools/lazyconfig_train_net.py --config-file configs/mask_rcnn_sharedkd.py --eval-only \\
        train.init_checkpoint=output/model_final.pth
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
from arguments import add_config_arguments, overrides_of
from detectron2.engine import default_argument_parser

from sharedkd.engine.launch import launch
from sharedkd.engine.run import run

if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    overrides = next(action for action in parser._actions if action.dest == "opts")
    overrides.nargs = "*"  # Detectron2's take flags that come after them for overrides, too
    add_config_arguments(parser)
    args = parser.parse_intermixed_args()
    args.opts = overrides_of(args, args.opts)
    launch(run, args)
