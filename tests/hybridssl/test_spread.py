from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from lightly.loss import KoLeoLoss

from hybridssl.errors import UserError
from hybridssl.objectives.spread import Options, Spread, koleo


def loss_of(toys, views, images: int, group: int):
    return Spread(Options(group=group), toys.context())(views, None, toys.batch(images), 0.5)["spread"]


@pytest.mark.parametrize(("images", "group"), [(8, 4), (6, 16), (5, 5)])
def test_equals_the_naive_loop_of_the_paper(images: int, group: int, toys) -> None:
    views, size, expected = toys.tokens(images, 1), min(group, images), 0.0
    for view in views.global_.cls.detach().double().chunk(2):
        x = [(row / row.norm()).tolist() for row in view]
        for i in range(images):
            peers = [j for j in range(images) if j != i and j // size == i // size]
            expected -= math.log(min(math.dist(x[i], x[j]) for j in peers)) / images
    assert loss_of(toys, views, images, group).item() == pytest.approx(expected, rel=1e-5)


def test_equals_lightly_in_one_group_with_its_gradient(toys) -> None:
    ours, theirs = toys.tokens(6, 1), toys.tokens(6, 1)
    loss = loss_of(toys, ours, 6, 16)
    expected = sum(KoLeoLoss()(view) for view in theirs.global_.cls.chunk(2))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.global_.cls.grad, theirs.global_.cls.grad)


def test_one_image_is_an_exact_zero_on_the_graph(toys) -> None:
    views = toys.tokens(1, 1)
    loss = loss_of(toys, views, 1, 16)
    loss.backward()
    assert loss.item() == 0
    assert views.global_.cls.grad.eq(0).all()


@pytest.mark.parametrize("apart", [0.0, 1e-6])
def test_identical_images_do_not_explode(apart: float) -> None:
    x = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x[:, :1] + apart * torch.eye(12)[0]], dim=1).requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.norm() < 10


def test_neighbours_are_found_in_float32_under_autocast() -> None:
    """Distances that bfloat16 cannot tell apart: 0 has its neighbour in 2, not in 1."""
    x = torch.tensor([[[1.0, 0.0], [1.0, -0.011], [1.0, 0.010], [0.0, 1.0]]])
    exact = koleo(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(koleo(x), exact)


def test_a_group_that_does_not_divide_names_both_keys(toys) -> None:
    with pytest.raises(UserError, match=r"objectives\.spread\.group=4 .*batch\.micro=6"):
        loss_of(toys, toys.tokens(6, 1), 6, 4)


def test_spread_features_score_lower(toys) -> None:
    views = toys.tokens(8, 1)
    close = replace(views, global_=replace(views.global_, cls=views.global_.cls * 0.01 + 1))
    assert loss_of(toys, views, 8, 8) < loss_of(toys, close, 8, 8)
