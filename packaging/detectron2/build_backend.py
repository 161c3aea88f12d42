"""PEP 517 backend: the sources of Detectron2 0.6 with the edits of edits.py, as a wheel.

    pip install ./packaging/detectron2

Needs no compiler, torch or setuptools. The same sources give the same wheel, byte for byte.
DETECTRON2_SDIST names a local copy (absolute path) of the sources; otherwise pip downloads them.
"""

import base64
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from edits import EDITS

SDIST = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

NAME = "detectron2"
VERSION = "0.6+purepy.2"  # the local part tells this build from any other Detectron2
INFO = f"{NAME}-{VERSION}.dist-info"
METADATA = f"""\
Metadata-Version: 2.1
Name: {NAME}
Version: {VERSION}
Summary: Detectron2 0.6 without its compiled extension
License: Apache-2.0
Requires-Python: >=3.9
""" + "".join(
    f"Requires-Dist: {requirement}\n"
    for requirement in """
        torch>=2.0 torchvision numpy Pillow>=7.1 matplotlib pycocotools>=2.0.6 termcolor>=1.1
        yacs>=0.1.8 tabulate cloudpickle tqdm>4.29.0 tensorboard fvcore>=0.1.5,<0.1.6 iopath>=0.1.7
        omegaconf>=2.1,<2.4 hydra-core>=1.1 black packaging
    """.split()
)
WHEEL = """\
Wheel-Version: 1.0
Generator: sharedkd
Root-Is-Purelib: true
Tag: py3-none-any
"""

# Detectron2's setup.py installs these folders as packages below detectron2.projects.
PROJECTS = {
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}

# pip asks for the metadata of what it downloads. The sources' own setup.py would import torch and
# look for C++ files to answer, so pip meets this in place of setuptools. (The folder bears the name
# and version too, since pip 23.2 reads them there.)
SETUPTOOLS_STAND_IN = """\
import os

NAME, VERSION = "{}", "{}"


class __legacy__:
    def get_requires_for_build_wheel(config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        info = NAME.replace("-", "_") + "-" + VERSION + ".dist-info"
        os.mkdir(os.path.join(folder, info))
        with open(os.path.join(folder, info, "METADATA"), "w") as f:
            f.write("Metadata-Version: 2.1\\nName: " + NAME + "\\nVersion: " + VERSION + "\\n")
        return info
""".format(*SDIST.split("=="))


NOTICE = "\n# This file was changed from Detectron2 0.6.\n"  # as the Apache License asks for


class BuildError(SystemExit):
    """Ends the build with one line instead of a traceback."""


def fetch(folder):
    """Download the pinned sources into `folder` with pip and return their path."""
    stand_in = Path(folder, "stand_in")
    (stand_in / "setuptools").mkdir(parents=True)
    (stand_in / "setuptools/__init__.py").touch()
    (stand_in / "setuptools/build_meta.py").write_text(SETUPTOOLS_STAND_IN)
    pinned = Path(folder, "pinned.txt")
    pinned.write_text(f"{SDIST} --hash=sha256:{SHA256}\n")
    # If a pip runs this build, its variables for its own backend must not reach the pip below.
    # (pip 23.2 names them PEP517_...)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PEP517_", "_PYPROJECT_HOOKS"))}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(stand_in), env.get("PYTHONPATH")]))
    options = "--quiet --no-deps --no-binary=:all: --use-pep517 --no-build-isolation"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--require-hashes"]
    command += [f"--dest={folder}", f"--requirement={pinned}"]
    if subprocess.run(command, env=env).returncode != 0:
        raise BuildError(
            f"cannot download {SDIST} (see above); DETECTRON2_SDIST can name a local copy"
        )
    return next(Path(folder).glob("*.tar.gz"))


def read_sources(sdist, sha256=SHA256):
    """Return {path in the wheel: content}, for those files of the sources that belong there."""
    try:
        content = Path(sdist).read_bytes()
    except OSError as e:
        raise BuildError(f"cannot read the sources of Detectron2: {e}")
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise BuildError(f"{sdist}: sha256 is {found}, expected {sha256}")
    files = {}
    with tarfile.open(sdist) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            path = member.name.partition("/")[2]
            for folder, package in PROJECTS.items():
                if path.startswith(folder):
                    path = package + path[len(folder) :]
            if path == "LICENSE":
                path = f"{INFO}/LICENSE"
            # The top-level package `tools` stays out: it would shadow the tools of whoever uses it.
            if path.startswith(("detectron2/", INFO)):
                files[path] = tar.extractfile(member).read()
    return files


def apply_edits(files, edits=EDITS):
    """Make every edit in `files`; one that does not occur as often as it should stops the build."""
    for edit in edits:
        path = f"detectron2/{edit.file}"
        text = files.get(path, b"").decode()
        if (found := text.count(edit.old)) != edit.times:
            raise BuildError(f"{path}: found {edit.old!r} {found} times, expected {edit.times}")
        files[path] = text.replace(edit.old, edit.new).encode()
    for path in {f"detectron2/{edit.file}" for edit in edits}:
        files[path] += NOTICE.encode()


def write_wheel(files, folder):
    """Write the wheel of `files` into `folder` and return its file name."""

    def sha256(content):
        return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()

    files = {**files, f"{INFO}/METADATA": METADATA.encode(), f"{INFO}/WHEEL": WHEEL.encode()}
    record = [f"{path},sha256={sha256(c)},{len(c)}\n" for path, c in sorted(files.items())]
    files[f"{INFO}/RECORD"] = "".join([*record, f"{INFO}/RECORD,,\n"]).encode()

    name = f"{NAME}-{VERSION}-py3-none-any.whl"
    # Not compressed: what zlib writes differs between its versions.
    with zipfile.ZipFile(Path(folder, name), "w") as wheel:
        for path, content in sorted(files.items()):
            entry = zipfile.ZipInfo(path)  # dated 1980, always
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, content)
    return name


def build(sdist, folder, sha256=SHA256, edits=EDITS):
    """Write the wheel of the given sources into `folder` and return its file name."""
    files = read_sources(sdist, sha256)
    apply_edits(files, edits)
    files["detectron2/_C.py"] = Path(__file__).with_name("no_extension.py").read_bytes()
    return write_wheel(files, folder)


# What pip calls.


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory, INFO)
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    (folder / "WHEEL").write_text(WHEEL)
    return INFO


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with tempfile.TemporaryDirectory() as folder:
        return build(os.environ.get("DETECTRON2_SDIST") or fetch(folder), wheel_directory)
