"""Whole runs with weights from strangers, and weights for them."""

import hashlib

import hostile
import pytest
import torch
from safetensors.torch import load_file

from sharedkd import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = "custom_coco_retinanet.py"


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory):
    from tiny import arguments

    from sharedkd.engine.run import run

    output = tmp_path_factory.mktemp("finished") / "run"
    opts = [*workspace.data, *workspace.pair, f"train.output_dir={output}"]
    digest = hashlib.sha256(workspace.weights.read_bytes()).hexdigest()
    more = ["train.safetensors=True", "train.max_iter=2", f"model.teacher.sha256={digest}"]
    run(arguments(CONFIG, *opts, *more))
    return output


def test_the_final_student_as_safetensors(finished, train):
    ours = torch.load(finished / "model_final.pth", weights_only=True)["model"]
    theirs = load_file(finished / "model_final.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    weights = f"train.init_checkpoint={finished}/model_final.safetensors"
    digest = hashlib.sha256((finished / "model_final.safetensors").read_bytes()).hexdigest()
    _, results = train(CONFIG, weights, f"train.init_sha256={digest[:12]}", flags=["--eval-only"])
    assert "bbox" in results


def test_the_teacher_is_verified(train):
    with pytest.raises(
        ConfigError, match="^model.teacher.weights=.* not with 1a2b3c4d as its name"
    ):
        train(CONFIG, "model.teacher.sha256=1a2b3c4d")


def test_resuming_runs_nothing_without_trust(finished, train, tmp_path):
    """The folder's last checkpoint is a real one, into which a call has been put."""
    canary, path = tmp_path / "canary", finished / "model_final.pth"
    genuine = path.read_bytes()
    try:
        data = torch.load(path, weights_only=True)
        torch.save({**data, "note": hostile.touch(canary)}, path)
        opts = ["train.max_iter=2"]
        with pytest.raises(ConfigError, match="^train.output_dir=.*train.trust_checkpoint=True"):
            train(CONFIG, *opts, output=finished, flags=["--resume"])
        assert not canary.exists()
        train(CONFIG, *opts, "train.trust_checkpoint=True", output=finished, flags=["--resume"])
        assert canary.exists()
    finally:
        path.write_bytes(genuine)
