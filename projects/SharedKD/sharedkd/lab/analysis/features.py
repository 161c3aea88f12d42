"""Measures the feature gaps of a pair at several points of its training, and reports them."""

from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.config import instantiate

from sharedkd.engine.hooks.record import hardware, versions
from sharedkd.errors import ConfigError
from sharedkd.files import replace
from sharedkd.lab.strict_json import strict_json
from sharedkd.modeling.taps import pyramid_shapes

from .feature_plots import draw_heat_maps, draw_maps, draw_training, position_maps
from .gap_report import words
from .gaps import GapMeter, Gaps, paired
from .pair import INITIAL, TAPS, Checkpoint, Pair, saved_checkpoints, validation_records
from .similarity import MEASURES

__all__ = ["analyze_features", "named_checkpoints"]

MINIBATCH, POSITIONS = 8, 32  # of CKA, see GapMeter
_CHANGING = ("identical", "inner", "cross")


def analyze_features(
    config_file: str,
    checkpoints: Optional[Sequence[Checkpoint]],
    images: int,
    output: Path,
    overrides: Sequence[str] = (),
    pictures: int = 2,
    command: str = "",
    say: Callable[[str], None] = print,
) -> str:
    """Measure a pair, and write features.json, features.md and the plots.

    Args:
        config_file: of a pair.
        checkpoints: states of the student after its initial one; None: those of the run's folder.
        images: of the validation set, evenly spread over it.
        output: folder, created if it does not exist.
        overrides: ``key=value``.
        pictures: for how many images maps are drawn.
        command: for the report.
        say: receives one line of progress at a time.

    Returns:
        where the report is, and its verdict.

    Raises:
        ConfigError: no pair, weights that do not fit, or nothing to measure on.
    """
    pair = Pair(config_file, overrides)
    records = validation_records(pair.cfg, images)
    if checkpoints is None:
        last = pair.cfg.train.max_iter
        checkpoints = saved_checkpoints(pair.folder, last) if pair.folder else []
    states = [Checkpoint(INITIAL, iteration=0), *checkpoints]
    _check(states)
    output.mkdir(parents=True, exist_ok=True)

    mapper = instantiate(pair.cfg.dataloader.test.mapper)
    inputs = [mapper(record) for record in records]
    taps = [t for t in TAPS if all(t in maps for maps in pair.maps(inputs[0]))]
    measured: List[Dict[str, Gaps]] = []
    drawn: Dict[Tuple[str, int], List[Any]] = {}
    for state in states:
        pair.load(state)
        meters = {tap: GapMeter(pair.normalize, MINIBATCH, POSITIONS) for tap in taps}
        draws = state in (states[0], states[-1])
        for number, mapped in enumerate(inputs):
            ours, theirs = pair.maps(mapped)
            height, width = mapped["image"].shape[-2:]
            for tap, meter in meters.items():
                meter.add(ours[tap], theirs[tap], (height, width))
                if draws and number < pictures:
                    maps = position_maps(ours[tap], theirs[tap], (height, width), pair.normalize)
                    drawn.setdefault((tap, number), []).append((state.name, maps))
        measured.append({tap: meter.result() for tap, meter in meters.items()})
        say(f"{state.name}: {len(inputs)} images")

    record = {
        "config": config_file,
        "command": command,
        "images": len(records),
        "image_ids": [r.get("image_id") for r in records],
        "normalize": pair.normalize,
        "minibatch": MINIBATCH,
        "positions": POSITIONS,
        "channels": _channels(pair, taps),
        "initial_is_the_runs": pair.initial_is_the_runs,
        "checkpoints": [
            {
                "name": state.name,
                "file": None if state.file is None else str(state.file),
                "iteration": state.iteration,
                "taps": {tap: gaps.record() for tap, gaps in found.items()},
            }
            for state, found in zip(states, measured)
        ],
        "change": _change(measured) if len(states) > 1 else {},
        "hardware": hardware(pair.model.device),
        "versions": versions(),
        "pictures": [],
    }
    for tap in taps:
        draw_heat_maps(record, tap, str(output / f"gaps_{tap}.png"))
        record["pictures"].append(f"gaps_{tap}.png")
        if draw_training(record, tap, str(output / f"training_{tap}.png")):
            record["pictures"].append(f"training_{tap}.png")
    for (tap, number), steps in drawn.items():
        name = f"maps_{tap}_{number}.jpg"
        draw_maps(inputs[number]["image"], steps, str(output / name))
        record["pictures"].append(name)
    replace(str(output / "features.json"), lambda f: f.write(strict_json(record)))
    text = words(record)
    replace(str(output / "features.md"), lambda f: f.write(text.encode()))
    return f"{text.split('## The gaps')[0].strip()}\n\n{output / 'features.md'}"


def named_checkpoints(text: str) -> List[Checkpoint]:
    """The checkpoints that ``text`` names, as ``FILE,NAME=FILE`` on a command line.

    A file without a name is named after itself, without .pth.  Whether it exists is not checked here.
    """
    found = []
    for item in filter(None, text.split(",")):
        name, equals, file = item.rpartition("=")
        found.append(Checkpoint(name if equals else Path(item).stem, Path(file)))
    return found


def _check(states: Sequence[Checkpoint]) -> None:
    names = [state.name for state in states]
    for state in states:
        if names.count(state.name) > 1:
            raise ConfigError(
                "--checkpoint", state.name, "is the name of two states", "name them: NAME=FILE"
            )
        if state.file is not None and not state.file.is_file():
            raise ConfigError("--checkpoint", state.file, "no such file", "name a checkpoint")


def _channels(pair: Pair, taps: Sequence[str]) -> Dict[str, Dict[str, Mapping[int, int]]]:
    model = pair.model
    shapes = {
        "student": pyramid_shapes(model.student, model.pyramid),
        "teacher": model.teacher.shapes,
    }
    return {tap: {who: shapes[who][tap] for who in shapes} for tap in taps}


def _change(measured: Sequence[Mapping[str, Gaps]]) -> Dict[str, Dict[str, Dict[str, Any]]]:
    """The last state minus the first, paired by image."""
    first, last = measured[0], measured[-1]
    return {
        tap: {
            m: {q: paired(last[tap].quantity(q, m), first[tap].quantity(q, m)) for q in _CHANGING}
            for m in MEASURES
        }
        for tap in first
    }
