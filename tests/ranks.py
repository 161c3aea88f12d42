"""What each of the two processes of test_processes.py trains."""

import tiny
import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling.meta_arch import ProposalNetwork
from detectron2.utils import comm

from sharedkd import SharedKDTrainer
from sharedkd.losses import IdenticalLayer
from sharedkd.losses.base import DistillationLoss
from sharedkd.methods import known_methods
from sharedkd.modeling.stages import Stage
from sharedkd.modeling.teachers import Peer

METHODS = known_methods()


class Scaled(DistillationLoss):
    """A third loss beside Shared-KD's two, with a parameter of its own."""

    needs = frozenset()

    def bind(self, student, teacher, key):
        super().bind(student, teacher, key)
        self.scale = torch.nn.Parameter(torch.ones(student["fpn"][8], 1, 1))

    def forward(self, batch):
        return {"s8": (self.scale * batch.student["fpn"][8]).square().mean()}


def three_steps():
    """(state with the loss's parameter, losses) after three steps on four images, shared by the processes."""
    torch.manual_seed(0)
    node = tiny.node("faster_rcnn")
    # A proposal network that uses every anchor draws nothing at random, and its losses are means
    # over images; frozen norms: each process sees half of the batch.
    node.backbone.bottom_up.stem.norm = node.backbone.bottom_up.stages.norm = "FrozenBN"
    node.proposal_generator.batch_size_per_image = 10**6
    node.proposal_generator.positive_fraction = 1.0
    node._target_ = ProposalNetwork
    del node.roi_heads, node.input_format
    stages = tiny.shared_kd()
    stages["scaled"] = Stage(Scaled(), start=1, end=2)  # off in the first and the last iteration
    stages["mutual"] = Stage(IdenticalLayer(strides=[8, 16], normalize="instance"), teacher="other")
    student = instantiate(node)
    peers = {"other": Peer(instantiate(node), {"back": Stage(Scaled())})}
    model = tiny.pair(stages, student, "faster_rcnn", peers=peers)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.weight.fill_(0.5)  # keeps a random network's maps of moderate size
    records = [tiny.record(seed=i, boxes=((8, 8, 40 + 4 * i, 40),)) for i in range(4)]
    mine = records[comm.get_rank() :: comm.get_world_size()]
    trainer = SharedKDTrainer(
        create_ddp_model(model, device_ids=None, broadcast_buffers=False, static_graph=True),
        iter(lambda: mine, None),
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        max_iter=3,
    )
    trainer.train(0, 3)
    losses = {
        name: value
        for name, (value, _) in trainer.storage.latest().items()
        if "time" not in name and not name.startswith("rpn/")
    }
    peer = {f"peer/{name}": x for name, x in model.peers["other"].state_dict().items()}
    scale = model.losses["scaled"].scale.detach()
    return {**model.state_dict(), **peer, "scale": scale}, losses


def every_method(family):
    """Two steps with all methods at once, where one process has no object at all; one image has no labels."""
    stages = {
        f"{method.name}_{name}": stage
        for method in METHODS
        if family in method.stages
        for name, stage in instantiate(method.stages[family]).items()
    }
    model = tiny.pair(stages, family)
    mine = [tiny.record(32, 48, ((4, 4, 24, 24),) if comm.get_rank() == 0 else ())]
    mine += [{"image": tiny.record(32, 40, seed=5)["image"], "unlabelled": True}]
    trainer = SharedKDTrainer(
        create_ddp_model(model, device_ids=None, broadcast_buffers=False),
        iter(lambda: mine, None),
        torch.optim.SGD(model.parameters(), lr=1e-4),
        max_iter=2,
        clip_grad_norm=1.0,
    )
    trainer.train(0, 2)  # DDP refuses a second step after one that left a parameter out
    assert all(p.grad is not None for p in model.losses.parameters())
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    other = flat.clone()
    dist.broadcast(other, 0)
    assert torch.isfinite(flat).all() and torch.equal(flat, other)


def train():
    """What :func:`three_steps` returns, and the number of processes, after every method has trained."""
    result = three_steps()
    for family in ("faster_rcnn", "retinanet"):
        every_method(family)
    return *result, comm.get_world_size()
