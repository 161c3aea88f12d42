"""Keys for Detectron2's classic yaml configs."""

from detectron2.config import CfgNode

__all__ = ["add_sharedkd_config"]


def add_sharedkd_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SHAREDKD`` to ``cfg``, a classic config, whose META_ARCHITECTURE is then ``SharedKD``."""
    cfg.MODEL.SHAREDKD = CfgNode(
        dict(
            STUDENT="GeneralizedRCNN",
            TEACHER=dict(CONFIG="", WEIGHTS=None, SHA256=None, TRUST_CHECKPOINT=False),
            PUBLISHED=False,
        )
    )
