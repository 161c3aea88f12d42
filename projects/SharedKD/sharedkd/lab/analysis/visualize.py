"""Detectors of a pair side by side: their AP, their mistakes, and the images where they differ."""

from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from omegaconf import OmegaConf

from sharedkd.errors import ConfigError
from sharedkd.lab.output import write_json, write_text
from sharedkd.lab.scores import Difference
from sharedkd.lab.tables import results_table, with_bounds

from .detection_plots import draw_ap, draw_mistakes
from .detections import Found, Truth, average_precision, detect, match_images, mistakes
from .drawing import draw_gallery
from .mistakes import FOREGROUND, IN_WORDS
from .models import Source, load_detectors, validation_records

__all__ = ["table", "visualize"]


def visualize(
    found: Sequence[Source],
    output: Path,
    overrides: Sequence[str] = (),
    images: Optional[int] = None,
    pictures: int = 6,
    score_threshold: float = 0.5,
    between: Sequence[str] = (),
    command: str = "",
) -> Dict[str, Any]:
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

    Returns:
        what detections.json holds; :func:`table` and ``record["sentence"]`` say it in words.
    """
    cfg, detectors = load_detectors(found, overrides)
    first, second = between = _pair(between, [detector.source.name for detector in detectors])
    records = validation_records(cfg, images)
    dataset = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    truth = Truth(dataset if isinstance(dataset, str) else dataset[0], records)
    most = OmegaConf.select(cfg, "dataloader.evaluator.max_dets_per_image", default=None) or 100

    print(f"{len(records)} images, {len(detectors)} models", flush=True)
    results, seconds = detect(detectors, records, truth)
    # Masks are compared where the data and all models have them; then they are what is drawn.
    each = [x for of in results.values() for image in of.values() for x in image]
    masks = truth.has_masks and bool(each) and all("segmentation" in x for x in each)
    tasks = ["bbox", "segm"] if masks else ["bbox"]
    task = tasks[-1]
    matches = {n: match_images(truth, x, task, score_threshold) for n, x in results.items()}
    quality = {n: {i: match.quality for i, match in of.items()} for n, of in matches.items()}
    differences = [quality[second][i] - x for i, x in quality[first].items()]
    apart = Difference.of(differences, ("worse", "better", "image"))
    is_empty = not any(match.kinds for of in matches.values() for match in of.values())

    def results_of(found: Found, task: str) -> Dict[str, Any]:
        ap = average_precision(truth, found, task, most)
        return {**ap, "mistakes": mistakes(truth, found, task, score_threshold)}

    per_image = [
        {
            "image_id": x["image_id"],
            "file_name": Path(x["file_name"]).name,
            "objects": sum(not note.get("iscrowd", 0) for note in truth.objects(x["image_id"])),
            "scores": {name: of[x["image_id"]] for name, of in quality.items()},
        }
        for x in records
    ]
    record: Dict[str, Any] = {
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
                "parameters": parameters,
                "seconds_per_image": seconds[source.name],
                **{task: results_of(results[source.name], task) for task in tasks},
            }
            for source, parameters in ((x.source, x.parameters) for x in detectors)
        },
        "per_image": per_image,
        "between": list(between),
        "difference": {
            **apart.record(),
            "second_better": sum(x > 0 for x in differences),
            "first_better": sum(x < 0 for x in differences),
        },
    }
    record["sentence"] = _sentence(record, apart, is_empty)
    output.mkdir(parents=True, exist_ok=True)
    # Without a detection all images are equal: none of them shows anything.
    widest = lambda x: -abs(x["scores"][first] - x["scores"][second])  # noqa: E731
    chosen = [] if is_empty else sorted(per_image, key=widest)[:pictures]
    files = []
    if chosen:
        by_id = {x["image_id"]: x for x in records}
        span = OmegaConf.select(cfg, "dataloader.test.mapper.image_range")
        shown = [by_id[x["image_id"]] for x in chosen]
        captions = [_caption(x, between) for x in chosen]
        files = draw_gallery(truth, shown, results, matches, task, captions, output, span)
    record["gallery"] = [{**x, "pictures": paths} for x, paths in zip(chosen, files)]
    draw_ap(record).savefig(output / "ap_bars.png", dpi=110)
    draw_mistakes(record).savefig(output / "mistakes.png", dpi=110)
    write_json(output / "detections.json", record)
    write_text(output / "detections.md", _words(record))
    return record


def table(record: Mapping[str, Any]) -> str:
    """The models of detections.json with their AP, size and speed, in Markdown."""
    return results_table([{"name": name, **model} for name, model in record["models"].items()])


def _pair(between: Sequence[str], names: Sequence[str]) -> Tuple[str, str]:
    doubles = [name for name in names if names.count(name) > 1]
    if doubles:
        problem = "is the name of two models"
        raise ConfigError("--models", doubles[0], problem, "name them: NAME=FILE")
    chosen = list(between) or [*names[:2], *names[:1]][:2]  # a single model: all images are equal
    if len(chosen) != 2 or not set(chosen) <= set(names):
        problem = "are not two of the models"
        raise ConfigError("--between", ",".join(chosen), problem, f"use {names}")
    return chosen[0], chosen[1]


def _caption(image: Mapping[str, Any], between: Sequence[str]) -> str:
    found = [f"{name} {image['scores'][name]:.2f}" for name in dict.fromkeys(between)]
    return "\n".join([f"image {image['image_id']}, quality:", *found])


def _words(record: Mapping[str, Any]) -> str:
    parts = ["# Detections", table(record), record["sentence"]]
    if record["gallery"]:
        parts += [
            "The side-by-side picture shows the images where these two differ most, in either direction. "
            f"Solid boxes are right (IoU of at least {FOREGROUND} with an object of their class), dashed "
            "and crossed ones are false alarms, dashes of black and white are objects not found; scores "
            f"of at least {record['score_threshold']:g} are shown. These images are the exceptions, "
            "not the rule.",
            "![Side by side](side_by_side.jpg)",
        ]
    parts += ["## AP by size and class", "![AP](ap_bars.png)"]
    parts += ["## Mistakes", "![Mistakes](mistakes.png)", IN_WORDS, f"`{record['command']}`"]
    return "\n\n".join(parts) + "\n"


def _sentence(record: Mapping[str, Any], apart: Difference, is_empty: bool) -> str:
    (first, second), x = record["between"], record["difference"]
    threshold = f"{record['score_threshold']:g}"
    if is_empty:
        return f"No detection reaches {threshold}: lower --score-threshold."
    if first == second:
        return "One model: nothing to compare it with."
    return (
        f"Quality per image (from 0 to 1, of detections with a score of {threshold} or more; AP counts "
        f"all), {second} minus {first}: {with_bounds(apart, layout='+.3f')} over {apart.count} images: "
        f"{apart.verdict}. "
        f"{second} is ahead on {x['second_better']} images, {first} on {x['first_better']}. The interval "
        "is over images, for these very weights: it says nothing about other seeds."
    )
