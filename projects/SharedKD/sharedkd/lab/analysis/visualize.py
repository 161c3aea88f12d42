"""Detectors of a pair side by side: their AP, their mistakes, and the images where they differ."""

from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from omegaconf import OmegaConf
from tabulate import tabulate

from sharedkd.errors import ConfigError
from sharedkd.files import replace
from sharedkd.lab.scores import MORE_METRICS, TASKS, interval
from sharedkd.lab.strict_json import strict_json

from .detection_plots import draw_ap, draw_mistakes
from .detections import Found, Truth, average_precision, detect, match_images, mistakes
from .gallery import draw_gallery
from .mistakes import FOREGROUND, IN_WORDS
from .models import Source, load_detectors
from .pair import validation_records

__all__ = ["visualize"]


def visualize(
    found: Sequence[Source],
    output: Path,
    overrides: Sequence[str] = (),
    images: Optional[int] = None,
    pictures: int = 6,
    score_threshold: float = 0.5,
    between: Sequence[str] = (),
    command: str = "",
    say: Callable[[str], None] = print,
) -> str:
    """Run detectors over the validation set, and write detections.json, detections.md and pictures.

    Args:
        found: the detectors, see :func:`~.models.sources`.
        output: folder, created if it does not exist.
        overrides: ``key=value`` for the configs of all of them.
        images: of the validation set, evenly spread over it; None: all.
        pictures: how many images are drawn.
        score_threshold: for pictures and counts; AP and costs have none.
        between: the two models whose difference chooses the images; default: the first two.
        command: for the record.
        say: receives one line of progress at a time.

    Returns:
        the table, and where the files are.

    Raises:
        ConfigError: models that do not fit their configs or each other.
    """
    cfg, detectors = load_detectors(found, overrides, say)
    names = [detector.source.name for detector in detectors]
    between = _pair(between, names)
    records = validation_records(cfg, images)
    dataset = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    truth = Truth(dataset if isinstance(dataset, str) else dataset[0], records)
    most = OmegaConf.select(cfg, "dataloader.evaluator.max_dets_per_image", default=None) or 100

    results: Dict[str, Found] = {}
    for detector in detectors:
        results[detector.source.name] = detect(detector, records, truth)
        say(f"{detector.source.name}: {len(records)} images")
    tasks = _tasks(truth, results)
    task = tasks[-1]
    matches = {n: match_images(truth, x, task, score_threshold) for n, x in results.items()}
    scores = {n: {i: match.quality for i, match in of.items()} for n, of in matches.items()}
    ours, theirs = (scores[name] for name in between)
    difference = _difference(scores, between)
    chosen = sorted(ours, key=lambda i: -abs(ours[i] - theirs[i]))[:pictures]
    if not any(match.kinds for of in matches.values() for match in of.values()):
        # All images are equal: none of them shows anything.
        difference["verdict"] = f"no detection reaches {score_threshold:g}: lower --score-threshold"
        chosen = []
    per_image = {r["image_id"]: _per_image(truth, r, scores) for r in records}
    record = {
        "command": command,
        "dataset": truth.coco.dataset.get("info", {}).get("description") or dataset,
        "images": len(records),
        "classes": list(truth.classes.values()),
        "score_threshold": score_threshold,
        "tasks": tasks,
        "models": {
            source.name: {
                "config": str(source.config),
                "checkpoint": str(source.checkpoint or ""),
                **{
                    t: _of_model(truth, results[source.name], t, score_threshold, most)
                    for t in tasks
                },
            }
            for source in (detector.source for detector in detectors)
        },
        "per_image": list(per_image.values()),
        "between": list(between),
        "difference": difference,
    }
    output.mkdir(parents=True, exist_ok=True)
    files = []
    if chosen:
        by_id = {r["image_id"]: r for r in records}
        captions = [_caption(i, scores, between) for i in chosen]
        shown = [by_id[i] for i in chosen]
        span = OmegaConf.select(cfg, "dataloader.test.mapper.image_range")
        files = draw_gallery(truth, shown, results, matches, task, captions, output, span)
    record["gallery"] = [{**per_image[i], "pictures": paths} for i, paths in zip(chosen, files)]
    draw_ap(record, str(output / "ap_bars.png"))
    draw_mistakes(record, str(output / "mistakes.png"))
    replace(str(output / "detections.json"), lambda f: f.write(strict_json(record)))
    text = _words(record)
    replace(str(output / "detections.md"), lambda f: f.write(text.encode()))
    return f"{_table(record, tasks)}\n\n{_sentence(record)}\n\n{output / 'detections.md'}"


