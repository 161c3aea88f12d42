"""The sections that embed what other tools measured: feature gaps and detections."""

import json
import shlex
from pathlib import Path
from typing import Any, Iterable, List, Mapping, Optional

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from sharedkd.lab.analysis.gap_report import BRIGHT, NAMES, TAPS, first_and_last, words
from sharedkd.lab.analysis.mistakes import IN_WORDS
from sharedkd.lab.analysis.similarity import MEASURES
from sharedkd.lab.runs import short, tool

from .markup import Markup, join, markdown, missing, picture, scrolling, section, tag
from .overview import report_command
from .source import Source, is_distilled

__all__ = ["detections", "features"]

_QUALITY = (
    "The quality of an image is the sum of the IoU of right detections over (right + half the false "
    "alarms + half the objects not found)."
)


def features(source: Source, folder: Path) -> Markup:
    """Heat maps of the gaps before and after training, and the verdict in words.

    Args:
        source: for the commands that make them where they are not there.
        folder: the --output of tools/analyze_features.py.
    """
    record = _read(folder / "features.json")
    if record is None:
        return section(
            "features",
            "Feature gaps",
            *_to_make(
                "Not measured here, yet. Measure them with", _command(source, folder), source
            ),
        )
    measured = {"checkpoints": record["checkpoints"], "change": record["change"]}
    record = {**record, **_with_nan(measured)}
    verdict = markdown(words(record).split("## The gaps")[0].partition("\n")[2])
    hint = (
        "In the maps rows and columns are strides, rows those of the first of the two; maps beside each "
        "other have one scale of colours. ± is the standard deviation over images (CKA: minibatches)."
    )
    parts: List[Any] = [verdict, tag("p", hint)]
    for tap in record["checkpoints"][0]["taps"]:
        parts.append(tag("h3", f"Heat maps: {TAPS[tap]}"))
        for measure in MEASURES:
            parts.append(_heat_maps(record, tap, measure))
    names = [name for name in record["pictures"] if not name.startswith("gaps_")]
    pictures = _pictures(folder, names)
    if pictures:
        parts.append(
            tag("details", tag("summary", "Maps over images, and over training"), *pictures)
        )
    parts.append(tag("p", "Measured by ", tag("code", record.get("command") or "–")))
    return section("features", "Feature gaps", *parts)


def _command(source: Source, folder: Path) -> str:
    """What measures the feature gaps of the first distilled run."""
    run = next((r for r in source.runs if is_distilled(r.config)), None)
    config, overrides = (short(run.folder / "config.yaml") if run else "CONFIG"), []
    if run and run.record.get("config_file"):
        # They draw exactly the weights that the run started from; a config.yaml may list the parts
        # of a model in another order.
        config, overrides = short(run.record["config_file"]), [*(run.record.get("overrides") or [])]
        if run.was_moved:
            overrides.append(f"train.output_dir={short(run.folder)}")
    options = ["--config-file", config, "--output", short(folder)]
    return shlex.join([*tool("analyze_features.py"), *options, *overrides])


def _to_make(what: str, command: str, source: Source) -> List[Markup]:
    return [missing(what, command), missing("Then once more", report_command(source))]


def _heat_maps(record: Mapping[str, Any], tap: str, measure: str) -> Markup:
    """The teacher's own levels, then the pairs of the student before and after: one scale of colours."""
    steps = first_and_last(record)
    groups = [[("teacher - teacher", steps[0], "teacher-teacher")]]
    for kind in ("student-teacher", "student-student"):
        title = kind.replace("-", " - ")
        groups.append([(f"{title}, {step['name']}", step, kind) for step in steps])
    found = [
        [(title, step["taps"][tap]["matrices"][kind][measure]) for title, step, kind in group]
        for group in groups
    ]
    known = np.concatenate([np.ravel(np.array(m["mean"], float)) for g in found for _, m in g])
    low, high = float(np.nanmin(known)), float(np.nanmax(known))
    # Before and after stay side by side where there is room for both.
    shown = [tag("div", *(_heat_map(*each, low, high) for each in group)) for group in found]
    title = tag("h4", f"{NAMES[measure]}: bright is {BRIGHT[measure]}")
    return join([title, tag("div", *shown, class_="heats")])


