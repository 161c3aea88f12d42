"""A sequence of teachers: their turns, and that the same teacher twice is that teacher."""

import pytest
import tiny
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate

from sharedkd import ConfigError, SharedKDTrainer, Stage
from sharedkd.config import sequence
from sharedkd.losses import PKD
from sharedkd.modeling.stages import stage_dict


def pkd(**options):
    return L(stage_dict)(pkd=L(Stage)(loss=L(PKD)(strides=[8, 16]), weight=3.0, **options))


def test_the_turns_are_of_equal_length_and_fill_the_run():
    stages = instantiate(sequence(pkd(ramp=2), ["a", "b", "c"]))
    assert list(stages) == ["pkd_a", "pkd_b", "pkd_c"]
    assert [x.teacher for x in stages.values()] == ["a", "b", "c"]
    for length in (9, 10, 100):
        spans = [x.span(length) for x in stages.values()]
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(one[1] == other[0] for one, other in zip(spans, spans[1:]))
        assert max(b - a for a, b in spans) - min(b - a for a, b in spans) <= 1
    assert all(x.weight == 3.0 and x.ramp == 2 for x in stages.values())
    assert stages["pkd_a"].loss is not stages["pkd_b"].loss


def test_the_same_teacher_twice_equals_the_single_teacher_byte_for_byte():
    teacher, ends = tiny.frozen(), []
    for stages, names in ((pkd(teacher="a"), ["a"]), (sequence(pkd(), ["a", "b"]), ["a", "b"])):
        teachers = dict.fromkeys(names, teacher)
        model = tiny.pair(instantiate(stages), teacher=None, teachers=teachers)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        batches = [[tiny.record(48, 64, seed=i)] for i in range(4)]
        trainer = SharedKDTrainer(model, batches, sgd, max_iter=4, seed=0)
        with torch.jit.optimized_execution(False):
            trainer.train(0, 4)
        ends.append([x.numpy().tobytes() for x in model.state_dict().values()])
        last = {k for k in trainer.storage.latest() if k.startswith("distill/")}
        assert f"distill/{'pkd_b' if len(names) > 1 else 'pkd'}/s8" in last
    assert ends[0] == ends[1]


def test_what_is_no_sequence_is_refused():
    for names in ([], ["a", "a"]):
        with pytest.raises(ConfigError, match="^teachers=.*is no list of different teachers"):
            sequence(pkd(), names)
    for times in (dict(start=5), dict(end=0.5)):
        with pytest.raises(ConfigError, match="^stages.pkd=.*has times of its own"):
            sequence(pkd(**times), ["a", "b"])
