"""The student for phones: torchvision's maps and weights, and its export to ONNX."""

import pytest
import tiny
import torch
import torchvision
from detectron2.config import instantiate

from sharedkd.lab.export import Agreement
from sharedkd.lab.export.formats import FORMATS, detect, outputs_of
from sharedkd.modeling.torchvision_backbone import TorchvisionBackbone
from sharedkd.weights import download
from sharedkd.weights.loading import initialise

WEIGHTS = "MobileNet_V3_Large_Weights.IMAGENET1K_V2"


@pytest.fixture(scope="module")
def student():
    cfg = tiny.config("custom_coco_mobile.py")
    cfg.data.num_classes = tiny.CLASSES
    torch.manual_seed(0)
    return instantiate(cfg.model.student).eval()


def test_levels(student):
    backbone = student.backbone
    found = {x.stride: x.channels for x in backbone.bottom_up.output_shape().values()}
    assert found == {4: 24, 8: 40, 16: 112, 32: 960}
    assert {x.channels for x in backbone.output_shape().values()} == {96}
    assert sorted(x.stride for x in backbone.output_shape().values()) == [4, 8, 16, 32, 64]


def test_maps_are_those_of_torchvision():
    backbone = TorchvisionBackbone("mobilenet_v3_large", dict(c3="features.6", c5="features.16"))
    own = torchvision.models.mobilenet_v3_large()
    own.load_state_dict(backbone.body.state_dict(), strict=False)
    x = torch.rand(2, 3, 64, 96)
    found, own = backbone.eval()(x), own.eval()
    with torch.no_grad():
        assert torch.equal(found["c5"], own.features(x))
        assert torch.equal(found["c3"], own.features[:7](x))


def test_initial_weights_in_torchvisions_names(student, tmp_path, monkeypatch):
    """From a file, or by torchvision's name, which stands for a URL."""
    torch.manual_seed(5)
    classifier = torchvision.models.mobilenet_v3_large()
    path = tmp_path / "mobilenet.pth"
    torch.save(classifier.state_dict(), path)
    asked = []
    monkeypatch.setattr(download, "_downloaded", lambda url: asked.append(url) or str(path))
    monkeypatch.setattr(download, "hash_in_name", lambda url: "")
    features = {k: v for k, v in classifier.state_dict().items() if k.startswith("features.")}
    for given in (str(path), WEIGHTS):
        with torch.no_grad():
            for p in student.backbone.bottom_up.parameters():
                p.zero_()
        initialise(student, given)
        state = student.state_dict()
        assert all(
            torch.equal(state[f"backbone.bottom_up.body.{k}"], v) for k, v in features.items()
        )
    assert asked == ["https://download.pytorch.org/models/mobilenet_v3_large-5c1a4163.pth"]


def test_onnx_agrees_with_the_student(student, tmp_path):
    student.roi_heads.box_predictor.test_score_thresh = 0.0
    path = str(tmp_path / "student.onnx")
    draw = torch.Generator().manual_seed(3)
    images = [
        torch.randint(0, 256, (3, *size), generator=draw).to(torch.uint8)
        for size in ((64, 96), (80, 70))
    ]
    FORMATS["onnx"].convert(student, images[0], path)
    run = FORMATS["onnx"].load(path)
    for image in images:
        eager = detect(student, image)
        assert len(eager[0])
        found = Agreement().add(outputs_of(student), eager, run(image), image.shape[-2:])
        assert found.unmatched == 0
