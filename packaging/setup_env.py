"""Prepare .venv for `make`: Detectron2, the pinned requirements and this project.

A Detectron2 that is there already, in .venv or for the Python that runs this script, is used as it
is, together with its torch: then only what is missing is added, and nothing is replaced.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
OWN_BUILD = "+purepy"  # in the version that packaging/detectron2 gives its wheel

# Modules that are not named like the package they come with.
MODULES = {
    "import-linter": "importlinter",
    "hydra-core": "hydra",
    "markdown-it-py": "markdown_it",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
}

# Runs in the Python in question. Importing the layers shows that the installation works at all.
PROBE = """
import importlib.metadata as metadata, importlib.util, json, site, sys
try:
    import detectron2, detectron2.layers
    try:
        version = metadata.version("detectron2")
    except metadata.PackageNotFoundError:
        version = detectron2.__version__
    found, error = [version, detectron2.__file__], None
except Exception as e:
    found = None
    error = repr(e) if importlib.util.find_spec("detectron2") else None
folders = site.getsitepackages() + [site.getusersitepackages()] * bool(site.ENABLE_USER_SITE)
print(json.dumps({
    "detectron2": found,
    "error": error,
    "missing": [m for m in sys.argv[1:] if not importlib.util.find_spec(m)],
    "installed": {d.metadata["Name"]: d.version for d in metadata.distributions() if d.version},
    "folders": folders,
}))
"""


def requirements():
    """Return {package: pinned requirement} of requirements.txt."""
    lines = (line.partition("#")[0].strip() for line in open(ROOT / "requirements.txt"))
    return {line.partition("==")[0]: line for line in lines if line}


def module(package):
    return MODULES.get(package, package.replace("-", "_"))


def examine(python):
    """Return what PROBE prints, or None where it cannot run."""
    # -P: what lies in the working directory is not installed.
    command = [str(python), "-P", "-W", "ignore", "-c", PROBE, *map(module, requirements())]
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        return None
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def create(outside):
    """Create .venv; `outside` is what examine() tells about the Python that runs this script."""
    share = outside and outside["detectron2"]
    in_venv = sys.prefix != sys.base_prefix
    options = ["--system-site-packages"] if share and not in_venv else []
    run([sys.executable, "-m", "venv", *options, str(VENV)])
    if share and in_venv:
        # "System" would mean the Python below that virtual environment, so name its folders.
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in outside["folders"]]
        site_packages = next(VENV.glob("lib/python*/site-packages"))
        (site_packages / "outside.pth").write_text("".join(lines))


def plan(inside):
    """Return the options of each pip run that .venv needs, and the versions these must keep."""
    pins = requirements()
    # Without build isolation nothing else is downloaded; setuptools is there by then.
    ourselves = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    version, path = inside["detectron2"] or ("", "")
    if not version or (OWN_BUILD in version and VENV in Path(path).parents):
        pinned = ["--requirement", str(ROOT / "requirements.txt")]
        return [pinned, [*ourselves, str(ROOT / "packaging/detectron2")]], {}
    # No pins here: they may not go together with what is there. But always our setuptools, which
    # goes into .venv only: this project and the model zoo of an unedited Detectron2 need it.
    add = [p for p in pins if module(p) in inside["missing"] and p != "setuptools"]
    keep = {p: v for p, v in inside["installed"].items() if p not in [*add, "pip", "setuptools"]}
    return [[pins["setuptools"], *add], ourselves], keep


def run(command):
    print("+", *command, flush=True)
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit(f"Stopped, because this failed: {' '.join(command)}")


def main():
    if sys.version_info < (3, 11):
        sys.exit(
            "SharedKD needs Python 3.11 or newer, and %s is %s. Try: make PYTHON=/path/to/python3"
            % (sys.executable, sys.version.split()[0])
        )
    python = VENV / "bin/python"
    if not VENV.exists():
        print(f"Creating {VENV}", flush=True)
        create(examine(sys.executable))
    inside = examine(python)
    if inside is None:
        sys.exit(f"{python} does not work or is older than 3.11: remove {VENV} and try again")
    if inside["error"]:
        print(f"The installed Detectron2 cannot be imported: {inside['error']}", flush=True)
    commands, keep = plan(inside)
    if keep:
        version, path = inside["detectron2"]
        print(f"Using Detectron2 {version}, {path}, as it is", flush=True)
    else:
        print("Installing Detectron2 and the requirements; torch alone is large", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "keep.txt")
        constraints.write_text("".join(f"{p}=={v}\n" for p, v in keep.items()))
        for options in commands:
            run([str(python), "-m", "pip", "install", f"--constraint={constraints}", *options])
    print("Ready", flush=True)


if __name__ == "__main__":
    main()
