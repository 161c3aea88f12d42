"""Folders as runs, comparisons and the analysis tools write them, with values that tests choose."""

import json

import yaml
from PIL import Image

MAX_ITER = 200
PICTURE = (1430, 792)  # the size of a plot that a tool drew
NASTY = "<script>alert(1)</script>"
IDENTICAL = {"_target_": "sharedkd.Stage", "weight": 2.0, "start": 50, "ramp": 20, "end": 0.75}


def config(distilled=True, lr=0.1, **train):
    """A config.yaml's content: stage identical is on from 50, in full from 69, off from 150."""
    model = {"_target_": "RetinaNet", "depth": 18}
    if distilled:
        loss = {"_target_": "sharedkd.IdenticalLayer", "tap": "fpn"}
        stages = {"_target_": "stage_dict", "identical": {**IDENTICAL, "loss": loss}}
        teacher = {"_target_": "sharedkd.FrozenTeacher", "weights": "somewhere/model.pth"}
        model = {
            "_target_": "sharedkd.SharedKD",
            "student": model,
            "teacher": teacher,
            "stages": stages,
        }
    train = {"max_iter": MAX_ITER, "seed": 0, "output_dir": "anywhere", **train}
    return {"model": model, "optimizer": {"lr": lr}, "train": train}


def metrics(distilled=True, offset=0.0):
    """Rows of metrics.json: loss_cls falls from 2, the terms s8 and s16 are 1 and 3 plus an offset."""
    for iteration in range(19, MAX_ITER, 20):
        row = {"iteration": iteration, "loss_cls": 2 - iteration / MAX_ITER, "total_loss": 9.0}
        row.update({"lr": 0.1, "time": 0.5})
        if distilled:
            row.update({"distill/identical/s8": 1 + offset, "distill/identical/s16": 3 + offset})
            row.update({"distill/identical/weight": 2.0, "loss_distill_identical": 8.0})
            row.update({"watch/detector": 0.25, "watch/identical/s8": 0.75})
        yield row


def run(folder, distilled=True, results=None, seed=0, offset=0.0):
    """A run's folder; ``results`` None: it is still in training."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(distilled, seed=seed)))
    rows = list(metrics(distilled, offset))
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "log.txt").write_text("[x]: Command line arguments: Namespace(opts=['a<b'])\n")
    record = {"hardware": "A CPU", "versions": {"torch": "2.0"}, "processes": 1}
    record["inherited"] = 3 * distilled
    if results:
        record.update(iterations=MAX_ITER, peak_memory_mb=100.0, results=results)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def comparison(folder, scores, teacher=40.0):
    """A comparison's folder.

    Args:
        scores: method -> box AP of each seed; None: that arm is missing.
    """
    arms, configs = [], {}
    for method, values in scores.items():
        configs[method] = config(method != "none", lr=0.1)
        for seed, ap in enumerate(values):
            arm = {"method": method, "seed": seed, "status": "missing", "error": None}
            if ap is not None:
                results = {"bbox": {"AP": ap, "AP50": ap + 20, "APs": None}}
                # Names that are no folder names have no folder.
                if "/" not in method:
                    run(folder / method / f"seed{seed}", method != "none", results, seed, seed)
                seconds = 0.5 if method == "none" else 0.75
                arm.update(status="finished", results=results, iterations=MAX_ITER)
                arm.update(seconds_per_step=seconds, peak_memory_mb=1000.0 * (seconds + 0.5))
                arm.update(parameters={"losses": 0}, hardware="A CPU", versions={"torch": "2.0"})
                arm.update(initial_weights=f"digest{seed}")
            arms.append(arm)
    record = {
        "config_file": "configs/x.py", "overrides": [f"data.name={NASTY}"], "command": f"tools {NASTY}",
        "baseline": "none", "teacher": {"bbox": {"AP": teacher}}, "methods": list(scores),
        "configs": configs, "arms": arms,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def features(folder):
    """What tools/analyze_features.py writes, and beside it a picture that is not the report's."""
    folder.mkdir(parents=True)
    for path in (folder / "maps_fpn_0.jpg", folder.parent / "secret.png"):
        Image.new("RGB", (60, 20), "teal").save(path)
    (folder / "features.md").write_text(
        "# Feature gaps\n\n**yes** in 3 of 3 measures.\n\n- initial, FPN: yes\n\n## Pictures\n\n"
        "![maps_fpn_0.jpg](maps_fpn_0.jpg)\n\n![secret](../secret.png)\n\n![far](http://host/x.png)\n"
    )
    return folder


def detections(folder, names=("plain", "distilled", NASTY)):
    """What tools/visualize_pair.py writes: two images, each with a picture of one colour a model."""
    (folder / "images").mkdir(parents=True)
    gallery = []
    for i in range(2):
        pictures = {}
        for k, name in enumerate(("ground truth", *names)):
            pictures[name] = f"images/{i}_{k}.jpg"
            Image.new("RGB", (320, 200), (60 * k, 200 - 100 * i, 90)).save(folder / pictures[name])
        shot = {"file_name": f"{i}&.jpg", "objects": i + 1, "pictures": pictures}
        gallery.append({**shot, "scores": {name: 0.5 + 0.1 * k for k, name in enumerate(names)}})
    record = {"between": list(names[:2]), "gallery": gallery}
    (folder / "detections.json").write_text(json.dumps(record))
    Image.new("RGB", PICTURE, "teal").save(folder / "mistakes.png")
    Image.new("RGB", PICTURE, "teal").save(folder / "side_by_side.jpg")
    (folder / "detections.md").write_text(
        f"# Detections\n\n| model | box AP |\n|:--|--:|\n| {names[-1]} | 12.30 |\n\n"
        "Quality per image: no difference shown.\n\n![Side by side](side_by_side.jpg)\n\n"
        "## Mistakes\n\n![Mistakes](mistakes.png)\n\n- *duplicate*: IoU of at least 0.5\n"
    )
    return folder
