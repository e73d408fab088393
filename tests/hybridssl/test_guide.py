"""Guides: what is kept, what is removed, how hard each pulls, and what is missing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hybridssl.errors import UserError
from hybridssl.objectives.guide import LARGEST, MOMENTUM, Guide, Options, _named, equalised
from hybridssl.types import Column

ALL = {"age": "keep", "sex": "remove", "site": "keep prototypes"}


def make(toys, columns: dict | None = None, context: dict | None = None, **changes) -> Guide:
    torch.manual_seed(0)
    return Guide(Options(columns=columns or ALL, **changes), toys.context(**(context or {})))


def run(guide: Guide, views, batch, teacher: Guide | None = None, taught=None):
    (target,) = (teacher or guide).targets([taught or views], [batch], 0.5)
    return guide(views, target, batch, 0.5), target


def schooled(guide: Guide, toys, n: int) -> Guide:
    """Its adversaries name every view of toys.tokens(n, 1) better than chance does, but not much better."""
    views, batch = toys.tokens(n, 1), toys.batch(n)
    values, cls = guide._values(batch), views.global_.cls.unflatten(0, (2, -1))
    optimizer = torch.optim.Adam(
        (p for i, h in enumerate(guide.heads) if guide.removed[i] for p in h.parameters()), 0.01
    )
    while True:
        optimizer.zero_grad()
        found, target = run(guide, views, batch)
        adversaries = [(i, h, v) for i, (h, v) in enumerate(guide._each(values)) if guide.removed[i]]
        if all(_named(h, cls, v.nan_to_num(0), target.chance[i])[:, ~v.isnan()].all() for i, h, v in adversaries):
            return guide
        sum(found.values()).backward()
        optimizer.step()


def test_equals_the_naive_loop(toys) -> None:
    guide, views, taught, batch = make(toys), toys.tokens(10, 1), toys.tokens(10, 2), toys.batch(10)
    found, _ = run(guide, views, batch, taught=taught)
    assert batch.meta.isnan().any(0).all()

    def rows(tokens, i: int) -> list[torch.Tensor]:
        return [tokens.global_.cls[i].detach(), tokens.global_.cls[10 + i].detach()]

    def mean(column: int, loss) -> float:
        known = [i for i in range(10) if not math.isnan(batch.meta[i, column])]
        return sum(loss(x, float(batch.meta[i, column])) for i in known for x in rows(views, i)) / len(known) / 2

    def smooth_l1(x, y):
        gap = abs(float(guide.heads[0](x).detach()) - y)
        return 0.5 * gap**2 if gap < 1 else gap - 0.5

    def cross_entropy(logits, y):
        return math.log(sum(math.exp(v) for v in logits)) - float(logits[int(y)])

    first, second = guide.heads[1].layers
    assert found["age"].item() == pytest.approx(mean(0, smooth_l1), rel=1e-5)
    adversary = mean(1, lambda x, y: cross_entropy(second(F.gelu(first(x))).detach(), y))
    assert found["sex"].item() == pytest.approx(adversary, rel=1e-5)
    centres = []
    for site in range(3):
        unit = [x / x.norm() for i in range(10) if batch.meta[i, 2] == site for x in rows(taught, i)]
        centres.append(torch.stack(unit).mean(0))
    cosines = mean(2, lambda x, y: cross_entropy([float(F.cosine_similarity(x, c, dim=0)) / 0.1 for c in centres], y))
    assert found["site"].item() == pytest.approx(cosines, rel=1e-5)


def test_every_guide_pulls_equally_hard_and_removal_the_other_way(toys) -> None:
    columns = {"age": "keep", "sex": "remove", "site": "keep"}
    guide, batch = schooled(make(toys, columns, removal=0.5), toys, 16), toys.batch(16)
    pulls = {}
    guide.zero_grad()
    for name in columns:
        views = toys.tokens(16, 1)
        found, _ = run(guide, views, batch)
        found[name].backward()
        pulls[name] = views.global_.cls.grad
    norms = {name: float(g.norm()) for name, g in pulls.items()}
    assert norms["age"] == pytest.approx(norms["site"], rel=1e-4)
    assert norms["sex"] == pytest.approx(norms["site"] / 2, rel=1e-4)
    views = toys.tokens(16, 1)
    plain = guide.heads[1].losses(views.global_.cls.unflatten(0, (2, -1)), batch.meta[:, 1].nan_to_num(0), None)
    (plain.mean(0) * ~batch.meta[:, 1].isnan()).sum().backward()
    assert F.cosine_similarity(views.global_.cls.grad.flatten(), pulls["sex"].flatten(), dim=0) == pytest.approx(-1)


def test_a_backbone_and_its_adversary_end_at_chance(toys) -> None:
    """And not beyond: with a gradient that is reversed without a bound the loss would go on rising."""
    guide, batch, views = make(toys, {"sex": "remove"}, removal=1.0), toys.batch(16), toys.tokens(16, 1)
    cls = views.global_.cls
    optimizer = torch.optim.SGD([{"params": guide.parameters(), "lr": 0.5}, {"params": [cls], "lr": 20.0}])
    course = []
    for _ in range(300):
        optimizer.zero_grad()
        found, _ = run(guide, views, batch)
        found["sex"].backward()
        optimizer.step()
        course.append(found["sex"].item())
    values = batch.meta[:, 1][~batch.meta[:, 1].isnan()]
    shares = values.long().bincount() / len(values)
    chance = -(shares * shares.log()).sum().item()
    assert sum(course[-50:]) / 50 == pytest.approx(chance, rel=0.25)


def test_an_adversary_learns_what_its_backbone_forgets(toys) -> None:
    """Down the gradient, the head's loss falls where only the head moves, and rises where only the tokens move."""
    guide, batch, views = make(toys, {"sex": "remove"}), toys.batch(16), toys.tokens(16, 1)
    found, target = run(guide, views, batch)
    found["sex"].backward()
    moved = copy.deepcopy(guide)
    with torch.no_grad():
        for p, q in zip(moved.parameters(), guide.parameters(), strict=True):
            p -= 0.05 * q.grad
        assert moved(views, target, batch, 0.5)["sex"] < found["sex"]
        views.global_.cls.sub_(views.global_.cls.grad * 50)
        assert guide(views, target, batch, 0.5)["sex"] > found["sex"]


