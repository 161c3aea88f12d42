#!/usr/bin/env python
"""Kill training runs at the worst moments, let one run for long, start many at once; see what is lost.

    tools/torture.py --kills 50 --steps 10000 --arms 20 --output output/torture

A run of a tiny pair on drawn images is killed (SIGKILL) and resumed again and again; what it leaves is
compared with an uninterrupted run's.  So is a comparison, with the run that it has started.  Another
run is long, and its memory, files and logs are measured.  Then several commands train at the same time,
some of them the same comparison, all with one teacher that has to be downloaded first.  Prints a table;
the exit status is 1 if anything was lost.  `make torture` runs all of it; 0 leaves a part out.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import prologue  # noqa: F401

# isort: split
import argparse
import hashlib
import json
import multiprocessing
import random
import runpy
import shutil
import signal
import statistics
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from detectron2.config import LazyConfig, instantiate

import sharedkd.engine.run  # noqa: F401  once for all runs
from sharedkd.data.shapes import CLASSES, make_shapes
from sharedkd.engine.checkpoint import check_complete
from sharedkd.engine.hooks.metrics import CLOCKS
from sharedkd.files import replace

ROOT = Path(__file__).resolve().parent.parent
# What is imported here is there for all commands.  sharedkd.lab.compare.comparison must not be: it names its
# temporary files once per process.
FORK = multiprocessing.get_context("fork")
METHODS = ("none", "shared_kd")  # of every comparison

PAIR = """
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig as _LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet

