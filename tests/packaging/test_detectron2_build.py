"""The build of Detectron2 in packaging/detectron2, and what packaging/setup_env.py decides.

Most tests build from a made-up source archive; those that use the `real_sdist` need the true one,
which pip downloads once into pytest's cache (or DETECTRON2_SDIST names it).
"""

import email
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"


def load(path):
    """Import a file by its path: neither folder is a package, and both names are common."""
    spec = importlib.util.spec_from_file_location(f"tested_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backend():
    sys.path.insert(0, str(PACKAGING / "detectron2"))
    try:
        return load(PACKAGING / "detectron2/build_backend.py")
    finally:
        sys.path.pop(0)


@pytest.fixture
def setup_env():
    return load(PACKAGING / "setup_env.py")


SOURCES = {
    "detectron2/__init__.py": "VERSION = 'old'\n",
    "detectron2/model_zoo/configs/some.yaml": "",
    "projects/PointRend/point_rend/__init__.py": "",
    "projects/PointRend/README.md": "",
    "tools/__init__.py": "",
    "setup.py": "raise Exception('must not run')",
    "LICENSE": "some license",
}


@pytest.fixture
def sdist(tmp_path):
    path = tmp_path / "made-up-0.6.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in SOURCES.items():
            member = tarfile.TarInfo(f"made-up-0.6/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def build(backend, sdist, tmp_path):
    """Builds the made-up sources with the given edits, each time into a new folder."""

    edit = type(backend.EDITS[0])

    def build(*edits, sha256=hashlib.sha256(sdist.read_bytes()).hexdigest()):
        folder = tmp_path / f"wheels{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return folder / backend.build(sdist, folder, sha256, [edit(*e) for e in edits])

    return build


@pytest.fixture(scope="module")
def real_sdist(backend, request, tmp_path_factory):
    if path := os.environ.get("DETECTRON2_SDIST"):
        return path
    cached = Path(request.config.cache.mkdir("detectron2")) / f"{backend.SHA256}.tar.gz"
    if not cached.exists():
        shutil.copy(backend.fetch(tmp_path_factory.mktemp("download")), cached)
    return cached


def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_the_edited_package_and_nothing_else(backend, build):
    wheel = build(("__init__.py", "'old'", "'new'"))
    assert wheel.name == f"detectron2-{backend.VERSION}-py3-none-any.whl"
    assert names(wheel) == {
        "detectron2/__init__.py",
        "detectron2/_C.py",
        "detectron2/model_zoo/configs/some.yaml",
        "detectron2/projects/point_rend/__init__.py",
        *(f"{backend.INFO}/{name}" for name in ("LICENSE", "METADATA", "RECORD", "WHEEL")),
    }
    edited = zipfile.ZipFile(wheel).read("detectron2/__init__.py").decode()
    assert edited == "VERSION = 'new'\n" + backend.NOTICE


def test_same_sources_give_the_same_bytes(build):
    assert build().read_bytes() == build().read_bytes()


def test_other_sources_stop_the_build(build):
    with pytest.raises(SystemExit, match=r"made-up-0.6.tar.gz: sha256 is \w{64}, expected 00ff"):
        build(sha256="00ff")


def test_missing_sources_stop_the_build(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_SDIST", str(tmp_path / "nowhere.tar.gz"))
    with pytest.raises(SystemExit, match="cannot read the sources of Detectron2: .*nowhere"):
        backend.build_wheel(tmp_path)
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.parametrize(
    "edit, found",
    [
        (("__init__.py", "gone", ""), "'gone' 0 times, expected 1"),
        (("__init__.py", "VERSION", "", 2), "'VERSION' 1 times, expected 2"),
        (("moved.py", "VERSION", ""), "'VERSION' 0 times, expected 1"),
    ],
)
def test_an_edit_that_does_not_match_stops_the_build(build, edit, found):
    with pytest.raises(SystemExit) as error:
        build(edit)
    assert str(error.value) == f"detectron2/{edit[0]}: found {found}"


def test_metadata_is_what_installers_expect(backend, build, tmp_path):
    metadata = email.message_from_bytes(zipfile.ZipFile(build()).read(f"{backend.INFO}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("detectron2", backend.VERSION)
    required = {Requirement(r).name for r in metadata.get_all("Requires-Dist")}
    assert {"torch", "torchvision", "fvcore", "pycocotools"} <= required

    info = tmp_path / backend.prepare_metadata_for_build_wheel(tmp_path)
    assert email.message_from_string((info / "METADATA").read_text()).items() == metadata.items()


def test_pip_accepts_the_wheel(build, tmp_path):
    """pip checks RECORD and the names while it installs."""
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, f"--target={target}", str(build())], check=True)
    assert (target / "detectron2/_C.py").exists()


def test_stand_in_for_the_extension():
    extension = load(PACKAGING / "detectron2/no_extension.py")
    assert not extension.has_cuda()
    assert extension.get_compiler_version() and extension.get_cuda_version()
    with pytest.raises(AttributeError, match="_C.nms_rotated needs .* compiled extension"):
        extension.nms_rotated
    assert not hasattr(extension, "__path__")


def test_real_sources(backend, real_sdist, tmp_path):
    """Every edit matches them, and what comes out is Python that uses nothing that is gone."""
    wheel = zipfile.ZipFile(tmp_path / backend.build(real_sdist, tmp_path))
    files = set(wheel.namelist())
    assert {name.partition("/")[0] for name in files} == {"detectron2", backend.INFO}
    assert "detectron2/model_zoo/configs/COCO-Detection/fcos_R_50_FPN_1x.py" in files
    assert "detectron2/projects/point_rend/__init__.py" in files
    gone = re.compile(r"\bnp\.(bool|int|float|object|str)\b|pkg_resources|Image\.LINEAR\b")
    for name in files:
        if name.endswith(".py"):
            text = wheel.read(name).decode()
            compile(text, name, "exec")
            assert not gone.search(text), name


# What setup_env.py decides.


def python_with(setup_env, detectron2=None, missing=(), **installed):
    """What examine() tells about a made-up Python."""
    return {
        "detectron2": detectron2,
        "error": None,
        "missing": list(missing),
        "installed": installed,
        "folders": ["/outside/site-packages"],
    }


def test_without_detectron2_the_pins_and_our_build_are_installed(setup_env):
    commands, keep = setup_env.plan(python_with(setup_env))
    assert commands[0] == ["--requirement", str(setup_env.ROOT / "requirements.txt")]
    assert str(setup_env.ROOT / "packaging/detectron2") in commands[1]
    assert not keep


def test_our_build_is_renewed_in_venv_and_left_alone_elsewhere(setup_env, backend):
    def packages(path):
        found = [backend.VERSION, str(path / "detectron2/__init__.py")]
        return sum(setup_env.plan(python_with(setup_env, found))[0], [])

    ours = str(setup_env.ROOT / "packaging/detectron2")
    assert ours in packages(setup_env.VENV / "lib/python3.11/site-packages")
    assert ours not in packages(Path("/usr/lib/python3.11/site-packages"))


@pytest.mark.parametrize("folder", ["/usr/lib/python3", ".venv/lib/python3.11/site-packages"])
@pytest.mark.parametrize("version", ["0.6", "0.6+cu113", "0.7.dev1"])
def test_existing_detectron2_is_not_replaced(setup_env, folder, version):
    found = [version, str(setup_env.ROOT / folder / "detectron2/__init__.py")]
    inside = python_with(setup_env, found, ["cv2", "pytest"], torch="2.1.0+cu118", pip="23.2")
    commands, keep = setup_env.plan(inside)
    setuptools, *added = commands[0]
    assert setuptools == setup_env.requirements()["setuptools"]
    assert added == ["opencv-python-headless", "pytest"]  # missing, so without a pin
    assert commands[1][-1] == str(setup_env.ROOT)
    assert keep == {"torch": "2.1.0+cu118"}


@pytest.mark.parametrize("in_venv", [False, True])
@pytest.mark.parametrize("existing", [None, ["0.6", "/outside/detectron2/__init__.py"]])
def test_venv_sees_an_existing_detectron2(setup_env, tmp_path, monkeypatch, existing, in_venv):
    site_packages = tmp_path / "lib/python3.11/site-packages"
    site_packages.mkdir(parents=True)
    ran = []
    monkeypatch.setattr(setup_env, "VENV", tmp_path)
    monkeypatch.setattr(setup_env, "run", ran.append)
    monkeypatch.setattr(sys, "prefix", "/some/venv" if in_venv else sys.base_prefix)

    setup_env.create(python_with(setup_env, existing))

    assert ("--system-site-packages" in ran[0]) == (existing is not None and not in_venv)
    links = [path.read_text() for path in site_packages.glob("*.pth")]
    shared = ["import site; site.addsitedir('/outside/site-packages')\n"]
    assert links == (shared if existing and in_venv else [])


@pytest.mark.parametrize("works", [True, False])
def test_examine_imports_detectron2(setup_env, tmp_path, monkeypatch, works):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/__init__.py").write_text("__version__ = '0.6'\n")
    (tmp_path / "detectron2/layers.py").write_text("" if works else "import nothing_like_it\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = setup_env.examine(sys.executable)
    if works:
        assert seen["detectron2"][1] == str(tmp_path / "detectron2/__init__.py")
        assert seen["error"] is None
    else:
        assert seen["detectron2"] is None
        assert "nothing_like_it" in seen["error"]
    assert "pytest" not in seen["missing"]
    assert setup_env.examine(tmp_path / "no_python") is None


def test_old_python_is_refused_in_one_line(setup_env, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"^SharedKD needs Python 3.11 or newer, and .*$"):
        setup_env.main()


def test_requirements_are_pinned_and_their_modules_known(setup_env):
    pins = setup_env.requirements()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins.values())
    assert not [p for p in pins if importlib.util.find_spec(setup_env.module(p)) is None]
