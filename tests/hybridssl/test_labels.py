from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hybridssl.errors import UserError
from hybridssl.objectives.labels import Labels, Options


def make(toys, context: dict | None = None, **changes) -> Labels:
    torch.manual_seed(0)
    return Labels(Options(**changes), toys.context(**(context or {})))


def run(objective: Labels, views, batch) -> torch.Tensor:
    (target,) = objective.targets([views], [batch], 0.5)
    return objective(views, target, batch, 0.5)["labels"]


def naive(objective: Labels, views, batch, toys) -> float:
    """The docstring's formula, image by image and class by class."""
    o, images = objective.options, len(batch.source)
    rows = {"clean": [views.clean.cls], "global": list(views.global_.cls.chunk(2))}[o.view]
    total, count = 0.0, 0
    for view in rows:
        for i in range(images):
            source = int(batch.source[i])
            able = [c for c in range(toys.CLASSES) if source == -1 or toys.NAMED[source, c]]
            positive = {c for c in able if batch.labels[i, c]}
            if not batch.labelled[i] or not able or (o.kind == "one_of" and not positive):
                continue
            x, w = view[i].detach().double(), objective.weight.detach().double()
            b = torch.zeros(toys.CLASSES) if objective.bias is None else objective.bias.detach()
            if o.head == "cosine":
                x, w = o.scale * x / x.norm(), w / w.norm(dim=1, keepdim=True)
            logits = {c: float(x @ w[c] + b[c]) for c in able}
            if o.kind == "one_of":
                log_sum = math.log(sum(math.exp(v) for v in logits.values()))
                aim = {c: (1 - o.smoothing) * (c in positive) / len(positive) + o.smoothing / len(able) for c in able}
                total += sum(aim[c] * (log_sum - logits[c]) for c in able)
            else:
                for c in able:
                    p = 1 / (1 + math.exp(-logits[c]))
                    y = (c in positive) * (1 - o.smoothing) + o.smoothing / 2
                    total -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / len(able)
            count += 1
    return total / count


@pytest.mark.parametrize("kind", ["one_of", "multi"])
@pytest.mark.parametrize("view", ["clean", "global"])
@pytest.mark.parametrize("head", ["cosine", "linear"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_the_naive_loop(kind: str, view: str, head: str, smoothing: float, toys) -> None:
    objective = make(toys, kind=kind, view=view, head=head, smoothing=smoothing)
    assert (objective.bias is None) == (head == "cosine" and kind == "one_of")
    if objective.bias is not None:
        torch.nn.init.normal_(objective.bias)
    batch, views = toys.batch(12), toys.tokens(12, 1)
    labels = batch.labels.clone()
    labels[batch.labelled.nonzero()[0]] = torch.tensor([1, 1, 1, 1, 1], dtype=torch.uint8)  # several at once
    labels[batch.labelled.nonzero()[1]] = 0  # none of its source's classes
    source = batch.source.clone()
    source[batch.labelled.nonzero()[2]] = 2  # a source that can name nothing
    batch = replace(batch, labels=labels, source=source)
    assert run(objective, views, batch).item() == pytest.approx(naive(objective, views, batch, toys), rel=1e-5)


@pytest.mark.parametrize("kind", ["one_of", "multi"])
def test_classes_that_a_source_cannot_name_get_no_gradient(kind: str, toys) -> None:
    objective = make(toys, kind=kind)
    batch = replace(toys.batch(6), source=torch.zeros(6, dtype=torch.long), labelled=torch.ones(6, dtype=torch.bool))
    batch = replace(batch, labels=F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 5).to(torch.uint8))
    run(objective, toys.tokens(6, 1), batch).backward()
    assert (objective.weight.grad.abs().sum(1) > 0).tolist() == toys.NAMED[0].tolist()


@pytest.mark.parametrize("kind", ["one_of", "multi"])
def test_a_source_that_names_nothing_never_divides_by_zero(kind: str, toys) -> None:
    objective = make(toys, kind=kind, smoothing=0.1)
    batch = replace(toys.batch(4), source=torch.full((4,), 2), labelled=torch.ones(4, dtype=torch.bool))
    loss = run(objective, toys.tokens(4, 1), batch)
    loss.backward()
    assert loss.item() == 0
    assert objective.weight.grad.eq(0).all()


def test_text_prototypes_rest_and_then_move(toys) -> None:
    rows = torch.randn(toys.CLASSES, toys.DIM)
    objective = make(toys, {"prototypes": rows}, init="text", unfreeze_at=0.2)
    torch.testing.assert_close(objective.weight.detach(), F.normalize(rows, dim=1))
    assert [id(p) for p in objective.frozen(0.1)] == [id(objective.weight)]
    assert list(objective.frozen(0.2)) == []
    assert list(make(toys, init="random").frozen(0.0)) == []
    objective.weight.data.zero_()
    assert rows.abs().sum() > 0  # a copy


def test_random_cosine_prototypes_are_unit_rows(toys) -> None:
    torch.testing.assert_close(make(toys).weight.norm(dim=1), torch.ones(toys.CLASSES))


@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        ({}, {"init": "text"}, "python -m hybridssl prototypes"),
        ({"prototypes": torch.randn(3, 12)}, {"init": "text"}, r"\[3, 12\].*\[5, 12\]"),
        ({"classes": 0, "named": torch.zeros(0, 0)}, {}, "names no class"),
    ],
)
def test_what_is_missing_is_named(context: dict, options: dict, message: str, toys) -> None:
    with pytest.raises(UserError, match=message):
        make(toys, context, **options)


def test_a_missing_clean_view_is_named(toys) -> None:
    with pytest.raises(UserError, match="view=clean"):
        run(make(toys), replace(toys.tokens(4, 1), clean=None), toys.batch(4))


@pytest.mark.parametrize("kind", ["one_of", "multi"])
def test_clean_views_of_the_labelled_images_alone_are_enough(kind: str, toys) -> None:
    objective, views, batch = make(toys, kind=kind), toys.tokens(12, 1), toys.batch(12)
    rows = batch.labelled.nonzero()[:, 0]
    assert 0 < len(rows) < 12
    few = replace(views, clean=views.clean[rows])
    torch.testing.assert_close(
        run(objective, few, replace(batch, clean_of=rows)), run(objective, views, batch), rtol=1e-6, atol=0
    )
    none = run(objective, replace(views, clean=views.clean[:0]), replace(batch, clean_of=rows[:0]))
    none.backward()
    assert none.item() == 0
    assert objective.weight.grad.eq(0).all()


def test_dropout_acts_in_training_alone(toys) -> None:
    objective, views, batch = make(toys, dropout=0.5), toys.tokens(8, 1), toys.batch(8)
    assert run(objective, views, batch) != run(objective, views, batch)
    assert run(objective.eval(), views, batch) == run(objective, views, batch)


def test_says_which_view_it_reads(toys) -> None:
    assert make(toys).views == {"clean"}
    assert make(toys, view="global").views == {"global"}
