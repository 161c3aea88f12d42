"""Recipes of methods: each trains each family it claims, methods stack, and names mean what they say."""

import functools
import math

import families
import pytest
import tiny
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf

from sharedkd import ConfigError, SharedKDTrainer
from sharedkd.config import load_config
from sharedkd.config.methods import family_of, with_method
from sharedkd.methods import FAMILIES, Method, known_methods
from sharedkd.modeling import detectors

FOLDER = tiny.ROOT / "configs/common/methods"
METHODS = {method.name: method for method in known_methods()}
CLAIMS = [(name, kind) for name, method in METHODS.items() for kind in method.stages]


@pytest.fixture(scope="module")
def pairs():
    """family -> (student, teacher), built once."""
    return functools.lru_cache(maxsize=None)(lambda kind: (tiny.detector(kind), tiny.frozen(kind)))


def records(ground_truth="full", size=(32, 48)):
    height, width = size
    boxes = [(4, 4, 24, 24), (12, 8, 44, 30)]
    first = () if ground_truth == "empty" else boxes
    return [tiny.record(height, width, first, seed=1), tiny.record(height, width - 8, (), seed=2)]


def step(student, teacher, stages, batch):
    torch.manual_seed(0)
    model = tiny.pair(stages, student, teacher)
    model.zero_grad()
    losses = tiny.step(model, batch, {name: stage.full for name, stage in model.stages.items()})
    assert all(torch.isfinite(x) for x in losses.values()), losses
    sum(losses.values()).backward()
    return model, losses


def stack(kind, names):
    """The stages of several recipes in one pair."""
    cfg = OmegaConf.create(
        {"model": {"student": tiny.node(kind), "stages": None}}, flags={"allow_objects": True}
    )
    return with_method(cfg, "+".join(names)).model.stages


TOGETHER = {kind: [name for name, claimed in CLAIMS if claimed == kind] for kind in FAMILIES}


def on(stages):
    return {name for name, stage in stages.items() if stage.full}


def check_step(student, teacher, stages, batch):
    model, losses = step(student, teacher, stages, batch)
    assert {k.split("/")[1] for k in losses if k.startswith("distill/")} == on(stages)
    for p in model.losses.parameters():  # DDP waits for all of them
        assert p.grad is not None and torch.isfinite(p.grad).all()
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_recipes_of_a_family_train_a_step_together(kind, pairs):
    student, teacher = pairs(kind)
    before = teacher.fingerprint
    for ground_truth in ("full", "empty")[: 2 if kind in ("faster_rcnn", "fcos") else 1]:
        stages = instantiate(stack(kind, TOGETHER[kind]))
        assert len(stages) == sum(len(METHODS[name].stages[kind]) - 1 for name in TOGETHER[kind])
        check_step(student, teacher, stages, records(ground_truth))
    del teacher.fingerprint  # it is cached
    assert teacher.fingerprint == before


@pytest.mark.nightly
@pytest.mark.parametrize("name, kind", CLAIMS)
def test_a_recipe_trains_a_step_alone(name, kind, pairs):
    for ground_truth in ("full", "empty"):
        stages = instantiate(METHODS[name].stages[kind])
        check_step(*pairs(kind), stages, records(ground_truth))


