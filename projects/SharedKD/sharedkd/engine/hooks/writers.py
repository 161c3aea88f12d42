"""The writers of a run: Detectron2's own, and Weights & Biases or MLflow if they are installed."""

import json
import os
from abc import abstractmethod
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from sharedkd.config.plain import leaves, read_plain
from sharedkd.files import replace

__all__ = [
    "MLflowWriter",
    "ServiceWriter",
    "WandbWriter",
    "build_writers",
]

FILE = "metrics.json"
_PARAMETERS = 100  # most that MLflow takes at once
_LONGEST = 500  # most characters of a value that every version of MLflow takes


def build_writers(
    folder: str, names: Sequence[str], max_iter: int, first: int = 0
) -> List[EventWriter]:
    """Detectron2's writers to console, metrics.json and TensorBoard, and those of other services.

    The lines of iterations that a resumed run repeats are removed from metrics.json, and hidden in
    TensorBoard.

    Args:
        folder: the run's output folder, with its config.yaml.
        names: some of :data:`~sharedkd.config.defaults.WRITERS`.
        max_iter: length of the run.
        first: the first iteration that will be logged; above 0 a resumed run goes on.
    """
    path = os.path.join(folder, FILE)
    _remove_lines(path, first)
    services = {"wandb": WandbWriter, "mlflow": MLflowWriter}
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(path),
        TensorboardXWriter(folder, purge_step=first or None),
        *(services[name](folder, first > 0) for name in names),
    ]


def _remove_lines(path: str, first: int) -> None:
    """Remove the lines of iterations from ``first`` on, and one that a killed run did not finish."""
    if not os.path.exists(path):
        return
    with open(path) as f:
        lines = [x for x in f if x.endswith("}\n") and json.loads(x)["iteration"] < first]
    replace(path, lambda f: f.write("".join(lines).encode()))


class ServiceWriter(EventWriter):
    """Sends the scalars to a service, as Detectron2's own writers put them into files.

    The service's identifier of the run is stored in the output folder, so that a resumed run continues it.
    """

    package: str  #: imported when the writer is made

    def __init__(self, folder: str, resuming: bool):
        """Start the service's run, or continue that of ``folder``."""
        self._last_write = -1
        self.service = import_module(self.package)
        self.folder = Path(folder).resolve()
        kept = self.folder / f"{self.package}_run.txt"
        known = kept.read_text() if resuming and kept.is_file() else None
        config = read_plain(self.folder / "config.yaml") or {}
        name = f"{self.folder.parent.name}/{self.folder.name}"
        kept.write_text(self._start(name, config, known))

    @abstractmethod
    def _start(self, name: str, config: Mapping[str, Any], known: Optional[str]) -> str:
        """Start a run, or continue the ``known`` one; return the service's identifier."""

    @abstractmethod
    def _send(self, values: Dict[str, float], iteration: int) -> None: ...

    def write(self) -> None:
        found: Dict[int, Dict[str, float]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint()
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                found[iteration][name] = value
        for iteration in sorted(found):
            self._send(found[iteration], iteration)
        self._last_write = max([self._last_write, *found])


class WandbWriter(ServiceWriter):
    """Writes to Weights & Biases, configured by its environment (WANDB_PROJECT, WANDB_MODE, ...)."""

    package = "wandb"

    def _start(self, name: str, config: Mapping[str, Any], known: Optional[str]) -> str:
        project = os.environ.get("WANDB_PROJECT", "sharedkd")
        named = dict(project=project, name=name, id=known, resume="allow")
        self.run = self.service.init(dir=str(self.folder), config=config, **named)
        return self.run.id

    def _send(self, values: Dict[str, float], iteration: int) -> None:
        self.run.log(values, step=iteration)

    def close(self) -> None:
        self.run.finish()


class MLflowWriter(ServiceWriter):
    """Writes to MLflow, configured by MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

    package = "mlflow"

    def _start(self, name: str, config: Mapping[str, Any], known: Optional[str]) -> str:
        if known:
            return self.service.start_run(run_id=known).info.run_id
        run = self.service.start_run(run_name=name)
        parameters = [(key, text[:_LONGEST]) for key, text in leaves(config)]
        for i in range(0, len(parameters), _PARAMETERS):
            self.service.log_params(dict(parameters[i : i + _PARAMETERS]))
        return run.info.run_id

    def _send(self, values: Dict[str, float], iteration: int) -> None:
        self.service.log_metrics(values, step=iteration)

    def close(self) -> None:
        self.service.end_run()