_cfg = _LazyConfig.load({config!r})
data, dataloader, lr_multiplier, optimizer, train = (
    _cfg[k] for k in ("data", "dataloader", "lr_multiplier", "optimizer", "train")
)
model = _cfg.model
_student = model.student if "student" in model else model
_student.backbone.out_channels = 32
_student.backbone.bottom_up.stem.out_channels = 8
_student.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BasicBlock, num_blocks=1, in_channels=i, out_channels=o,
        stride_per_block=[s], norm="BN",
    )
    for i, o, s in ((8, 16, 1), (16, 32, 2), (32, 64, 2), (64, 96, 2))
]
_student.proposal_generator.head.in_channels = 32
_student.proposal_generator.update(pre_nms_topk=(50, 50), post_nms_topk=(30, 30))
_student.roi_heads.batch_size_per_image = 16
_student.roi_heads.box_head.update(
    input_shape=ShapeSpec(channels=32, height=7, width=7), fc_dims=[32, 32]
)
_student.roi_heads.box_predictor.input_shape = ShapeSpec(channels=32)
"""


class Lost(Exception):
    """Something that must not happen did."""


def prepare(folder: Path):
    """Images, a teacher, and the config with the overrides of all runs."""
    folder.mkdir(parents=True)
    shapes = make_shapes(folder / "shapes", train=12, val=4, size=(64, 64))
    config, teacher = folder / "pair.py", folder / "teacher.py"
    config.write_text(PAIR.format(config=str(ROOT / "configs/custom_coco.py")))
    teacher.write_text(PAIR.format(config=str(ROOT / "configs/custom_coco_plain.py")))
    node = LazyConfig.load(str(teacher)).model
    node.roi_heads.num_classes = len(CLASSES)
    teacher.write_text(teacher.read_text() + f"_student.roi_heads.num_classes = {len(CLASSES)}\n")
    torch.manual_seed(7)
    torch.save({"model": instantiate(node).state_dict()}, folder / "teacher.pth")
    return config, [
        *(f"data.{split}_json={shapes}/{split}.json" for split in ("train", "val")),
        *(f"data.{split}_images={shapes}/{split}" for split in ("train", "val")),
        f"model.teacher.config={teacher}",
        f"model.teacher.weights={folder}/teacher.pth",
        "data.short_edge=[48,64]",
        "data.test_short_edge=64",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=1",
        "dataloader.test.num_workers=0",
        "train.device=cpu",
        "train.log_period=3",
    ]


def start(config: Path, overrides, folder: Path, *flags: str):
    """A training run in a process of its own."""
    command = ["--config-file", str(config), *flags, *overrides, f"train.output_dir={folder}"]
    return _start("lazyconfig_train_net.py", command, folder)


def comparison(config: Path, overrides, folder: Path, seeds=(0,)):
    """The same for a comparison, which starts one process more for each of its arms."""
    command = ["--config-file", str(config), "--methods", ",".join(METHODS)]
    command += ["--seeds", ",".join(map(str, seeds)), "--output", str(folder), *overrides]
    return _start("compare_methods.py", command, folder)


def _start(tool: str, command, folder: Path):
    sys.stdout.flush()
    process = FORK.Process(target=_run, args=(ROOT / "tools" / tool, command, f"{folder}.txt"))
    process.start()
    return process


def _run(tool: Path, command, console: str) -> None:
    os.setpgrp()
    with open(console, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.argv = [str(tool), *command]
    try:
        runpy.run_path(str(tool), run_name="__main__")
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, flush=True)
        os._exit(e.code if isinstance(e.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait(process, folder: Path) -> None:
    """Until it has ended, as it should."""
    process.join()
    if process.exitcode:
        raise Lost(f"{folder} ended with status {process.exitcode}, see {folder}.txt")


def kill(process) -> bool:
    """SIGKILL for a process and all that it has started; whether it was still running."""
    alive = process.is_alive()
    if alive:  # else its number may be another's
        with suppress(ProcessLookupError):  # it has no group of its own yet
            os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return alive and process.exitcode == -signal.SIGKILL


# --- the moments of death ------------------------------------------------------------------------


def _grown(path: Path, word: bytes, before: int) -> bool:
    return path.exists() and path.read_bytes()[before:].count(word) > 0


def moments(folder: Path, typical: float):
    """kind -> whether it is the moment, asked again and again from the start of the process."""
    log, console = folder / "log.txt", Path(f"{folder}.txt")
    begin, size = time.monotonic(), log.stat().st_size if log.exists() else 0
    said = console.stat().st_size if console.exists() else 0
    known = set(folder.glob("*.pth"))
    somewhere = random.uniform(0, typical)
    return {
        "anywhere": lambda: time.monotonic() - begin > somewhere,
        "starting": lambda: (
            (folder / "config.before.yaml").exists() or _grown(console, b"Environment info", said)
        ),
        "writing a checkpoint": lambda: any(folder.glob("*.pth.tmp")),
        "before it is pointed to": lambda: set(folder.glob("*.pth")) - known,
        "evaluation": lambda: _grown(log, b"Start inference", size),
    }


def torment(process, kind: str, folder: Path, typical: float) -> bool:
    """Kill a run at such a moment; False if it ended before."""
    due = moments(folder, typical)[kind]
    count = random.randint(1, 3) if kind in ("writing a checkpoint", "evaluation") else 1
    while process.is_alive():
        if due():
            if kind in ("writing a checkpoint", "evaluation"):
                time.sleep(random.uniform(0, 0.02 * count))
            return kill(process)
        time.sleep(0.0005)
    wait(process, folder)
    return False


def check_folder(folder: Path) -> int:
    """Every checkpoint can be read, and the last one is there; how many they are."""
    paths = sorted(folder.glob("*.pth"))
    for path in paths:
        try:
            check_complete(str(path))
        except Exception as e:
            raise Lost(f"{path} cannot be read: {e}") from e
    last = folder / "last_checkpoint"
    if last.exists() and folder / last.read_text() not in paths:
        raise Lost(f"{last} points to {last.read_text()}, which is not there")
    return len(paths)


# --- what must be equal --------------------------------------------------------------------------


def difference(a, b, where: str = "") -> str:
    """The first place where two structures of tensors differ by a bit; empty if none."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{where}: other keys"
        pairs = [(k, a[k], b[k]) for k in a]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: other length"
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(a, b))]
    elif isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.numpy().tobytes() == b.numpy().tobytes()
        return "" if same else f"{where}: other numbers"
    else:
        return "" if repr(a) == repr(b) else f"{where}: {a!r} and {b!r}"
    return next(filter(None, (difference(x, y, f"{where}/{k}") for k, x, y in pairs)), "")


def timeless_metrics(folder: Path) -> list:
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


def timeless_record(folder: Path) -> dict:
    record = json.loads((folder / "run.json").read_text())
    # The package may be edited while it is tortured, and the folder is part of how a run is started.
    for other in ("peak_memory_mb", "versions", "command", "config_file", "overrides"):
        record.pop(other)
    return record


def compare(whole: Path, killed: Path) -> None:
    first, second = (torch.load(x / "model_final.pth", weights_only=True) for x in (whole, killed))
    found = difference(first, second)
    if found:
        raise Lost(f"{killed}/model_final.pth differs: {found}")
    for read in (timeless_metrics, timeless_record):
        found = difference(read(whole), read(killed))
        if found:
            raise Lost(f"{read.__name__} of {killed} differs from that of {whole}: {found}")


# --- the four parts -------------------------------------------------------------------------------


