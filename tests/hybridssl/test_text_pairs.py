"""Image-report contrast against loops written from the papers, and a text encoder that rests, moves a little, or moves.

That micro-batches and processes change nothing is in test_running.py and test_dist.py.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridssl import optim
from hybridssl.backbone import BackboneOptions, build
from hybridssl.encoder import embed_sentences
from hybridssl.errors import UserError
from hybridssl.objectives import text_pairs
from hybridssl.optim import OptimOptions
from hybridssl.tower import TextTower

TEXTS = ["left lung clear", "right effusion", "", "right  effusion", "no opacity", " "]
PAIRS = [0, 1, 3, 4]  # images with a report; 1 and 3 have the same


def make(toys, seed: int = 0, **options) -> text_pairs.TextPairs:
    torch.manual_seed(seed)
    made = text_pairs.TextPairs(
        text_pairs.Options(**{"width": 8, **options}), toys.context(encoder=toys.tiny_encoder())
    )
    for parameter in (made.project_image.weight, made.project_text.weight):
        nn.init.normal_(parameter, std=0.5)
    return made


def sides(made: text_pairs.TextPairs, cls: Tensor, toys) -> tuple[Tensor, Tensor]:
    """Unit vectors of images [2, B, width] and of TEXTS [B, width], the tower's words taken from where it came from."""
    told = torch.stack([made.tower([" ".join(t.split())], made.moving.named(), torch.device("cpu"))[0] for t in TEXTS])
    images = F.normalize(cls @ made.project_image.weight.T, dim=1).reshape(2, len(TEXTS), -1)
    return images, F.normalize(told @ made.project_text.weight.T, dim=1)


