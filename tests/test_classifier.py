"""The classifier that methods learn from: its maps, and what its answers say of captions."""

import pytest
import torch
from conftest import randn

from lib.scores import Judge
from methods.classifier import features, log_p, widths


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return Judge([2, 3], 8, (16, 16)).requires_grad_(False)


def test_its_maps_are_those_that_it_reads_with(judge):
    """As many as it has convolutions, tokens row by row, the first of the image's own size."""
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    tokens, sizes = features(judge, x)
    assert len(tokens) == len(sizes) == len(widths(judge)) and sizes[0] == (16, 16)
    assert [own.shape[2] for own in tokens] == widths(judge)
    torch.testing.assert_close(tokens[0][:, 5 * 16 + 3], judge.body[0](x)[:, :, 5, 3])


def test_the_log_probability_is_that_of_all_answers_together(judge):
    x0, labels = randn(4, 3, 16, 16).float() / 9, torch.tensor([[0, 2], [1, 1], [0, 0], [1, 2]])
    _, answers = judge(x0)
    told = [a.softmax(1)[range(4), labels[:, k]].log() for k, a in enumerate(answers)]
    torch.testing.assert_close(log_p(judge, x0, labels), sum(told))


def test_a_step_along_its_gradient_raises_it(judge):
    """Images learn to show what their captions say."""
    x0, labels = randn(4, 3, 16, 16).float() / 9, torch.tensor([[0, 2], [1, 1], [0, 0], [1, 2]])
    before = log_p(judge, x0.requires_grad_(), labels).sum()
    before.backward()
    assert log_p(judge, x0 + 5 * x0.grad, labels).sum() > before
