"""All faults of a configuration are reported at once, by name."""

import pytest

from cpd_fast.config import CompressConfig, ConfigError


def test_every_fault_is_listed():
    with pytest.raises(
        ConfigError, match=r"target_macs=0: .*number from 0\.001 to 1; teacher_steps=1\.5: expected a whole number"
    ):
        CompressConfig(target_macs=0, teacher_steps=1.5)


@pytest.mark.parametrize("value", [0.0, -1, 1.5, float("nan"), "half", None, True])
def test_target_must_be_a_fraction(value):
    with pytest.raises(ConfigError, match="target_macs="):
        CompressConfig(target_macs=value)


def test_unknown_settings_are_errors_with_a_hint():
    with pytest.raises(
        ConfigError, match=r"tua: no such setting, did you mean tau\?.*settings: target_macs, target_params"
    ):
        CompressConfig.from_dict({"tua": 2})


def test_round_trip():
    config = CompressConfig(seed=3)
    assert CompressConfig.from_dict(config.as_dict()) == config