def naive(kind: str, made, mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Tensor:
    """Image by image and report by report, as the papers have it; who is compared as the docstring says."""
    t, terms = made.log_scale.exp()[0], []
    for view in (0, 1):
        for rows, others in ((mine[0][view], theirs[1]), (mine[1], theirs[0][view])):
            for i in PAIRS:
                negatives = [j for j in PAIRS if j != i and {i, j} != {1, 3}]
                score = {j: t * (rows[i] @ others[j]) for j in [i, *negatives]}
                if kind == "clip":
                    terms.append(-torch.log(score[i].exp() / torch.stack(list(score.values())).exp().sum()))
                else:
                    b = made.bias[0]
                    terms.append(-F.logsigmoid(score[i] + b) - sum(F.logsigmoid(-(score[j] + b)) for j in negatives))
    return torch.stack(terms).sum() / (2 * 2 * len(PAIRS))


def run(made, teacher, views, taught, batch) -> Tensor:
    (target,) = teacher.targets([taught], [batch], 0.5)
    return made(views, target, batch, 0.5)["text_pairs"]


@pytest.mark.parametrize("tower", ["frozen", "lora", "trained"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_loss_and_gradients_equal_a_loop_from_the_paper(kind: str, tower: str, toys) -> None:
    made, teacher = make(toys, loss=kind, tower=tower), make(toys, 1, loss=kind, tower=tower)
    views, taught = toys.tokens(6, 1), toys.tokens(6, 2)
    loss = run(made, teacher, views, taught, replace(toys.batch(6), text=TEXTS))
    with torch.no_grad():
        theirs = sides(teacher, taught.global_.cls, toys)
    expected = naive(kind, made, sides(made, views.global_.cls, toys), theirs)
    torch.testing.assert_close(loss, expected)
    moving = [*made.parameters(), views.global_.cls]
    for got, want in zip(torch.autograd.grad(loss, moving), torch.autograd.grad(expected, moving), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)


def test_with_a_teacher_like_the_student_it_is_the_published_loss(toys) -> None:
    """The cross-entropy both ways of CLIP's figure 3, and algorithm 1 of SigLIP, on one view without repeats."""
    for kind in ("clip", "siglip"):
        made = make(toys, loss=kind)
        batch = replace(toys.batch(3), text=["left lung", "right effusion", "no opacity"])
        views = toys.tokens(3, 1)
        cls = views.global_.cls.detach()
        cls[3:] = cls[:3]
        views = replace(views, global_=replace(views.global_, cls=cls))
        loss = run(made, copy.deepcopy(made), views, views, batch)
        told = made.tower(batch.text, {}, torch.device("cpu"))
        x = F.normalize(made.project_image(cls[:3]), dim=1)
        y = F.normalize(made.project_text(told), dim=1)
        logits = made.log_scale.exp() * x @ y.T
        if kind == "clip":
            expected = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
        else:
            expected = -F.logsigmoid((2 * torch.eye(3) - 1) * (logits + made.bias)).sum() / 3
        torch.testing.assert_close(loss, expected)


def test_the_papers_first_scale_and_its_bound(toys) -> None:
    made = make(toys)
    assert made.log_scale.exp().item() == pytest.approx(1 / 0.07)
    assert make(toys, loss="siglip").log_scale.exp().item() == pytest.approx(10)
    assert make(toys, loss="siglip").bias.item() == -10
    with torch.no_grad():
        made.log_scale.fill_(9.0)
    views, batch = toys.tokens(6, 1), replace(toys.batch(6), text=TEXTS)
    loss = run(made, copy.deepcopy(made), views, views, batch)
    assert made.log_scale.item() == pytest.approx(math.log(100))
    assert torch.autograd.grad(loss, made.log_scale)[0] != 0  # it can come back


@pytest.mark.parametrize("tower", ["frozen", "lora", "trained"])
def test_only_what_moves_is_trained_followed_and_saved(tower: str, toys) -> None:
    made = make(toys, tower=tower)
    teacher = copy.deepcopy(made).eval().requires_grad_(False)
    assert teacher.tower is made.tower  # what rests is there once
    names = {name for name in made.state_dict() if "moving" in name}
    assert {p.data_ptr() for p in made.moving.parameters()}.isdisjoint(p.data_ptr() for p in teacher.parameters())
    if tower == "frozen":
        assert not names
        assert set(made.state_dict()) == {"log_scale", "project_image.weight", "project_text.weight"}
    elif tower == "lora":
        assert names
        assert all("lora_" in name for name in names)
    else:
        assert "moving.inner/encoder/layer/0/attention/self/query/weight" in names
        assert not any("pooler" in name or "lora" in name for name in names)  # a pooler that nobody asks
    batch, views = replace(toys.batch(6), text=TEXTS), toys.tokens(6, 1)
    run(made, teacher, views, toys.tokens(6, 2), batch).backward()
    assert all(p.grad is not None for p in made.parameters())
    made.zero_grad()
    run(made, teacher, views, toys.tokens(6, 2), replace(batch, text=[""] * 6)).backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in made.parameters())  # DDP waits for every one


@pytest.mark.parametrize("tower", ["frozen", "lora", "trained"])
def test_a_tower_begins_as_the_encoder_that_it_was(tower: str, toys) -> None:
    made = make(toys, tower=tower)
    some = ["left lung clear", "opacity"]
    found = made.tower(some, made.moving.named(), torch.device("cpu"))
    torch.testing.assert_close(F.normalize(found, dim=1), embed_sentences(toys.tiny_encoder(), some))
    assert not found.requires_grad or tower != "frozen"


def test_a_tower_that_moves_has_a_learning_rate_of_its_own(toys) -> None:
    made = make(toys, tower="trained", tower_lr=0.25)
    small = {"embed_dim": 8, "depth": 1, "num_heads": 1}
    backbone = build(BackboneOptions(name="vit_tiny_patch16_224", args=small), 3, 32)
    groups = optim.build(backbone, nn.ModuleDict({"text_pairs": made}), OptimOptions()).param_groups
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert len(scale) == len([*made.parameters(), *backbone.parameters()])
    assert {scale[id(p)] for p in made.moving.parameters()} == {0.25}
    assert {scale[id(p)] for p in (made.log_scale, made.project_text.weight)} == {1.0}


def test_long_reports_are_cut(toys) -> None:
    words = "opacity left right " * 50
    for most, kept in ((5, 3), (400, 10)):  # with [CLS] and [SEP]; the encoder itself has 12 places
        tower = TextTower(toys.tiny_encoder(), "auto", "frozen", most)
        whole, cut = tower([words, " ".join(words.split()[:kept])], {}, torch.device("cpu"))
        torch.testing.assert_close(whole, cut)
        assert not torch.allclose(whole, tower([" ".join(words.split()[: kept - 1])], {}, torch.device("cpu"))[0])


def test_health_tells_how_many_reports_are_found(toys) -> None:
    made = make(toys)
    views, batch = toys.tokens(6, 1), replace(toys.batch(6), text=TEXTS)
    (target,) = copy.deepcopy(made).targets([views], [batch], 0.5)
    right = replace(views, global_=replace(views.global_, cls=views.global_.cls.detach()))
    with torch.no_grad():  # image features whose projections are those of their reports, but for image 0
        wanted = target.texts.clone()
        wanted[0] = -wanted[0]
        right.global_.cls[:6] = wanted @ torch.linalg.pinv(made.project_image.weight).T
    found = made.health(right, target, batch)
    assert found["with_report"].item() == pytest.approx(4 / 6)
    assert found["reports_found"].item() == pytest.approx(3 / 4)
    none = replace(batch, text=[])
    assert made.health(right, made.targets([views], [none], 0.5)[0], none)["with_report"] == 0


def test_a_missing_encoder_is_named(toys) -> None:
    with pytest.raises(UserError, match=r"objectives\.text_pairs.*text\.encoder"):
        text_pairs.TextPairs(text_pairs.Options(), toys.context())
