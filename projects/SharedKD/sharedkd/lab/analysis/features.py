"""Measures the feature gaps of a pair at several points of its training, and reports them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from detectron2.config import instantiate

from sharedkd.engine.hooks.record import hardware, versions
from sharedkd.errors import ConfigError
from sharedkd.lab.output import write_json, write_text
from sharedkd.modeling.taps import pyramid_shapes

from .feature_plots import draw_heat_maps, draw_maps, draw_training, position_maps
from .gap_report import words
from .gaps import MINIBATCH, POSITIONS, GapMeter
from .models import validation_records
from .pair import TAPS, Checkpoint, Pair, saved_checkpoints

__all__ = ["analyze_features", "named_checkpoints"]


def analyze_features(
    config_file: str,
    checkpoints: Optional[Sequence[Checkpoint]],
    images: int,
    output: Path,
    overrides: Sequence[str] = (),
    pictures: int = 2,
    command: str = "",
) -> str:
    """Measure a pair, and write features.json, features.md and the plots.

    Args:
        config_file: of a pair.
        checkpoints: states of the student after its initial one; None: those of the run's folder.
        images: how many of the validation set, evenly spread over it.
        output: folder, created if it does not exist.
        overrides: ``key=value``.
        pictures: for how many images maps are drawn.
        command: for the report.

    Returns:
        where the report is, and its verdict.
    """
    pair = Pair(config_file, overrides)
    records = validation_records(pair.cfg, images)
    if checkpoints is None:
        last = pair.cfg.train.max_iter
        checkpoints = saved_checkpoints(pair.folder, last) if pair.folder else []
    states = [Checkpoint("initial", iteration=0), *checkpoints]
    _check(states)
    output.mkdir(parents=True, exist_ok=True)

    mapper = instantiate(pair.cfg.dataloader.test.mapper)
    inputs = [mapper(record) for record in records]
    taps = [t for t in TAPS if all(t in maps for maps in pair.maps(inputs[0]))]
    measured: List[Dict[str, Any]] = []
    drawn: Dict[Tuple[str, int], List[Any]] = {}
    for state in states:
        pair.load(state)
        meters = {tap: GapMeter(pair.normalize) for tap in taps}
        for number, mapped in enumerate(inputs):
            ours, theirs = pair.maps(mapped)
            height, width = mapped["image"].shape[-2:]
            for tap, meter in meters.items():
                meter.add(ours[tap], theirs[tap], (height, width))
                if number < pictures and state in (states[0], states[-1]):
                    maps = position_maps(ours[tap], theirs[tap], (height, width), pair.normalize)
                    drawn.setdefault((tap, number), []).append((state.name, maps))
        measured.append({tap: meter.result().record() for tap, meter in meters.items()})
        print(f"{state.name}: {len(inputs)} images")

    student = pyramid_shapes(pair.model.student, pair.model.pyramid)
    teacher = pair.model.teacher.shapes
    record = {
        "config": config_file,
        "command": command,
        "images": len(records),
        "image_ids": [r.get("image_id") for r in records],
        "normalize": pair.normalize,
        "minibatch": MINIBATCH,
        "positions": POSITIONS,
        "channels": {tap: {"student": student[tap], "teacher": teacher[tap]} for tap in taps},
        "initial_is_the_runs": pair.initial_is_the_runs,
        "checkpoints": [
            {**asdict(state), "file": state.file and str(state.file), "taps": found}
            for state, found in zip(states, measured)
        ],
        "hardware": hardware(pair.model.device),
        "versions": versions(),
    }
    figures = {f"gaps_{tap}.png": draw_heat_maps(record, tap) for tap in taps}
    figures.update({f"training_{tap}.png": draw_training(record, tap) for tap in taps})
    for (tap, number), steps in drawn.items():
        figures[f"maps_{tap}_{number}.jpg"] = draw_maps(inputs[number]["image"], steps)
    record["pictures"] = [name for name, figure in figures.items() if figure]
    for name in record["pictures"]:
        figures[name].savefig(output / name, dpi=110)
    write_json(output / "features.json", record)
    text = words(record)
    write_text(output / "features.md", text)
    return f"{text.partition('## Pictures')[0].strip()}\n\n{output / 'features.md'}"


def named_checkpoints(text: str) -> List[Checkpoint]:
    """The checkpoints that ``FILE,NAME=FILE,...`` names; without a name, after the file."""
    found = []
    for item in filter(None, text.split(",")):
        name, equals, file = item.rpartition("=")
        found.append(Checkpoint(name if equals else Path(item).stem, Path(file)))
    return found


def _check(states: Sequence[Checkpoint]) -> None:
    names = [state.name for state in states]
    for state in states:
        if names.count(state.name) > 1:
            problem = "is the name of two states"
            raise ConfigError("--checkpoint", state.name, problem, "name them: NAME=FILE")
        if state.file is not None and not state.file.is_file():
            raise ConfigError("--checkpoint", state.file, "no such file", "name a checkpoint")
