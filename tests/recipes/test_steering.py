"""What a recipe is told to leave alone stays, in every recipe, from Python, flags and YAML."""

import sys

import pytest
import torch
from torch import nn

import cpd_fast as cpd
from cpd_fast import cli, recipes
from cpd_fast.cli.recipe import check_recipe, read_recipe
from cpd_fast.config import CompressConfig, ConfigError
from cpd_fast.errors import PlanError, UnsupportedOpError

MORE = {"candidates": 2, "calibration_batches": 1, "search_images": 8, "rounds": 1, "round_steps": 2}


class Mixed(nn.Module):
    """A grouped convolution and an attention of four heads on pictures of one channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 16, 3, stride=4), nn.Conv2d(16, 16, 1, groups=4)
        self.mix = nn.Conv2d(16, 16, 1)
        self.qkv, self.proj, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 2)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x):
        t = self.mix(self.conv(self.stem(x).relu()).relu()).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(t).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        t = t + self.proj(y.transpose(1, 2).flatten(2))
        return self.head((t + self.mlp(t)).mean(1))


def mixed(tiny):
    data = tiny.classification().data
    return recipes.Task("mixed", "tiny", data, Mixed)


@pytest.mark.parametrize("recipe", ["cpd", "eagleeye", "prune_then_distill"])
def test_ignored_frozen_and_protected_layers_keep_their_widths(tiny, tmp_path, recipe):
    free = {n: t for n, t in Mixed().state_dict().items()}
    more = {k: v for k, v in MORE.items() if k in CompressConfig().of_recipe(recipe)}
    left = {"ignore": ["conv"], "freeze": "qkv", "target": 0.95, "round_to": 1}
    result = tiny.run(tmp_path / "run", mixed(tiny), recipe=recipe, **left, **more)
    kept = result.student.state_dict()
    assert all(kept[n].shape == free[n].shape for n in free if n.startswith(("conv", "stem")))
    assert kept["qkv.weight"].shape[0] == 48  # the group; what qkv reads is another one
    assert sum(t.numel() for t in kept.values()) < sum(t.numel() for t in free.values())
    again = cpd.load(tmp_path / "run" / "student.safetensors", Mixed().eval())  # the file says what was ignored
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(again(x), result.student(x))


def test_whole_heads_and_conv_groups(tiny, tmp_path):
    whole = {"granularity": "head", "conv_groups": "group", "protect": ["last"], "freeze": "mlp.0", "round_to": 1}
    small = tiny.run(tmp_path / "run", mixed(tiny), target=0.55, max_pruning_ratio=0.75, **whole).student
    assert small.conv.weight.shape[1] == 4 and small.conv.groups < 4
    assert small.proj.in_features in (4, 8) and small.qkv.out_features == 3 * small.proj.in_features
    assert small.qkv.in_features == small.head.in_features == 16  # what the last layer reads
    kept = cpd.PrunePlan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert max(kept["qkv"]) < 4 and "qkv#2" not in kept  # four heads, not 16 dims of q and k and 16 of v
    again = cpd.load(tmp_path / "run" / "student.safetensors", Mixed().eval())
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(again(x), small(x))


class Unruled(nn.Module):
    """A network whose second layer is read by an operator without a channel rule."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(1, 16, 3, stride=4), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        t = self.mix(self.stem(x).relu().mean((2, 3)))
        return self.head(t * torch.cdist(t, t).mean())


def test_unknown_operators_stop_a_run_or_freeze_what_they_touch(tiny, tmp_path):
    task = recipes.Task("unruled", "tiny", tiny.classification().data, Unruled)
    with pytest.raises(UnsupportedOpError, match="cdist.*on_unknown='freeze'"):
        tiny.run(tmp_path / "a", task)
    small = tiny.run(tmp_path / "b", task, target=0.7, round_to=1, on_unknown="freeze").student
    assert small.stem.out_channels < 16 and small.mix.out_features == 16
    again = cpd.load(tmp_path / "b" / "student.safetensors", Unruled().eval())  # the file says what was frozen
    assert again.stem.out_channels == small.stem.out_channels


def test_a_name_that_matches_nothing_is_an_error(tiny, tmp_path):
    with pytest.raises(PlanError, match="ignore: 'nope' matches no module"):
        tiny.run(tmp_path / "a", mixed(tiny), ignore="nope")
    with pytest.raises(PlanError, match="freeze: 'nope' matches"):
        tiny.run(tmp_path / "b", mixed(tiny), freeze="nope")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"protect": "middle"}, "protect='middle': expected some of first, last"),
        ({"granularity": "token"}, "granularity='token': expected one of dim, head"),
        ({"conv_groups": 3}, "conv_groups=3: expected one of channel, group"),
        ({"ignore": 3}, "ignore=3: expected names separated by commas, or a list of them"),
    ],
)
def test_wrong_values_are_refused(settings, error):
    with pytest.raises(ConfigError, match=error):
        CompressConfig(**settings)


def test_lists_and_texts_are_the_same():
    config = CompressConfig(protect=["first", "last"], ignore=("head.*", "stem"))
    assert config == CompressConfig(protect="first,last", ignore="head.*,stem")
    assert config.listed("ignore") == ("head.*", "stem") and CompressConfig().listed("freeze") == ()


def test_yaml_and_flags_take_them(monkeypatch, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ignore: [head.*, stem]\nprotect: last\ngranularity: head\nconv-groups: group\nfreeze: a\n")
    assert check_recipe(read_recipe(recipe))[1]["ignore"] == ["head.*", "stem"]
    monkeypatch.setattr(sys, "argv", ["cpd-fast", "compress", str(recipe), "--freeze", "encoder.*, neck", "--dry-run"])
    monkeypatch.setattr("cpd_fast.cli.tasks.builtin", lambda name, _: recipes.Task(name, "tiny", None, None))
    with pytest.raises(SystemExit) as e:
        cli.main()
    out = capsys.readouterr().out
    assert not e.value.code
    assert "ignore: head.*,stem\nfreeze: encoder.*, neck\nprotect: last\ngranularity: head\nconv_groups: group" in out
