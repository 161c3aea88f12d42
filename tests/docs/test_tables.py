"""What pages say in tables is what the code and the records say."""

import json
import re
from pathlib import Path

import tiny

from sharedkd.config import TRAIN_DEFAULTS
from sharedkd.lab.performance import document
from sharedkd.losses import DistillationLoss
from sharedkd.methods import known_methods

PAGES = {
    name: (tiny.ROOT / name).read_text()
    for name in ("MODEL_ZOO.md", "README.md", "docs/performance.md", "docs/results.md")
}


def leaves(group, prefix):
    for key, value in group.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}"


def test_every_key_of_train_has_a_default_and_a_meaning(generate):
    rows = generate.train_keys()
    assert [key for key, _, _ in rows] == list(leaves(TRAIN_DEFAULTS, "train"))
    assert [key for key, default, meaning in rows if not default or not meaning] == []


def test_every_key_of_own_data_has_a_meaning(generate):
    rows = generate.data_keys()
    data = tiny.config("custom_coco.py").data
    assert [key for key, _, _ in rows] == [f"data.{key}" for key in data]
    assert [key for key, _, meaning in rows if not meaning] == []


def test_every_option_has_a_meaning(generate):
    from sharedkd import FrozenTeacher, Stage
    from sharedkd.data.loader import build_train_loader

    classes = [*generate.loss_classes().values(), DistillationLoss]
    for thing in (FrozenTeacher, Stage, build_train_loader, *classes):
        assert [key for key, _, text in generate.options(thing, "") if not text] == [], thing


def test_arguments_are_read_with_their_continuation(generate):
    docstring = "Does it.\n\nArgs:\n    a, b: first\n        and more.\n    c (int): last.\n\nReturns:\n    x: y"
    assert generate.arguments(docstring) == {
        "a": "first and more.",
        "b": "first and more.",
        "c": "last.",
    }


def test_the_list_of_methods_has_every_recipe(generate):
    names = [method.name for method in known_methods(tiny.ROOT / "configs/common/methods")]
    assert [row[0] for row in generate.methods()] == names
    package = (tiny.ROOT / "projects/SharedKD/README.md").read_text()
    assert [name for name in names if f"`{name}`" not in package] == []


def test_measured_tables_are_those_of_the_records(generate):
    for (page, name), table in generate.measured().items():
        assert generate.fill(PAGES[page], name, table) == PAGES[page], (
            f"run docs/generate.py: {page}"
        )


def test_benchmark_tables_are_those_of_the_records(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(PAGES["docs/performance.md"])
    document(tiny.ROOT / "docs/results/performance", page)
    assert page.read_text() == PAGES["docs/performance.md"], "run tools/benchmark_tables.py"


def test_a_gain_of_the_model_zoo_by_hand():
    """From the records without the code that fills the page: mean and t interval of three pairs."""
    record = json.loads((tiny.ROOT / "docs/results/two.json").read_text())
    ap = {(a["method"], a["seed"]): a["results"]["bbox"]["AP"] for a in record["arms"]}
    gains = [ap["shared_kd", seed] - ap["none", seed] for seed in range(3)]
    mean = sum(gains) / 3
    deviation = (sum((x - mean) ** 2 for x in gains) / 2) ** 0.5
    half = 4.302653 * deviation / 3**0.5  # t quantile of 97.5 %, two degrees of freedom
    gain = f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
    (row,) = re.findall(r"^\| `shared_kd` \|.*$", PAGES["README.md"], re.M)
    assert row.split(" | ")[1] == gain
    assert row.split(" | ")[1] in PAGES["MODEL_ZOO.md"]


def test_the_costs_that_the_readme_quotes(generate):
    results = {x.stem: json.loads(x.read_text()) for x in generate.QUOTED.glob("cpu_*.json")}
    overheads = [result["overhead"] for result in results.values()]
    ratios = results["cpu_320x2_faster_rcnn_r50_r18"]["ratios"]
    semckd, fgd = (1 / ratios[f"distill/{x}"]["median"] for x in ("semckd", "fgd"))
    readme = " ".join(PAGES["README.md"].split())
    assert f"a step of Shared-KD took {min(overheads):.2f} to {max(overheads):.2f} times" in readme
    assert f"a step of SemCKD {semckd:.1f} times as long, of FGD {fgd:.1f} times" in readme


def test_records_are_of_one_state_of_the_code_and_of_make_benchmark(generate):
    makefile = (tiny.ROOT / "Makefile").read_text()
    results = {x.stem: json.loads(x.read_text()) for x in generate.QUOTED.glob("cpu_*.json")}
    assert len({result["versions"]["sharedkd"] for result in results.values()}) == 1
    for name in results:
        assert f"(call MEASURE,{name.split('_', 2)[2]}," in makefile, name


def test_step_ratios_by_hand(generate):
    ratios = {"over_plain": 1.5, "distill/fgd": 0.75, "losses": 0.02, "train.compile=True": 1.1}
    result = {"ratios": {name: {"median": x} for name, x in ratios.items()}}
    assert generate.step_ratios(result) == {"shared_kd": "1.50", "fgd": "2.00"}


def test_the_publication_is_cited_alike():
    citation = (tiny.ROOT / "CITATION.cff").read_text()
    for word in ("Guo", "Zhang", "Liang", "Electronics", "1595", "10.3390/electronics13081595"):
        assert word in citation and word in PAGES["README.md"]


def test_every_shipped_config_that_a_page_names_exists():
    pages = [*tiny.ROOT.glob("*.md"), *(tiny.ROOT / "docs").glob("*.md")]
    for page in pages:
        named = re.findall(r"(?<!/)configs/([\w/]+\.py)", page.read_text())
        for path in named:
            assert (tiny.ROOT / "configs" / path).exists(), (page.name, path)


def test_troubleshooting_quotes_messages_that_exist():
    """Every quoted message, piece by piece between the dots, is a string of the code."""
    import ast

    folders = ("projects/SharedKD/sharedkd", "packaging", "tools")
    files = [f for folder in folders for f in (tiny.ROOT / folder).rglob("*.py")]
    strings = [
        " ".join(node.value.split())
        for f in files
        if "build" not in f.parts
        for node in ast.walk(ast.parse(f.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = Path(tiny.ROOT / "docs/troubleshooting.md").read_text()
    # First cells that begin with a quotation; those that begin with words are symptoms.
    quoted = re.findall(r"^\| `([^`]+)`", page, re.M)
    assert len(quoted) > 15
    for message in quoted:
        for piece in filter(None, (x.strip(" ;") for x in message.split("…"))):
            assert any(piece in s for s in strings), f"nothing says {piece!r}"
