"""train.writers in a whole run."""

import json
import sys

WANDB = """
import json
class Run:
    id = "x"
    def log(self, values, step):
        with open(NOTES, "a") as f:
            f.write(json.dumps([step, values]) + "\\n")
    def finish(self): open(NOTES + ".end", "w").close()
def init(**how): return Run()
"""


def test_a_run_sends_what_it_logs(train, tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    (tmp_path / "wandb.py").write_text(f"NOTES = {str(notes)!r}\n{WANDB}")
    monkeypatch.syspath_prepend(str(tmp_path))
    output, _ = train("custom_coco.py", "train.writers=[wandb]", "train.max_iter=2")
    sent = dict(json.loads(line) for line in notes.read_text().splitlines())
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}
    assert sorted(losses) == [0, 1]
    assert {i: sent[i]["total_loss"] for i in losses} == losses
    assert "distill/identical/weight" in sent[0] and "bbox/AP" in sent[2]
    assert (tmp_path / "notes.end").exists()
    del sys.modules["wandb"]
