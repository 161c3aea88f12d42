"""Several CPU processes over gloo: the same step as one process with the same global batch."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from tiny import command

from sharedkd.engine.launch import _free_port

STEP = """
import os
import sys
import torch
sys.path.insert(0, {tests!r})
import tiny
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling.meta_arch import ProposalNetwork
from detectron2.utils import comm
from sharedkd import FrozenTeacher, SharedKD, SharedKDTrainer
from sharedkd.config import shared_kd_stages
from sharedkd.engine.launch import launch
from sharedkd.losses.base import DistillationLoss
from sharedkd.modeling.stages import Stage

OUT = os.environ["OUT"]

class Scaled(DistillationLoss):
    # A third loss beside Shared-KD's two, with a parameter of its own.
    needs = frozenset()

    def bind(self, student, teacher, key):
        super().bind(student, teacher, key)
        self.scale = torch.nn.Parameter(torch.ones(student["fpn"][8], 1, 1))

    def forward(self, batch):
        return {{"s8": (self.scale * batch.student["fpn"][8]).square().mean()}}

def main(args):
    torch.manual_seed(0)
    node = tiny.node("faster_rcnn")
    # A proposal network that uses every anchor draws nothing at random, and its losses are means
    # over images; frozen norms: each process sees half of the batch.
    node.backbone.bottom_up.stem.norm = node.backbone.bottom_up.stages.norm = "FrozenBN"
    node.proposal_generator.batch_size_per_image = 10**6
    node.proposal_generator.positive_fraction = 1.0
    node._target_ = ProposalNetwork
    del node.roi_heads, node.input_format
    stages = instantiate(shared_kd_stages())
    stages["scaled"] = Stage(Scaled(), start=1, end=2)  # off in the first and the last iteration
    model = SharedKD(
        student=instantiate(node), stages=stages, input_format="RGB",
        teacher=FrozenTeacher(tiny.detector("faster_rcnn", seed=1), ""),
    )
    for name, module in model.student.named_modules():
        if name.endswith("norm"):
            module.weight.fill_(0.5)  # keeps a random network's maps of moderate size
    records = [tiny.record(seed=i, boxes=((8, 8, 40 + 4 * i, 40),)) for i in range(4)]
    mine = records[comm.get_rank()::comm.get_world_size()]
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    static = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun's processes, train.ddp.static_graph=True
    trainer = SharedKDTrainer(
        create_ddp_model(model, device_ids=None, broadcast_buffers=False, static_graph=static),
        iter(lambda: mine, None), sgd, max_iter=3,
    )
    trainer.train(0, 3)
    if comm.is_main_process():
        losses = {{k: v[0] for k, v in trainer.storage.latest().items() if "time" not in k and not k.startswith("rpn/")}}
        state = {{**model.state_dict(), "scale": model.losses["scaled"].scale.detach()}}
        torch.save([state, losses, comm.get_world_size(), comm.get_local_size()], OUT)

if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
"""


def train_step(tmp_path, name, *starts, script=STEP):
    """What the first of the commands saves; they run at the same time, one per machine."""
    path = tmp_path / "step.py"
    path.write_text(script.format(tests=str(tiny.ROOT / "tests")))
    out = tmp_path / f"{name}.pt"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "OUT": str(out)}
    machines = [
        subprocess.Popen(
            [sys.executable, *(str(path) if x == "SCRIPT" else x for x in start)],
            env=env,
            cwd=tmp_path,
        )
        for start in starts
    ]
    assert [machine.wait(timeout=300) for machine in machines] == [0] * len(machines)
    return torch.load(out, weights_only=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches CPU processes")
def test_two_processes_equal_one(tmp_path):
    one = train_step(tmp_path, "one", ["SCRIPT", "--num-gpus", "1"])
    two = train_step(tmp_path, "two", ["SCRIPT", "--num-gpus", "2", "--dist-url", "auto"])
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "SCRIPT"]
    torchrun = train_step(tmp_path, "torchrun", elastic)
    flags = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{_free_port()}"]
    machines = train_step(
        tmp_path,
        "machines",
        *(["SCRIPT", "--num-gpus", "1", *flags, "--machine-rank", rank] for rank in "01"),
    )
    assert one[2:] == [1, 1] and two[2:] == torchrun[2:] == [2, 2] and machines[2:] == [2, 1]
    assert not torch.equal(one[0]["scale"], torch.ones_like(one[0]["scale"]))
    for other in (two, torchrun, machines):
        assert other[0].keys() == one[0].keys()
        for key, value in one[0].items():
            scale = value.abs().max().item()
            atol = max(1e-3 * scale, 1e-5)
            torch.testing.assert_close(other[0][key], value, rtol=0, atol=atol, msg=key)
        assert other[1].keys() == one[1].keys()
        for key, value in one[1].items():
            assert other[1][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_the_command_line_with_two_processes(workspace, tmp_path):
    opts = [
        *workspace.data,
        *workspace.pair,
        f"train.output_dir={tmp_path}/run",
        "train.max_iter=2",
    ]
    opts += ["train.eval_period=2"]
    flags = ["--num-gpus", "2", "--dist-url", "auto"]
    subprocess.run(
        command("custom_coco_mask.py", *opts, flags=flags), check=True, capture_output=True
    )
    saved = torch.load(tmp_path / "run/model_final.pth", weights_only=False)
    assert saved["iteration"] == 1
    wrong = subprocess.run(
        command(
            "custom_coco_mask.py",
            *opts,
            f"train.output_dir={tmp_path}/other",
            "model.teacher.config=none",
            flags=flags,
        ),
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 1
    assert wrong.stderr.count("error: ") == 1 and "Traceback" not in wrong.stderr


EVERY_METHOD = """
import os
import sys
import torch
sys.path.insert(0, {tests!r})
import tiny
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from sharedkd import FrozenTeacher, SharedKD, SharedKDTrainer
from sharedkd.engine.launch import launch
from sharedkd.methods import known_methods

METHODS = known_methods(tiny.ROOT / "configs/common/methods")

def main(args):
    for kind in ("faster_rcnn", "retinanet"):
        stages = {{}}
        torch.manual_seed(0)
        student = tiny.detector(kind)
        for method in METHODS:
            if kind in method.stages:
                for name, stage in instantiate(method.stages[kind]).items():
                    stages[method.name + "_" + name] = stage
        model = SharedKD(
            student=student, stages=stages, input_format="RGB",
            teacher=FrozenTeacher(tiny.detector(kind, seed=1), "", input_format="RGB"),
        ).train()
        # One rank has no object at all.
        mine = [tiny.record(32, 48, ((4, 4, 24, 24),) if comm.get_rank() == 0 else ())]
        sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
        trainer = SharedKDTrainer(
            create_ddp_model(model, device_ids=None, broadcast_buffers=False),
            iter(lambda: mine, None), sgd, max_iter=2, clip_grad_norm=1.0,
        )
        trainer.train(0, 2)  # DDP refuses a second step after one that left a parameter out
        assert all(p.grad is not None for p in model.losses.parameters())
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        other = flat.clone()
        dist.broadcast(other, 0)
        assert torch.isfinite(flat).all() and torch.equal(flat, other)
    if comm.is_main_process():
        torch.save(len(METHODS), os.environ["OUT"])

if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
"""


def test_every_method_in_two_processes(tmp_path):
    start = ["SCRIPT", "--num-gpus", "2", "--dist-url", "auto"]
    count = train_step(tmp_path, "all", start, script=EVERY_METHOD)
    assert count == len(list((tiny.ROOT / "configs/common/methods").glob("*.py")))
