"""Weights from a URL, by Detectron2's own download and cache, and their SHA-256."""

import hashlib
import os
import re
from typing import Optional
from urllib.parse import urlparse

from detectron2.model_zoo import get_checkpoint_url
from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir
from torchvision.models import get_weight

from sharedkd.errors import ConfigError

__all__ = ["fetch", "hash_in_name"]

_DOWNLOADED = ("http://", "https://", "ftp://")


def fetch(path: str, sha256: Optional[str] = None, sha256_key: str = "sha256") -> str:
    """Return the local file of a path or URL, verified if a SHA-256 is known.

    A URL is downloaded once, under a lock and under another name until it is complete; one that ends
    like ``NAME-1a2b3c4d.pth`` has the beginning of the file's SHA-256.

    Args:
        path: a file, a URL, ``detectron2://...``, a name in Detectron2's model zoo, or one of torchvision's,
            such as ``MobileNet_V3_Large_Weights.IMAGENET1K_V2``.
        sha256: the file's SHA-256 in hex, or at least its first 8 digits.
        sha256_key: the config key of it, for messages.

    Raises:
        ConfigError: ``sha256`` is no SHA-256.
        ValueError, OSError, RuntimeError: it cannot be downloaded, or has another SHA-256; or a config that
            is not in the zoo.
    """
    if re.fullmatch(r"\w+_Weights\.[A-Z0-9_]+", path):
        path = get_weight(path).url
    if path.endswith((".yaml", ".py")):
        path = get_checkpoint_url(path)
    if sha256 and not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{8,64}", sha256)):
        raise ConfigError(
            sha256_key,
            sha256,
            "is no SHA-256",
            "write 8 to 64 hexadecimal digits, as \"'1a2b3c4d'\"",
        )
    local = _downloaded(path) if "://" in path else path
    wanted = [x.lower() for x in (sha256, "://" in path and hash_in_name(path)) if x]
    if wanted and os.path.isfile(local):
        with open(local, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        for beginning in wanted:
            if not found.startswith(beginning):
                raise ValueError(
                    f"the SHA-256 of {local} begins with {found[: max(8, len(beginning))]}, not with "
                    f"{beginning} as its name or the config says"
                    + ("; delete it to download it again" if local != path else "")
                )
    return local


def _downloaded(url: str) -> str:
    if not url.startswith(_DOWNLOADED) or url.startswith(Detectron2Handler.S3_DETECTRON2_PREFIX):
        return PathManager.get_local_path(url)
    folders = urlparse(url).path.split("/")
    if ".." in folders or url.endswith("/"):
        raise ValueError("its URL names no file")
    # iopath caches by path only, and would return the file of another host or query.
    own = os.path.join(get_cache_dir(), "sharedkd", hashlib.sha256(url.encode()).hexdigest()[:16])
    return PathManager.get_local_path(url, cache_dir=own)


def hash_in_name(path: str) -> str:
    """The digits of a SHA-256 in the file name of ``path``, a URL; empty if there are none.

    PyTorch's hub names files so: ``resnet18-f37072fd.pth``.  Digits without a letter are rather a
    date or a counter, and the few digits that Detectron2's zoo has in its names
    (``model_final_f10217.pkl``) are no SHA-256.
    """
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", urlparse(path).path)
    return found[1] if found and not found[1].isdecimal() else ""
