"""Presets of the real size: their networks are the released ones."""

import pytest
import torch

import ladd
from lib.optim import make_optimizers
from tools.plan import meta_networks
from tools.train import given_settings

SIZES = {  # of the released networks, position tables apart
    "--preset sd3-2b": 2_028_328_000,
    "--preset sd3-2b --qk-norm --attn2-blocks 13 --pos-size 384": 2_243_171_520,
    "--preset sd3-8b": 8_056_627_520,
}


def parse(words):
    return given_settings(words.split())[0]


@pytest.mark.parametrize("words", SIZES)
def test_the_presets_networks_have_the_released_ones_parameters(words):
    student, teacher, heads, _ = meta_networks(parse(words))
    for network in (student, teacher):
        assert sum(p.numel() for p in network.parameters()) == SIZES[words]
    assert len(heads.heads) == len(student.joint_blocks)


@pytest.mark.parametrize("preset", ["sd3-2b", "sd3-8b"])
def test_the_real_sizes_follow_what_is_known_of_them(preset):
    s = parse(f"--preset {preset}")
    assert s.t_hat_mean == s.t_hat_std == 1 and s.logit_shift(s.sizes[0]) == 0
    assert s.model()["context_dim"] == 4096 and s.model()["pooled_dim"] == 2048
    optimizer = make_optimizers(torch.nn.Linear(2, 2), 1e-5, s.beta1, s.adam_eps)[0]
    assert optimizer.defaults["eps"] == 1e-15


def test_a_preset_of_latents_without_latents_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ladd.main(["--preset", "sd3-2b", "--device", "cpu"]) == 2
    line = capsys.readouterr().err
    assert "encoded" in line and line.count("\n") == 1
    assert not list(tmp_path.iterdir())