@pytest.mark.parametrize("kind", ["mask_rcnn", "fcos", "retinanet"])
def test_recipes_train_under_autocast(kind):
    """All of a family in one step: a CPU may have no instructions for bfloat16."""
    stages = instantiate(stack(kind, TOGETHER[kind]))
    model = tiny.pair(stages, kind)
    before = {k: [p.detach().clone() for p in x.parameters()] for k, x in model.losses.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = dict(max_iter=1, amp_dtype=torch.bfloat16, clip_grad_norm=10.0)
    # Of a map of one position, as P6 of a smaller image, CPUs write a gradient of garbage in bfloat16.
    trainer = SharedKDTrainer(
        model, iter(lambda: records(size=(128, 192)), None), optimizer, **options
    )
    trainer.train(0, 1)
    terms = {k: v.latest() for k, v in trainer.storage.histories().items() if "distill/" in k}
    assert {k.split("/")[1] for k in terms} >= on(stages)
    assert all(map(math.isfinite, terms.values())), terms
    assert all(torch.isfinite(p).all() for p in model.parameters())
    for name, loss in model.losses.items():
        after = list(loss.parameters())
        if after:
            assert all(torch.isfinite(p.grad).all() for p in after), name
            assert any(p.grad.any() for p in after), name
            assert any(not torch.equal(a, b) for a, b in zip(after, before[name])), name


def test_stacked_terms_are_those_of_each_alone(pairs):
    student, teacher = pairs("retinanet")
    batch = records()
    alone = {}
    for name in ("frs", "fgd"):
        stages = instantiate(METHODS[name].stages["retinanet"])
        alone.update(step(student, teacher, stages, batch)[1])
    both = {**instantiate(METHODS["frs"].stages["retinanet"])}
    torch.manual_seed(0)
    both.update(instantiate(METHODS["fgd"].stages["retinanet"]))
    _, losses = step(student, teacher, both, batch)
    # FGD's start has no chance in it.
    for name in (k for k in alone if k.startswith("distill/fgd")):
        if not name.endswith("_global"):
            assert torch.allclose(losses[name], alone[name], rtol=1e-4), name


def test_a_recipe_binds_to_the_published_pair():
    with torch.device("meta"):  # parameters are counted, not made
        for name, kind in CLAIMS:
            assert METHODS[name].parameters(kind) >= 0


def test_a_recipe_reaches_its_weight_however_short_the_run():
    for name, kind in CLAIMS:
        for key, stage in instantiate(METHODS[name].stages[kind]).items():
            for length in (100, 180000):
                assert stage.weight_at(length // 20, length) == stage.full, (name, key, length)


def test_family():
    for kind in FAMILIES:
        node = OmegaConf.create(tiny.node(kind), flags={"allow_objects": True})
        assert family_of(node) == kind
    with pytest.raises(ConfigError, match="cannot be built"):
        family_of(OmegaConf.create({"_target_": "torch.nn.Linear"}))


@pytest.mark.parametrize(
    "row, kind",
    [
        ("semantic segmentor", "faster_rcnn"),
        ("RPN alone", "faster_rcnn"),
        ("Panoptic FPN", "mask_rcnn"),
    ],
)
def test_other_detectors_take_the_settings_of_a_family(row, kind):
    node = OmegaConf.create(families.BY_NAME[row].build(), flags={"allow_objects": True})
    assert family_of(node) == kind


def test_the_family_comes_from_the_built_model():
    """A detector of no known family whose pyramid begins at stride 8 takes RetinaNet's settings."""
    model = families.Custom()
    assert detectors.family(model) == "faster_rcnn"
    model.backbone = tiny.detector("retinanet").backbone
    assert detectors.family(model) == "retinanet"
    assert [detectors.family(tiny.detector(x)) for x in FAMILIES] == list(FAMILIES)


def pair_config():
    return tiny.config("retinanet_sharedkd.py")


def test_none_is_the_plain_student():
    cfg = pair_config()
    assert with_method(cfg, "none").model == cfg.model.student
    plain = tiny.config("retinanet_plain.py")
    assert with_method(plain, "none").model == plain.model


def test_none_leaves_out_images_without_labels():
    cfg = pair_config()
    cfg.data = {"unlabelled_images": "more", "unlabelled_json": "more.json"}
    data = {name: with_method(cfg, name).data for name in ("none", "shared_kd")}
    assert set(data["none"].values()) == {None} and data["shared_kd"] == cfg.data


def test_config_keeps_its_own_stages():
    cfg = pair_config()
    cfg.model.stages.identical.weight = 7
    assert with_method(cfg, "config").model.stages == cfg.model.stages


def test_a_factor_multiplies_the_weights():
    stages = with_method(pair_config(), "pkd:0.5+shared_kd:3").model.stages
    assert {k: v.weight for k, v in stages.items() if k != "_target_"} == {
        "pkd": 5.0,
        "identical": "auto",
        "cross": 0.0,
    }
    assert stages.identical.share == 3
    assert with_method(pair_config(), "shared_kd:auto:0.1").model.stages.cross.weight == 0.0
    assert with_method(pair_config(), "pkd").model.stages.pkd.weight == 10.0


def test_peers_are_of_the_configs_own_method_alone():
    cfg = pair_config()
    cfg.model.peers = {"other": {"student": cfg.model.student}}
    kept = {name: "peers" in with_method(cfg, name).model for name in ("config", "pkd", "none")}
    assert kept == {"config": True, "pkd": False, "none": False}


def test_a_method_sets_keys_of_its_own():
    cfg = pair_config()
    name = "pkd:model.teacher.precision=bfloat16:2+cwd:model.stages.cwd.weight=3"
    changed = with_method(cfg, name)
    assert changed.model.teacher.precision == "bfloat16"
    assert changed.model.stages.pkd.weight == 20.0 and changed.model.stages.cwd.weight == 3
    assert with_method(cfg, "none:optimizer.lr=7").optimizer.lr == 7
    assert "precision" not in cfg.model.teacher and cfg.optimizer.lr != 7
    with pytest.raises(ConfigError, match="pkd:train.epochs=3: has epochs of its own"):
        with_method(cfg, "pkd:train.epochs=3")


def test_a_method_sets_keys_of_a_classic_yaml():
    cfg = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", without_data=True)
    changed = with_method(cfg, "none:SOLVER.AMP.ENABLED=True:SOLVER.MAX_ITER=7")
    assert changed.train.amp.enabled and changed.SOLVER.AMP.ENABLED
    assert changed.train.max_iter == changed.SOLVER.MAX_ITER == 7
    assert not cfg.train.amp.enabled


def test_the_plain_student_has_no_teacher_and_another_only_starts_from_it():
    cfg = pair_config()
    cfg.train.inherit = ["neck"]
    plain, starts = (with_method(cfg, name) for name in ("none", "inherit"))
    assert plain.model == cfg.model.student and plain.train.inherit == []
    assert starts.model.teacher == cfg.model.teacher and [*starts.model.stages] == ["_target_"]
    assert starts.train.inherit == ["neck"]  # as the config's other methods
    cfg.train.inherit = []
    assert with_method(cfg, "inherit").train.inherit == ["neck", "head"]
    del cfg.train  # of a project's own config, which --method may meet before it has all keys
    assert with_method(cfg, "inherit").train.inherit == ["neck", "head"]
    assert with_method(cfg, "none").train.inherit == []


def test_stages_of_one_name_are_both_kept():
    stages = with_method(pair_config(), "shared_kd+self_distillation").model.stages
    assert set(stages) - {"_target_"} == {"identical", "cross", "self_distillation_cross"}


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text((FOLDER / "cwd.py").read_text())
    assert "cwd" in with_method(pair_config(), str(path)).model.stages
    path.write_text(path.read_text() + "\nstages = dict(fcos=_stages)\n")
    with pytest.raises(ConfigError, match="mine.py: is defined for fcos, .* is a retinanet"):
        with_method(pair_config(), str(path))


@pytest.mark.parametrize(
    "config, name, words",
    [
        ("retinanet_sharedkd.py", "nonsense", "no such method"),
        ("retinanet_sharedkd.py", "pkd:many", "is neither a number nor key=value"),
        ("retinanet_sharedkd.py", "pkd:", "is neither a number nor key=value"),
        ("retinanet_sharedkd.py", "pkd:modell.teacher.fold=False", "has no modell"),
        ("retinanet_sharedkd.py", "pkd:model._target_=os.system", "names code to be run"),
        ("retinanet_plain.py", "pkd", "plain detector"),
    ],
)
def test_names_that_mean_nothing(config, name, words):
    with pytest.raises(ConfigError, match=words):
        with_method(tiny.config(config), name)


def test_a_file_that_is_no_recipe(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("paper = 1\n")
    with pytest.raises(ConfigError, match="cannot be read as a recipe"):
        Method.load(path)


def test_list_prints_a_line_per_method(capsys):
    assert tiny.run_tool("compare_methods.py", "--list") is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(METHODS)
    row = next(line for line in lines if line.startswith("reviewkd "))
    assert "CVPR 2021" in row and "retinanet, fcos: 3.29 M" in row