def _pair(between: Sequence[str], names: Sequence[str]) -> Tuple[str, str]:
    doubles = [name for name in names if names.count(name) > 1]
    if doubles:
        raise ConfigError(
            "--models", doubles[0], "is the name of two models", "name them: NAME=FILE"
        )
    chosen = list(between) or [*names[:2], *names[:1]][:2]  # a single model: all images are equal
    if len(chosen) != 2 or not set(chosen) <= set(names):
        raise ConfigError(
            "--between", ",".join(chosen), "are not two of the models", f"use {names}"
        )
    return chosen[0], chosen[1]


def _tasks(truth: Truth, results: Mapping[str, Found]) -> List[str]:
    """Masks are compared where the data and all models have them; then they are what is drawn."""
    everything = [x for found in results.values() for image in found.values() for x in image]
    masks = bool(everything) and all("segmentation" in x for x in everything)
    return ["bbox", "segm"] if masks and truth.has_masks else ["bbox"]


def _of_model(
    truth: Truth, found: Found, task: str, score_threshold: float, most: int
) -> Dict[str, Any]:
    ap = average_precision(truth, found, task, most)
    return {**ap, "mistakes": mistakes(truth, found, task, score_threshold)}


def _per_image(
    truth: Truth, record: Mapping[str, Any], scores: Mapping[str, Mapping[int, float]]
) -> Dict[str, Any]:
    image_id = record["image_id"]
    return {
        "image_id": image_id,
        "file_name": Path(record["file_name"]).name,
        "objects": sum(not x.get("iscrowd", 0) for x in truth.objects(image_id)),
        "scores": {name: of[image_id] for name, of in scores.items()},
    }


def _difference(
    scores: Mapping[str, Mapping[int, float]], between: Tuple[str, str]
) -> Dict[str, Any]:
    """The second model minus the first, paired by image."""
    first, second = (scores[name] for name in between)
    values = np.array([second[i] - first[i] for i in first])
    mean, half = interval(values)
    low, high = mean - half, mean + half
    verdict = "no difference shown"
    if low > 0 or high < 0:
        verdict = "better" if low > 0 else "worse"
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "images": len(values),
        "second_better": int((values > 0).sum()),
        "first_better": int((values < 0).sum()),
        "verdict": verdict if len(values) > 1 else "one image: no interval",
    }


def _caption(
    image_id: int, scores: Mapping[str, Mapping[int, float]], between: Tuple[str, str]
) -> str:
    found = [f"{name} {scores[name][image_id]:.2f}" for name in dict.fromkeys(between)]
    return "\n".join([f"image {image_id}, quality:", *found])


def _words(record: Mapping[str, Any]) -> str:
    parts = ["# Detections", _table(record, record["tasks"]), _sentence(record)]
    gallery = [
        "The side-by-side picture shows the images where these two differ most, in either direction. "
        f"Solid boxes are right (IoU of at least {FOREGROUND} with an object of their class), dashed "
        "and crossed ones are false alarms, dashes of black and white are objects not found; scores "
        f"of at least {record['score_threshold']:g} are shown. These images are the exceptions, "
        "not the rule.",
        "![Side by side](side_by_side.jpg)",
    ]
    parts += gallery if record["gallery"] else []
    parts += [
        "## AP by size and class",
        "![AP](ap_bars.png)",
        "## Mistakes",
        "![Mistakes](mistakes.png)",
        IN_WORDS,
        f"`{record['command']}`",
    ]
    return "\n\n".join(parts) + "\n"


def _sentence(record: Mapping[str, Any]) -> str:
    first, second = record["between"]
    verdict = record["difference"]["verdict"]
    if verdict.startswith("no detection"):
        return f"{verdict.capitalize()}."
    if first == second:
        return "One model: nothing to compare it with."
    x = record["difference"]
    return (
        f"Quality per image (from 0 to 1, of detections with a score of "
        f"{record['score_threshold']:g} or more; AP counts all), {second} minus {first}: {x['mean']:+.3f} "
        f"[{x['low']:+.3f}, {x['high']:+.3f}] over {x['images']} images: {verdict}. {second} is "
        f"ahead on {x['second_better']} images, {first} on {x['first_better']}. The interval is over "
        "images, for these very weights: it says nothing about other seeds."
    )


def _table(record: Mapping[str, Any], tasks: Sequence[str]) -> str:
    metrics = ("AP", *MORE_METRICS)
    rows = [
        [name, *(_number(model[task][metric]) for task in tasks for metric in metrics)]
        for name, model in record["models"].items()
    ]
    headers = ["model", *(f"{TASKS[task]} {metric}" for task in tasks for metric in metrics)]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def _number(value: Optional[float]) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.1f}"
