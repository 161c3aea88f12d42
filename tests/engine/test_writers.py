"""train.writers, with packages that only note what they are told."""

import json
import sys
import textwrap

import pytest
import tiny
from detectron2.engine import hooks
from detectron2.utils.events import EventStorage

from sharedkd.config import load_config
from sharedkd.engine.hooks.writers import build_writers
from sharedkd.errors import ConfigError

NOTE = """
    import json, os
    def note(*what):
        with open(os.environ["NOTES"], "a") as f:
            f.write(json.dumps(what) + "\\n")
"""
FAKES = {
    "wandb": """
    class Run:
        def __init__(self, id): self.id = id
        def log(self, values, step): note("log", step, values)
        def finish(self): note("finish")
    def init(**how):
        how["dir"] = os.path.basename(how["dir"])
        note("init", how)
        return Run(how["id"] or "new id")
    """,
    "mlflow": """
    from types import SimpleNamespace
    def start_run(run_id=None, run_name=None):
        note("init", {"id": run_id, "name": run_name})
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "new id"))
    def log_params(values):
        assert len(values) <= 100
        note("params", values)
    def log_metrics(values, step): note("log", step, values)
    def end_run(): note("finish")
    """,
}


@pytest.fixture(params=list(FAKES))
def service(request, tmp_path, monkeypatch):
    """(name, function that returns what the package was told)."""
    packages = tmp_path / "packages"
    packages.mkdir()
    source = textwrap.dedent(NOTE) + textwrap.dedent(FAKES[request.param])
    (packages / f"{request.param}.py").write_text(source)
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    def notes():
        return [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]

    yield request.param, notes
    sys.modules.pop(request.param, None)


class Trainer:
    def __init__(self, storage, start, end):
        self.storage, self.start_iter, self.max_iter, self.iter = storage, start, end, start


def train(folder, name, start, end):
    """Iterations of a run that logs its number every second one."""
    services = build_writers(str(folder), [name], 4, start)[1:]  # without the console
    writer = hooks.PeriodicWriter(services, 2)
    with EventStorage(start) as storage:
        writer.trainer = Trainer(storage, start, 4)
        for i in range(start, end):
            writer.trainer.iter = storage.iter = i
            storage.put_scalar("total_loss", 10.0 * i, smoothing_hint=False)
            writer.after_step()
        writer.after_train()


def test_a_resumed_run_logs_no_iteration_twice(tmp_path, service):
    name, _ = service
    train(tmp_path, name, 0, 4)
    (tmp_path / "metrics.json").open("a").write('{"iteration": 5, "half')
    train(tmp_path, name, 2, 4)
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert [json.loads(x)["iteration"] for x in lines] == [1, 3]


def test_a_run_is_logged_and_continued_under_its_name(service, tmp_path):
    name, notes = service
    folder = tmp_path / "arm/seed0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {seed: 3, max_iter: 4}\n")
    train(folder, name, 0, 2)
    first = notes()
    begin = first[0][1]
    assert (first[0][0], begin["name"], begin["id"]) == ("init", "arm/seed0", None)
    if name == "wandb":
        assert begin["config"] == {"train": {"seed": 3, "max_iter": 4}}
        assert (begin["project"], begin["resume"], begin["dir"]) == ("sharedkd", "allow", "seed0")
    else:
        assert first[1] == ["params", {"train.seed": "3", "train.max_iter": "4"}]
    assert [x[1:] for x in first if x[0] == "log"] == [[1, {"total_loss": 10.0}]]
    assert first[-1] == ["finish"]

    train(folder, name, 2, 4)
    second = notes()[len(first) :]
    assert second[0][1]["id"] == "new id"
    assert not [x for x in second if x[0] == "params"]  # MLflow refuses other values
    assert [x[1:] for x in second if x[0] == "log"] == [[3, {"total_loss": 30.0}]]


def test_a_new_run_in_the_same_folder_is_a_new_one(service, tmp_path):
    name, notes = service
    for _ in range(2):
        train(tmp_path, name, 0, 2)
    assert [x[1]["id"] for x in notes() if x[0] == "init"] == [None, None]


def test_many_parameters_are_sent_in_parts(service, tmp_path):
    name, notes = service
    lines = "".join(f"  k{i}: {'x' * 600 if i == 0 else i}\n" for i in range(250))
    (tmp_path / "config.yaml").write_text(f"many:\n{lines}")
    train(tmp_path, name, 0, 2)
    sent = [x[1] for x in notes() if x[0] == "params"]
    if name == "mlflow":
        assert [len(x) for x in sent] == [100, 100, 50]
        assert len(sent[0]["many.k0"]) == 500


def test_what_is_not_installed_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wandb").mkdir()  # as wandb itself leaves one behind: no package
    with pytest.raises(
        ConfigError, match=r"train.writers=wandb.*is not installed.*pip install wandb"
    ):
        load_config(str(tiny.ROOT / "configs/faster_rcnn_sharedkd.py"), ["train.writers=[wandb]"])


@pytest.mark.parametrize(
    "value, message", [("[comet]", "use one of wandb, mlflow"), ("[5]", "use one of wandb, mlflow")]
)
def test_bad_names(value, message):
    config = str(tiny.ROOT / "configs/faster_rcnn_sharedkd.py")
    with pytest.raises(ConfigError, match=message):
        load_config(config, [f"train.writers={value}"])