@pytest.mark.parametrize("role", ["remove class", "remove number"])
def test_what_is_forgotten_is_not_driven_further(role: str, toys) -> None:
    """Only what the adversary names better than chance does, by a loop over views."""
    columns = {"sex": "remove"} if role == "remove class" else {"age": "remove"}
    guide, views, batch = make(toys, columns), toys.tokens(16, 1), toys.batch(16)
    found, _ = run(guide, views, batch)
    next(iter(found.values())).backward()
    values = batch.meta[:, 1 if role == "remove class" else 0].tolist()
    known = [v for v in values if not math.isnan(v)]
    felt = 0
    for row, gradient in enumerate(views.global_.cls.grad):
        value = values[row % 16]
        if math.isnan(value):
            assert gradient.eq(0).all()
            continue
        said = guide.heads[0](views.global_.cls[row].detach())
        if role == "remove class":
            loss = -said.log_softmax(-1)[int(value)].item()
            chance = -math.log(known.count(value) / len(known))
        else:
            loss, chance = (F.smooth_l1_loss(torch.tensor(x), torch.tensor(value)).item() for x in (said.item(), 0.0))
        assert bool(gradient.any()) == (loss < chance)
        felt += loss < chance
    assert 0 < felt < 2 * len(known)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_tokens_get_the_same_gradient_however_the_batch_is_parted(parts: int, toys) -> None:
    whole = parted = None
    for n in (1, parts):
        student, teacher = make(toys), make(toys)
        torch.nn.init.normal_(teacher.heads[0].layers[0].weight)
        views, taught, batch = toys.tokens(12, 1), toys.tokens(12, 2), toys.batch(12)
        toys.step(
            {"guide": student}, {"guide": teacher}, toys.split_tokens(views, 12, n), toys.split_tokens(taught, 12, n),
            toys.split_batch(batch, n),
        )  # fmt: skip
        whole, parted = parted, views.global_.cls.grad
    torch.testing.assert_close(parted, whole)