def _heat_map(title: str, matrix: Mapping[str, Any], low: float, high: float) -> Markup:
    head = tag("tr", tag("td"), *(tag("th", f"{s}", scope="col") for s in matrix["columns"]))
    rows = []
    for stride, means, spreads in zip(matrix["rows"], matrix["mean"], matrix["sd"]):
        cells = [_heat(mean, sd, low, high) for mean, sd in zip(means, spreads)]
        rows.append(tag("tr", tag("th", f"{stride}", scope="row"), *cells))
    return tag("table", tag("caption", title), head, *rows, class_="heat")


def _heat(mean: float, spread: float, low: float, high: float) -> Markup:
    if np.isnan(mean):
        return tag("td", "–")
    share = (mean - low) / (high - low) if high > low else 0.5
    color = to_hex(matplotlib.colormaps["cividis"](share))
    style = f"background:{color};color:{'#fff' if share < 0.5 else '#000'}"
    more = "" if np.isnan(spread) else tag("small", f"±{spread:.2f}")
    return tag("td", f"{mean:.2f}", more, style=style)


def detections(source: Source, folder: Path) -> Markup:
    """Pictures with a slider between two models, AP bars, and kinds of mistakes.

    Args:
        source: for the commands that make them where they are not there.
        folder: the --output of tools/visualize_pair.py.
    """
    record = _read(folder / "detections.json")
    if record is None:
        command = shlex.join(
            [*tool("visualize_pair.py"), short(source.folder), "--output", short(folder)]
        )
        made = _to_make("Not drawn here, yet. Draw them with", command, source)
        return section("detections", "Detections", *made)
    parts: List[Any] = []
    if record["between"][0] != record["between"][1]:
        x, (first, second) = record["difference"], record["between"]
        parts.append(
            tag(
                "p",
                f"Quality per image (from 0 to 1), {second} minus {first}: {_signed(x['mean'])} "
                f"[{_signed(x['low'])}, {_signed(x['high'])}] over {x['images']} images: {x['verdict']}. "
                "The interval is over images, for these very weights.",
            )
        )
    parts.append(
        tag(
            "p",
            "The images where these two differ most: the exceptions, not the rule. Solid boxes are right, "
            "dashed and crossed ones are false alarms, black and white dashes are objects not found; "
            f"scores of at least {record['score_threshold']:g}. {_QUALITY}",
        )
    )
    shots = [_shot(folder, shot) for shot in record["gallery"]]
    if any(shots):
        left, right = record["between"]
        opened = tag("summary", "All pictures")
        shown = tag("details", opened, *shots, open=True, class_="shots")
        parts.append(tag("div", shown, class_="gallery", data_left=left, data_right=right))
    parts += _pictures(folder, ["ap_bars.png", "mistakes.png"])
    parts.append(markdown(f"Kinds of mistakes:\n\n{IN_WORDS}"))
    parts.append(tag("p", "Drawn by ", tag("code", record.get("command") or "–")))
    return section("detections", "Detections", *parts)


def _shot(folder: Path, shot: Mapping[str, Any]) -> Markup:
    title = f"{shot['file_name']}, {shot['objects']} object{'s' * (shot['objects'] != 1)}"
    pictures = []
    for model, name in shot["pictures"].items():
        path = _inside(folder, name)
        if path:
            score = shot["scores"].get(model)
            quality = f", quality {score:.2f}" if score is not None else ""
            image = picture(path, f"{model} on {shot['file_name']}", loading="lazy")
            caption = tag("figcaption", f"{model}{quality}")
            pictures.append(tag("figure", image, caption, data_model=model))
    if not pictures:
        return Markup("")
    return tag("div", tag("h4", title), tag("div", *pictures, class_="row"), class_="shot")


def _pictures(folder: Path, names: Iterable[str]) -> List[Markup]:
    paths = [(name, _inside(folder, name)) for name in names]
    return [
        tag(
            "figure",
            # Too small to read on a phone unless it is wider than that.
            scrolling(name, picture(path, f"{name}: see the caption there", loading="lazy")),
            class_="paper",
        )
        for name, path in paths
        if path
    ]


def _inside(folder: Path, name: str) -> Optional[Path]:
    """A picture of a folder; what is named outside of it is not embedded."""
    path = (folder / name).resolve()
    ok = path.is_file() and path.is_relative_to(folder.resolve())
    return path if ok and path.suffix.lower() in (".jpg", ".jpeg", ".png") else None


def _read(path: Path) -> Optional[Mapping[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else None


def _with_nan(value: Any) -> Any:
    """What JSON has as null was no number when it was measured."""
    if isinstance(value, Mapping):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return np.nan if value is None else value


def _signed(value: Optional[float]) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:+.3f}"
