"""Weights from a URL: downloaded whole, checked, and put into Detectron2's cache in one step.

Detectron2 takes what a server sent for the file even if the connection was cut, where the server had
not said how long the file is, and looks URLs up in its cache without their host.
"""

import glob
import hashlib
import logging
import os
import re
import time
import uuid
from typing import Optional
from urllib.parse import unquote, urlparse
from urllib.request import urlopen

from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir

from sharedkd.errors import ConfigError

__all__ = ["fetch", "hash_in_name"]

logger = logging.getLogger("detectron2.sharedkd")

PATIENCE = 60  # seconds without a byte
ABANDONED = 24 * 3600  # seconds after which an unfinished download is nobody's any more
_CHUNK = 2**20
_DOWNLOADED = ("http://", "https://", "ftp://")


def fetch(path: str, sha256: Optional[str] = None, sha256_key: str = "sha256") -> str:
    """The local file of a path or URL, verified if there is something to verify it with.

    Args:
        path: a file, a URL, or ``detectron2://...``.
        sha256: the file's SHA-256 in hex, or at least its first 8 digits.  A file name like
            ``NAME-1a2b3c4d.pth`` says it as well.
        sha256_key: the config key of it, for messages.

    Raises:
        ConfigError: that is no SHA-256.
        ValueError, OSError: it cannot be downloaded, or has another SHA-256.
    """
    sha256 = check_sha256(sha256, sha256_key)
    if "://" not in path:
        local = path
    else:
        local = _local_path(path, sha256)
    wanted = [x for x in (sha256, hash_in_name(path)) if x]
    if wanted and os.path.isfile(local):
        with open(local, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        for beginning in wanted:
            _compare(found, beginning, local)
    return local


def _local_path(path: str, sha256: str) -> str:
    """In a cache that only ever holds whole files."""
    prefix = Detectron2Handler.PREFIX
    if path.startswith(prefix):
        path = Detectron2Handler.S3_DETECTRON2_PREFIX + path[len(prefix) :]
    if not path.startswith(_DOWNLOADED):
        return PathManager.get_local_path(path)
    cached = _cached(path)
    with file_lock(cached):  # so that one process downloads and the others wait
        if not os.path.isfile(cached):
            _download(path, cached, sha256 or hash_in_name(path))
    return cached


def check_sha256(sha256: Optional[str], key: str) -> str:
    """Raises:
    ConfigError: it is no SHA-256, nor the beginning of one.
    """
    if not sha256:
        return ""
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        raise ConfigError(
            key, sha256, "is no SHA-256", "write 8 to 64 hexadecimal digits, as \"'1a2b3c4d'\""
        )
    return sha256.lower()


def hash_in_name(path: str) -> str:
    """The digits of a SHA-256 in the file name of ``path``, perhaps a URL; empty if there are none.

    PyTorch's hub names files so: ``resnet18-f37072fd.pth``.  Digits without a letter are rather a
    date or a counter, and the few digits that Detectron2's zoo has in its names
    (``model_final_f10217.pkl``) are no SHA-256.
    """
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", urlparse(path).path)
    return found[1] if found and not found[1].isdecimal() else ""


def _compare(found: str, wanted: str, file: str) -> None:
    if not found.startswith(wanted):
        raise ValueError(
            f"the SHA-256 of {file} begins with {found[: max(8, len(wanted))]}, "
            f"not with {wanted} as its name or the config says"
        )


def _cached(url: str) -> str:
    parsed = urlparse(url)
    zoo = urlparse(Detectron2Handler.S3_DETECTRON2_PREFIX).netloc
    parts = unquote(parsed.path).strip("/").split("/")
    if {"", ".", ".."} & set(parts) or not all(x.isprintable() for x in parts):
        raise ValueError("its URL names no file")
    # The zoo's files are where Detectron2 itself would look for them.
    host = [] if parsed.netloc == zoo else [re.sub(r"[^\w.-]", "_", parsed.netloc)]
    if parsed.query:
        parts.insert(-1, hashlib.sha256(parsed.query.encode()).hexdigest()[:16])
    return os.path.join(get_cache_dir(), *host, *parts)


def _download(url: str, target: str, sha256: str) -> None:
    """Raises:
    ValueError: it is not whole, or has another SHA-256.
    OSError: there is no such server or file.
    """
    for left in glob.glob(f"{glob.escape(target)}.*.part"):
        if time.time() - os.path.getmtime(left) > ABANDONED:
            os.remove(left)
    logger.info(f"Downloading {url} ...")
    unfinished = f"{target}.{uuid.uuid4().hex}.part"  # locks do not reach across all file systems
    digest = hashlib.sha256()
    try:
        with urlopen(url, timeout=PATIENCE) as response, open(unfinished, "xb") as f:
            length = response.headers.get("Content-Length")
            if length is None and not getattr(response, "chunked", False) and not sha256:
                raise ValueError(
                    "the server does not say how long it is, so that a part of it could not be told "
                    "from the whole: give its SHA-256"
                )
            while chunk := response.read(_CHUNK):
                digest.update(chunk)
                f.write(chunk)
            if f.tell() == 0 or length is not None and f.tell() != int(length):
                raise ValueError(f"only {f.tell()} of {length} bytes arrived")
            f.flush()
            os.fsync(f.fileno())
        _compare(digest.hexdigest(), sha256, url)
        os.replace(unfinished, target)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
