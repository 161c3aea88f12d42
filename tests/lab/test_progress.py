"""One line of progress: on a terminal, in a log, and how long it will take."""

from io import StringIO

import pytest

from sharedkd.lab.progress import LiveLine, Remaining, progress_in


class Terminal(StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")


def test_a_terminal_has_one_line_that_is_rewritten():
    stream = Terminal()
    live = LiveLine(stream)
    live.keep("arm 1")
    live.update("1/9")
    live.update("a line longer than the terminal is wide")
    live.keep("arm 2")
    lines = stream.getvalue().split("\n")
    assert lines[0] == "arm 1"
    assert lines[1] == "\r\x1b[K1/9\r\x1b[Ka line longer than \r\x1b[Karm 2"
    assert lines[2:] == [""]


@pytest.mark.parametrize("stream, term", [(StringIO(), "xterm"), (Terminal(), "dumb")])
def test_a_log_has_a_line_a_minute(stream, term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    clock = Clock()
    live = LiveLine(stream, period=60, clock=clock)
    for second in range(0, 130, 10):
        clock.now = 100.0 + second
        live.update(f"at {second}")
    live.update("the last iteration", always=True)
    live.keep("next arm")
    live.update("its first")
    live.update("its second")
    expected = ["at 0", "at 60", "at 120", "the last iteration", "next arm", "its first"]
    assert stream.getvalue().splitlines() == expected


def test_remaining_time():
    clock = Clock()
    left = Remaining(total=4, clock=clock)
    assert left.text(0) == "time left not known yet"
    clock.now += 90
    assert left.text(1.5) == "0:02:30 left"  # 2.5 parts of a minute each
    assert left.text(4) == "0:00:00 left"


def test_progress_of_detectron2s_log():
    found = progress_in("eta: 0:01:10  iter: 19  total_loss: 1.5  loss_cls: 1", 40)
    assert found == ("iteration 20/40   loss 1.5   0:01:10 left", 0.5, False)
    assert progress_in(" iter: 39  total_loss: 1.5 ", 40).is_last
    distilled = (
        "iter: 0  total_loss: 7.5  loss_cls: 1  loss_distill_a: 4  loss_distill_b: 2.25  x: 1"
    )
    assert f"{progress_in(distilled, 40)}" == "iteration 1/40   loss 7.5 (6.25 distillation)"
    found = progress_in("Inference done 11/50. ETA=0:00:04", 40)
    assert found == ("evaluation 11/50   0:00:04 left", 1.0, False)
    assert progress_in("something else", 40) is None
