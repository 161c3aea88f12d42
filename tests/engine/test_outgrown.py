"""The hook that compares the student's AP with the teachers'."""

import tiny
import torch

from sharedkd import IdenticalLayer, SharedKDTrainer, Stage


def trainer():
    ends, stays = (Stage(IdenticalLayer(strides=[8]), end=end) for end in ("teacher", None))
    model = tiny.pair({"ends": ends, "stays": stays})
    found = SharedKDTrainer(model, [], torch.optim.SGD(model.parameters(), lr=0.1), max_iter=9)
    found.iter = 3
    return found


def results(box, mask):
    return {"bbox": {"AP": box, "AP50": 0.0}, "segm": {"AP": mask}}


def test_the_stages_that_say_so_end_where_the_student_is_level_in_every_task(caplog):
    run = trainer()
    caplog.clear()
    run.outgrown.know(None, results(40.0, 30.0))
    run.outgrown.compare(results(41.0, 29.9))
    run.outgrown.compare({})  # no evaluator
    assert run.stage_weights() == {"ends": 1.0, "stays": 1.0} and not caplog.records
    run.outgrown.compare(results(41.0, 30.0))
    run.outgrown.compare(results(41.0, 31.0))
    assert run.stage_weights() == {"ends": 0.0, "stays": 1.0}
    said = [x.message for x in caplog.records if "level with the teacher" in x.message]
    assert len(said) == 1 and "bbox 41.0 and 40.0" in said[0] and "ends end here" in said[0]


def test_a_resumed_run_remembers(tmp_path):
    run = trainer()
    run.outgrown.know(None, results(1.0, 1.0))
    run.outgrown.compare(results(2.0, 2.0))
    again = trainer()
    again.outgrown.load_state_dict(run.outgrown.state_dict())
    assert again.stage_weights() == {"ends": 0.0, "stays": 1.0}
