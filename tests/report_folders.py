"""Folders as runs, comparisons and the analysis tools write them, with values that tests choose."""

import json

import yaml
from PIL import Image

MAX_ITER = 200
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
    """What tools/analyze_features.py writes: student - student gaps shrink from 0.9 to 0.1."""
    folder.mkdir(parents=True)
    steps = []
    for name, iteration, gap in (("initial", 0, 0.9), ("final", MAX_ITER, 0.1)):
        matrix = {"rows": [8, 16], "columns": [8, 16], "mean": [[0.0, gap], [gap, None]]}
        matrix.update(sd=[[0.01, 0.02], [0.03, None]], half_width=[[0.1, 0.1], [0.1, 0.1]], count=4)
        fixed = {**matrix, "mean": [[0.0, 0.5], [0.5, 0.0]]}
        kinds = {"student-teacher": fixed, "student-student": matrix, "teacher-teacher": fixed}
        quantity = {"mean": gap, "half_width": 0.05}
        names = ("identical", "inner", "cross", "teacher")
        difference = {"mean": gap - 1, "low": gap - 1.1, "high": gap - 0.9, "count": 4}
        difference.update(verdict="smaller")
        each = ("mse", "cosine", "cka")
        found = {
            "matrices": {kind: {m: value for m in each} for kind, value in kinds.items()},
            "quantities": {m: {q: quantity for q in names} for m in each},
            "inner_minus_cross": {
                m: {**difference, "pairs": {"8-16": difference}} for m in each[:2]
            },
        }
        # One minibatch has no interval, and JSON no NaN.
        single = {**difference, "low": None, "high": None, "count": 1}
        single.update(verdict="too few for an interval")
        found["inner_minus_cross"]["cka"] = {**single, "pairs": {"8-16": single}}
        steps.append({"name": name, "file": None, "iteration": iteration, "taps": {"fpn": found}})
    record = {
        "config": "x.py", "command": "tools/analyze_features.py x", "images": 4, "image_ids": [1],
        "normalize": "instance", "minibatch": 8, "positions": 32, "initial_is_the_runs": True,
        "channels": {"fpn": {"student": {"8": 4, "16": 4}, "teacher": {"8": 4, "16": 4}}},
        "checkpoints": steps, "change": {}, "pictures": ["maps_fpn_0.jpg", "../secret.png"],
    }  # fmt: skip
    Image.new("RGB", (60, 20), "teal").save(folder / "maps_fpn_0.jpg")
    Image.new("RGB", (60, 20), "teal").save(folder.parent / "secret.png")
    (folder / "features.json").write_text(json.dumps(record))
    return folder


def detections(folder, names=("plain", "distilled", NASTY)):
    """What tools/visualize_pair.py writes: two images, each with a picture of one colour a model."""
    (folder / "images").mkdir(parents=True)
    gallery = []
    for i in range(2):
        pictures = {}
        for k, name in enumerate(("ground truth", *names)):
            pictures[name] = f"images/{i}_{k}.jpg"
            color = (60 * k, 200 - 100 * i, 90)
            Image.new("RGB", (320, 200), color).save(folder / pictures[name])
        scores = {name: 0.5 + 0.1 * k for k, name in enumerate(names)}
        gallery.append(
            {
                "image_id": i,
                "file_name": f"{i}&.jpg",
                "objects": i + 1,
                "scores": scores,
                "pictures": pictures,
            }
        )
    record = {
        "command": "tools/visualize_pair.py x", "score_threshold": 0.5, "between": list(names[:2]),
        "gallery": gallery, "images": 2,
        "difference": {"mean": 0.1, "low": -0.2, "high": 0.4, "images": 2, "verdict": "no difference shown"},
    }  # fmt: skip
    (folder / "detections.json").write_text(json.dumps(record))
    return folder