def kills(config: Path, overrides, folder: Path, count: int):
    """Kill and resume until ``count`` are killed; then let the last one end, and compare."""
    overrides = [
        *overrides,
        "train.max_iter=40",
        "train.checkpointer.period=4",
        "train.checkpointer.max_to_keep=2",
        "train.eval_period=8",
    ]
    begin = time.monotonic()
    whole = folder / "whole"
    wait(start(config, overrides, whole), whole)
    typical = time.monotonic() - begin
    kinds = list(moments(whole, 1))
    died: Counter = Counter()
    checked = rounds = 0
    while sum(died.values()) < count:
        rounds += 1
        killed = folder / f"killed{rounds}"
        while True:
            process = start(config, overrides, killed, "--resume")
            if sum(died.values()) >= count:
                wait(process, killed)
                break
            kind = kinds[sum(died.values()) % len(kinds)]
            if not torment(process, kind, killed, 0.7 * typical):
                died["ended before"] += 0
                break
            died[kind] += 1
            checked += check_folder(killed)
            print(f"  {sum(died.values())}/{count} killed: {kind}", flush=True)
        check_folder(killed)
        compare(whole, killed)
        shutil.rmtree(killed)
    return {
        "kills": sum(died.values()),
        "moments": {k: n for k, n in died.items() if n},
        "runs compared with the uninterrupted one": rounds,
        "checkpoints read after a kill": checked,
    }


def killed_comparisons(config: Path, overrides, folder: Path, count: int):
    """Kill a comparison, with all that it has started, and repeat it until ``count`` are killed.

    One that has ended before its moment counts for nothing, and the next begins in a folder of its
    own.  Each is compared with one that nobody killed.
    """
    overrides = [*overrides, "train.max_iter=12", "train.checkpointer.period=2"]
    begin = time.monotonic()
    whole = folder / "whole"
    wait(comparison(config, overrides, whole), whole)
    typical = time.monotonic() - begin
    died = checked = rounds = 0
    while died < count:
        rounds += 1
        killed = folder / f"killed{rounds}"
        while True:
            process = comparison(config, overrides, killed)
            process.join(random.uniform(0, typical) if died < count else None)
            if not kill(process):
                break
            died += 1
            checked += sum(map(check_folder, killed.glob("*/seed*")))
            print(f"  {died}/{count} killed: a comparison", flush=True)
        wait(process, killed)
        for arm in finished_arms(killed):
            check_folder(killed / arm)
            compare(whole / arm, killed / arm)
        shutil.rmtree(killed)
    return {
        "kills of a comparison": died,
        "comparisons compared with the uninterrupted one": rounds,
        "checkpoints read after a kill": checked,
    }


def finished_arms(folder: Path):
    """The folders of a comparison's arms as seen from its own; every one must be finished."""
    arms = json.loads((folder / "results.json").read_text())["arms"]
    names = [f"{arm['method']}/seed{arm['seed']}" for arm in arms]
    missing = [x for x, arm in zip(names, arms) if arm["status"] != "finished"]
    if missing:
        raise Lost(f"{folder}: {', '.join(missing)} not finished, see {folder}.txt")
    return names


