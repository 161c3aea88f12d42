"""One line of progress: on a terminal, in a log, and how long it will take."""

import logging
import sys
from io import StringIO

import pytest

from sharedkd.engine.progress import LiveLine, Remaining, live_log, progress_in


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


@pytest.fixture
def log(monkeypatch):
    """Loggers as Detectron2 sets them up: the console, and a file."""

    def log(stream):
        monkeypatch.setattr(sys, "stdout", stream)
        file = StringIO()
        for name in ("detectron2", "fvcore"):
            handlers = [logging.StreamHandler(stream), logging.StreamHandler(file)]
            logger = logging.getLogger(name)
            monkeypatch.setattr(logger, "handlers", handlers)
            monkeypatch.setattr(logger, "propagate", False)
            monkeypatch.setattr(logger, "level", logging.INFO)
        return file

    return log


TRAINING = " eta: 0:00:07  iter: 3  total_loss: 1.5  loss_cls: 1  time: 0.1"
TESTING = "Inference done 11/50. Dataloading: 0.1 s/iter. ETA=0:00:04"
MESSAGES = ["begin", TRAINING, TESTING, "saved\nto a file", TRAINING]


def test_the_log_on_a_terminal(log, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    file = log(stream)
    with pytest.raises(KeyboardInterrupt), live_log(40):
        for i, message in enumerate(MESSAGES):
            logging.getLogger(("detectron2.any", "fvcore.any")[i % 2]).info(message)
        raise KeyboardInterrupt
    logging.getLogger("detectron2.any").info(TRAINING)  # no longer of interest

    clear = "\r\x1b[K"
    training = f"{clear}iteration 4/40   loss 1.5   0:00:07 left"
    testing = f"{clear}evaluation 11/50   0:00:04 left"
    seen = f"begin\n{training}{testing}{clear}saved\nto a file\n{training}{clear}{TRAINING}\n"
    assert stream.getvalue() == seen
    assert file.getvalue() == "\n".join([*MESSAGES, TRAINING, ""])


@pytest.mark.parametrize("stream, term", [(StringIO(), "xterm"), (Terminal(), "dumb")])
def test_the_log_elsewhere_has_every_line(log, stream, term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    log(stream)
    with live_log(40):
        for message in MESSAGES:
            logging.getLogger("detectron2.any").info(message)
    assert stream.getvalue() == "\n".join([*MESSAGES, ""])


def test_a_closed_terminal_is_no_error(log):
    class Closed(Terminal):
        def write(self, text):
            if self.tell() > 0:
                raise OSError(5, "Input/output error")
            return super().write(text)

    log(Closed())
    with live_log(40):
        logging.getLogger("detectron2.any").info(TRAINING)


def test_progress_of_detectron2s_log():
    found = progress_in("eta: 0:01:10  iter: 19  total_loss: 1.5  loss_cls: 1", 40)
    assert (found, found.fraction, found.is_last) == (
        "iteration 20/40   loss 1.5   0:01:10 left", 0.5, False
    )  # fmt: skip
    assert progress_in(" iter: 39  total_loss: 1.5 ", 40).is_last
    distilled = (
        "iter: 0  total_loss: 7.5  loss_cls: 1  loss_distill_a: 4  loss_distill_b: 2.25  x: 1"
    )
    assert progress_in(distilled, 40) == "iteration 1/40   loss 7.5 (6.25 distillation)"
    found = progress_in("Inference done 11/50. ETA=0:00:04", 40)
    assert (found, found.is_last) == ("evaluation 11/50   0:00:04 left", False)
    assert progress_in("something else", 40) is None
