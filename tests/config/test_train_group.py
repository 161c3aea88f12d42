"""Whatever the group `train` of a config is, it ends in findings and in values that can be."""

from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sharedkd.config.defaults import TRAIN_DEFAULTS, TRAIN_RULES
from sharedkd.config.load import _settle_train
from sharedkd.errors import Findings

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(alphabet="abc x", max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["a", "period", "enabled"]), st.integers(), max_size=2),
)
keys = st.sampled_from([*TRAIN_DEFAULTS, "unknown"])


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(st.one_of(st.dictionaries(keys, values, max_size=6), values))
def test_any_train_group_ends_in_findings_and_possible_values(given):
    findings = Findings()
    train = _settle_train(OmegaConf.create({"train": given}).train, findings)
    assert set(train) == set(TRAIN_DEFAULTS)
    assert all(e.key.startswith("train") and e.fix for e in findings.errors)
    for name, rule in TRAIN_RULES.items():
        group, _, key = name.rpartition(".")
        rule(name, (train[group] if group else train)[key])
