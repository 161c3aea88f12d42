"""What Detectron2 0.6 needs in order to run on today's libraries, on a CPU, without a compiler."""

from typing import NamedTuple


class Edit(NamedTuple):
    file: str  # below detectron2/
    old: str
    new: str
    times: int = 1  # how often `old` must occur, no more and no less


EDITS = [
    # NumPy 1.24 removed its aliases of the built-in types.
    Edit("data/build.py", "dtype=np.int\n", "dtype=int\n"),
    Edit("data/build.py", "dtype=np.int)", "dtype=int)"),
    Edit("data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    Edit("evaluation/pascal_voc_evaluation.py", "astype(np.bool)", "astype(bool)", 2),
    Edit("evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    Edit("evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5),
    Edit("structures/masks.py", "np.bool)", "bool)", 3),
    Edit("utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)"),
    Edit("utils/visualizer.py", "astype(np.bool)", "astype(bool)", 3),
    # Pillow 10 removed this name.
    Edit("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    # Python 3.11 samples from sequences only; it used to turn a set into a tuple itself.
    Edit(
        "data/common.py",
        "sample(self._fallback_candidates, k=1)",
        "sample(tuple(self._fallback_candidates), k=1)",
    ),
    # Since torch 1.11 a GroupNorm of 32 groups refuses one channel, even if, as here, only the name
    # of its type is wanted: no FCOS config could be built.
    Edit("modeling/meta_arch/retinanet.py", "get_norm(norm, 1)", "get_norm(norm, 32)"),
    # FCOS stopped at an image without boxes. No point lies inside a box of no area, so such a box
    # gives what Detectron2's main gives: background everywhere.
    Edit(
        "modeling/meta_arch/fcos.py",
        "        matched_indices = self.match_anchors(anchors, gt_instances)\n",
        """\
        device = anchors[0].device
        gt_instances = [
            x
            if len(x) > 0
            else Instances(
                x.image_size,
                gt_boxes=Boxes(torch.zeros(1, 4, device=device)),
                gt_classes=torch.zeros(1, dtype=torch.int64, device=device),
            )
            for x in gt_instances
        ]
        matched_indices = self.match_anchors(anchors, gt_instances)
""",
    ),
    # torch 2 derives its own schedulers from LRScheduler, so their state was silently not saved.
    Edit("engine/hooks.py", "lr_scheduler._LRScheduler)", "lr_scheduler.LRScheduler)", 2),
    # The optimizer (its momentum) and the loss scale were not saved either. Same layout as main's.
    Edit(
        "engine/defaults.py",
        "        self._trainer.iter = self.iter\n        self._trainer.run_step()\n",
        """\
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:  # an unedited 0.6 does not write it
            self._trainer.load_state_dict(state_dict["_trainer"])
""",
    ),
    # Several processes on CPUs: gloo instead of NCCL, and DistributedDataParallel without devices.
    Edit(
        "engine/launch.py",
        '    assert torch.cuda.is_available(), "cuda is not available. '
        'Please check your installation."\n',
        "    has_gpu = torch.cuda.is_available()\n",
    ),
    Edit("engine/launch.py", 'backend="NCCL"', 'backend="NCCL" if has_gpu else "GLOO"'),
    Edit(
        "engine/launch.py",
        "    assert num_gpus_per_machine <= torch.cuda.device_count()\n"
        "    torch.cuda.set_device(local_rank)\n",
        "    if has_gpu:\n"
        "        assert num_gpus_per_machine <= torch.cuda.device_count()\n"
        "        torch.cuda.set_device(local_rank)\n",
    ),
    Edit(
        "engine/defaults.py",
        'if "device_ids" not in kwargs:',
        'if "device_ids" not in kwargs and all(p.is_cuda for p in model.parameters()):',
    ),
    # The caffe2 export needs caffe2, which left torch; the rest of detectron2.export does not.
    Edit(
        "export/__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ModuleNotFoundError:\n    pass\n",
    ),
    # setuptools 82 removed pkg_resources; the configs lie beside this file.
    Edit("model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    Edit(
        "model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )",
        'os.path.join(os.path.dirname(__file__), "configs", config_path)',
    ),
    # What is left of the compiled extension that detectors use: pycocotools gives the same AP, and
    # torchvision's operator infers both kinds of groups from the shapes.
    Edit(
        "evaluation/fast_eval_api.py",
        "class COCOeval_opt(COCOeval):",
        "COCOeval_opt = COCOeval\n\n\nclass _CompiledCOCOeval(COCOeval):",
    ),
    Edit(
        "layers/deform_conv.py",
        "deform_conv = _DeformConv.apply\nmodulated_deform_conv = _ModulatedDeformConv.apply\n",
        """\
def deform_conv(input, offset, weight, stride=1, padding=0, dilation=1, *groups_and_step):
    return deform_conv2d(input, offset, weight, None, stride, padding, dilation)


def modulated_deform_conv(
    input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, *groups
):
    return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
""",
    ),
]