def test_equal_norms_are_the_geometric_mean_and_a_silent_guide_stays_silent() -> None:
    norms = torch.tensor([1.0, 4.0, 2.0, 0.0])
    torch.testing.assert_close(equalised(norms) * norms, torch.tensor([2.0, 2.0, 2.0, 0.0]))
    assert equalised(torch.tensor([1e-9, 1.0]))[0] == LARGEST
    assert equalised(torch.tensor([3.0])).item() == pytest.approx(1)
    assert equalised(torch.zeros(2)).tolist() == [1, 1]


def test_prototypes_follow_the_teacher_and_wait_for_classes_not_seen_yet(toys) -> None:
    teacher, student = make(toys, {"site": "keep prototypes"}), make(toys, {"site": "keep prototypes"})
    batch = toys.batch(4)
    sites = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, math.nan]])
    batch, taught = replace(batch, meta=sites), toys.tokens(4, 2)
    unit = F.normalize(taught.global_.cls.detach(), dim=1).unflatten(0, (2, 4))
    found, target = run(student, toys.tokens(4, 1), batch, teacher, taught)
    assert found["site"].isfinite()
    torch.testing.assert_close(teacher.heads[0].centres[0], unit[:, :2].mean((0, 1)))
    assert teacher.heads[0].centres[2].eq(0).all()
    assert student.heads[0].centres.eq(0).all()  # the buffers are the teacher's own
    before = teacher.heads[0].centres.clone()
    run(student, toys.tokens(4, 1), replace(batch, meta=sites + torch.tensor([0.0, 0, 1])), teacher, taught)
    after = teacher.heads[0].centres
    torch.testing.assert_close(after[0], before[0])  # no image of it in this batch
    torch.testing.assert_close(after[1], MOMENTUM * before[1] + (1 - MOMENTUM) * unit[:, :2].mean((0, 1)))
    torch.testing.assert_close(target.centres[0], before)  # a target keeps what it was made with


def test_a_batch_without_any_value_is_an_exact_zero_on_the_graph(toys) -> None:
    guide, views = make(toys), toys.tokens(4, 1)
    batch = replace(toys.batch(4), meta=torch.full((4, 3), torch.nan))
    found, _ = run(guide, views, batch)
    sum(found.values()).backward()
    assert all(loss.item() == 0 for loss in found.values())
    assert all(p.grad is not None and p.grad.eq(0).all() for p in guide.parameters())
    assert views.global_.cls.grad.eq(0).all()


def test_one_class_and_one_image(toys) -> None:
    context = {"columns": (Column("site", ("only",)),)}
    for role in ("keep", "remove", "keep prototypes"):
        guide, views = make(toys, {"site": role}, context), toys.tokens(1, 1)
        found, _ = run(guide, views, replace(toys.batch(1), meta=torch.zeros(1, 1)))
        found["site"].backward()
        assert found["site"].item() == 0
        assert views.global_.cls.grad.eq(0).all()


def test_which_columns_it_asks_for(toys) -> None:
    asked = Options(columns={"a": "keep", "b": "remove class", "c": "keep number", "d": "keep prototypes"})
    assert asked.table_columns == {"a": "", "b": "class", "c": "number", "d": "class"}
    with pytest.raises(UserError, match="no column 'ages'; there are age, sex, site"):
        make(toys, {"ages": "keep"})
    with pytest.raises(UserError, match="columns is empty"):
        Guide(Options(), toys.context())
    with pytest.raises(UserError, match="yields no columns"):
        run(make(toys), toys.tokens(2, 1), replace(toys.batch(2), meta=None))


def test_a_column_encodes_its_values() -> None:
    site, age = Column("site", ("a", "b")), Column("age", mean=50, std=10)
    assert site.encode("b") == 1
    assert age.encode("70") == age.encode(70) == 2
    assert all(math.isnan(v) for v in (site.encode("c"), site.encode(None), age.encode("?"), age.encode(None)))
    assert math.isnan(age.encode("nan"))