def usage(process: int):
    """(resident MB, open files) of a process; None once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        files = len(os.listdir(f"/proc/{process}/fd"))
        return int(status.split("VmRSS:")[1].split()[0]) / 2**10, files
    except (OSError, IndexError):
        return None


def children(process: int):
    try:
        return [
            int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:
        return []


def long_run(config: Path, overrides, folder: Path, steps: int):
    """Memory and files of a run and its worker, from a tenth of the run on; what it logs."""
    overrides = [
        *overrides,
        f"train.max_iter={steps}",
        "train.log_period=20",
        f"train.checkpointer.period={max(50, steps // 20)}",
        "train.checkpointer.max_to_keep=2",
        f"train.eval_period={max(50, steps // 10)}",
    ]
    folder = folder / "long"
    process = start(config, overrides, folder)
    samples = {"run": [], "worker": []}
    while process.is_alive():
        iteration = _last_iteration(folder / "metrics.json")
        inner = children(process.pid)
        for name, pid in (("run", process.pid), ("worker", inner[0] if inner else None)):
            found = usage(pid) if pid and iteration >= steps // 10 else None
            if found:
                samples[name].append(found)
        time.sleep(max(0.05, min(1.0, steps / 10000)))
    wait(process, folder)
    result = {"steps": steps}
    for name, found in samples.items():
        tenth = max(1, len(found) // 10)
        (mb, files), (mb_end, files_end) = (
            [statistics.median(x) for x in zip(*part)] for part in (found[:tenth], found[-tenth:])
        )
        result[f"{name}: resident MB after a tenth, at the end"] = [round(mb, 1), round(mb_end, 1)]
        result[f"{name}: growth"] = growth = round(mb_end / mb - 1, 4)
        result[f"{name}: open files"] = [files, files_end]
        if steps >= 5000 and growth >= 0.02 or files_end > files + 3:
            raise Lost(f"{name} grows: {result}")
    logs = [*folder.glob("log.txt*"), *folder.glob("*.json"), *folder.glob("events*")]
    result["bytes logged a step"] = round(sum(x.stat().st_size for x in logs) / steps)
    if result["bytes logged a step"] > 2000:
        raise Lost(f"logs grow: {result}")
    return result


def _last_iteration(path: Path) -> int:
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - 4096))
            return json.loads(f.read().splitlines()[-1])["iteration"]
    except (OSError, ValueError, IndexError, KeyError):
        return -1


@contextmanager
def served(file: Path):
    """Yields the URL of a file, whose name has its hash there, and a list of who has asked for it."""
    content, asked = file.read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.client_address)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            time.sleep(5)  # so that the other commands come to half a file
            self.wfile.write(content[len(content) // 2 :])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        name = f"{file.stem}-{hashlib.sha256(content).hexdigest()}{file.suffix}"
        try:
            yield f"http://127.0.0.1:{server.server_port}/{name}", asked
        finally:
            server.shutdown()


def load(config: Path, overrides, folder: Path, arms: int):
    """Four commands at once: two share a comparison, two have one each with half of its seeds.

    All of them, and the runs that they start, need a teacher that is not in the cache.
    """
    seeds, shared = range(max(1, arms // 4)), folder / "shared"
    own = {folder / f"own{i}": seeds[i::2] for i in range(2) if seeds[i::2]}
    with served(config.parent / "teacher.pth") as (url, asked):
        overrides = [*overrides, "train.max_iter=4", f"model.teacher.weights={url}"]
        commands = [
            (comparison(config, overrides, output, seeds), output)
            for output, seeds in [(shared, seeds), (shared, seeds), *own.items()]
        ]
        for command in commands:
            wait(*command)
    check_cache(url, len(asked))
    names = [output / arm for output in (shared, *own) for arm in finished_arms(output)]
    for arm in names:
        check_folder(arm)
        begun = (arm / "log.txt").read_text().count("Starting training from iteration")
        if begun != 1:
            raise Lost(f"{arm} was trained {begun} times")
    for output in own:
        for arm in finished_arms(output):
            compare(output / arm, shared / arm)
    unfinished = [*folder.rglob("*.tmp"), *folder.glob("*/configs/*.*.yaml")]
    if unfinished:
        raise Lost(f"{unfinished[0]} was left")
    return {"commands at once": len(commands), "arms": len(names), "downloads": len(asked)}


def check_cache(url: str, downloads: int) -> None:
    """The file was downloaded once, and is there whole and alone."""
    if downloads != 1:
        raise Lost(f"{url} was downloaded {downloads} times")
    name, cache = url.rpartition("/")[2], Path(os.environ["FVCORE_CACHE"])
    files = [x for x in cache.rglob("*") if x.is_file() and x.suffix != ".lock"]
    if [x.name for x in files] != [name]:
        raise Lost(f"{cache} has {', '.join(x.name for x in files)}")
    if hashlib.sha256(files[0].read_bytes()).hexdigest() not in name:
        raise Lost(f"{files[0]} is damaged")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--comparison-kills", type=int, default=5, metavar="N")
    parser.add_argument("--steps", type=int, default=10000, metavar="N", help="of the long run")
    parser.add_argument(
        "--arms", type=int, default=20, metavar="N", help="trained at once, by fours"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=ROOT / "output/torture", metavar="DIR")
    args = parser.parse_args()
    random.seed(args.seed)
    shutil.rmtree(args.output / "work", ignore_errors=True)
    config, overrides = prepare((args.output / "work").resolve())
    os.environ["FVCORE_CACHE"] = str(config.parent / "cache")  # where nothing is yet
    parts = {
        "kills": (kills, args.kills),
        "killed comparisons": (killed_comparisons, args.comparison_kills),
        "long run": (long_run, args.steps),
        "load": (load, args.arms),
    }
    results, path = {}, args.output / "torture.json"
    for name, (part, count) in parts.items():
        if not count:
            continue
        print(name, flush=True)
        begin, folder = time.monotonic(), config.parent / part.__name__
        folder.mkdir()
        try:
            result = part(config, overrides, folder, count)
            result["verdict"] = "nothing lost"
        except (Lost, OSError, KeyError) as e:  # what should be there is not
            result = {"verdict": f"LOST: {e}"}
        results[name] = {**result, "seconds": round(time.monotonic() - begin)}
        replace(str(path), lambda f: f.write(json.dumps(results, indent=1).encode()))
        for key, value in results[name].items():
            print(f"  {key:45} {value}", flush=True)
    lost = any(x["verdict"].startswith("LOST") for x in results.values())
    if not lost:
        shutil.rmtree(config.parent)
    print(f"{path}: {'something was lost' if lost else 'nothing was lost'}")
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
