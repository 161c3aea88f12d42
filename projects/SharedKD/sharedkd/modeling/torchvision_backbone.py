"""Classifiers of torchvision as bottom-up networks."""

from typing import Dict, Mapping

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

__all__ = ["TorchvisionBackbone"]


class TorchvisionBackbone(Backbone):
    """The feature maps of one of torchvision's classifiers, without weights.

    A file of torchvision's weights has the names of its tensors: ``train.init_checkpoint`` takes one, or
    torchvision's name of it, such as ``MobileNet_V3_Large_Weights.IMAGENET1K_V2``.

    Args:
        name: of torchvision's, such as ``mobilenet_v3_large``.
        features: name of an output -> a module of the classifier, such as ``features.6``, see
            ``torchvision.models.feature_extraction.get_graph_node_names``.
        options: of the classifier.

    Example::

        L(TorchvisionBackbone)(name="mobilenet_v2", features=dict(c4="features.13", c5="features.18"))
    """

    def __init__(self, name: str, features: Mapping[str, str], **options: object):
        super().__init__()
        nodes = {module: output for output, module in features.items()}
        classifier = get_model(name, weights=None, **options)
        self.body: nn.Module = create_feature_extractor(
            classifier, nodes, suppress_diff_warning=True
        )
        with torch.no_grad():
            maps = self.body.eval()(torch.zeros(1, 3, 64, 64))
        self.body.train()
        self._out_features = list(features)
        self._out_feature_channels = {k: x.shape[1] for k, x in maps.items()}
        self._out_feature_strides = {k: 64 // x.shape[-1] for k, x in maps.items()}

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Compute the maps of images (N, 3, H, W): name -> (N, C, H / stride, W / stride)."""
        return self.body(x)
