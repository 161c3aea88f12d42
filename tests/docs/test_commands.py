"""The commands that pages print can be typed: tool, flags and configs are there."""

import re
import shlex

import pytest
import tiny
from detectron2.engine import default_argument_parser

PAGES = ["README.md", "CONTRIBUTING.md", "MODEL_ZOO.md", "projects/SharedKD/README.md"]
PAGES += sorted(str(p.relative_to(tiny.ROOT)) for p in (tiny.ROOT / "docs").glob("*.md"))
RUN = ".venv/bin/python tools/lazyconfig_train_net.py"


def commands(page):
    text = (tiny.ROOT / page).read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").replace("$RUN", RUN).splitlines():
            if "tools/" in line and not re.match(r"\w+=", line.strip()):
                yield shlex.split(line, comments=True)


def flags(tool):
    if tool == "lazyconfig_train_net.py":
        found = set(default_argument_parser()._option_string_actions)
    else:
        found = set(re.findall(r'"(--[a-z-]+)"', (tiny.ROOT / "tools" / tool).read_text()))
    shared = (tiny.ROOT / "tools/arguments.py").read_text()
    return found | set(re.findall(r'"(--[a-z-]+)"', shared))


def test_tools_flags_and_configs_are_there():
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 20
    for words in found:
        at = next(i for i, word in enumerate(words) if word.startswith("tools/"))
        given = {word.partition("=")[0] for word in words[at + 1 :] if word.startswith("--")}
        assert given <= flags(words[at].removeprefix("tools/")), words


@pytest.mark.parametrize("page", PAGES)
def test_every_shipped_config_that_a_page_names_exists(page):
    for path in re.findall(r"(?<!/)configs/([\w/]+\.py)", (tiny.ROOT / page).read_text()):
        assert (tiny.ROOT / "configs" / path).is_file(), path


def test_flags_may_come_after_overrides(capfd):
    command = ["--config-file", "nowhere.py", "train.max_iter=1", "--eval-only"]
    assert tiny.run_tool("lazyconfig_train_net.py", *command) == 1
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: --config-file") and "nowhere.py" in said
