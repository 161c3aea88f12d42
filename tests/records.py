"""Records of comparisons, made up, and the tables of their reports."""

import math


def arm(method, seed, ap, task="bbox", **more):
    metrics = {"AP": ap, "AP50": ap + 20, "AP75": ap + 2, "APs": 5.0, "APm": ap, "APl": math.nan}
    return {
        "method": method,
        "seed": seed,
        "status": "finished",
        "error": None,
        "results": {task: {**metrics, "AP-RBC": 1.0}},
        "iterations": 300,
        "seconds_per_step": 1.0,
        "peak_memory_mb": 1000.0,
        "parameters": {"student": 17_000_000, "losses": 0},
        "initial_weights": f"digest{seed}",
        "hardware": "A CPU, 1 thread",
        "versions": {"torch": "2.14.1", "numpy": "2.4.6"},
        **more,
    }


def failed(method, seed, status="failed", error="term s8\nis `nan`"):
    return {"method": method, "seed": seed, "status": status, "error": error}


def make(arms, methods=("none", "fgd"), baseline="none", teacher=None):
    return {
        "config_file": "configs/custom_coco.py",
        "overrides": ["train.max_iter=300"],
        "command": "tools/compare_methods.py --seeds 3",
        "baseline": baseline,
        "teacher": teacher,
        "methods": list(methods),
        "arms": list(arms),
    }


def cells(text):
    """The cells of a Markdown table by its lines, without the one below its head; other text is left out."""
    lines = [line.strip() for line in text.splitlines()]
    found = [[x.strip() for x in y.strip("|").split("|")] for y in lines if y.startswith("|")]
    return [found[0], *found[2:]]


def rows(text):
    """The rows of a Markdown table, by the names of their columns."""
    header, *found = cells(text)
    return [dict(zip(header, row)) for row in found]


def table(text, title):
    """The rows of the table under a heading, by the name in their first column."""
    header, *found = cells(text.split(f"## {title}\n\n")[1].split("\n\n")[0])
    return {row[0]: dict(zip(header[1:], row[1:])) for row in found}
