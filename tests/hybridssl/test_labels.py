from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

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
            x, w = objective.project(view[i]).detach().double(), objective.weight.detach().double()
            b = torch.zeros(toys.CLASSES) if objective.bias is None else objective.bias.detach()
            if o.head != "linear":
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
@pytest.mark.parametrize("head", ["cosine", "linear", "mlp"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_the_naive_loop(kind: str, view: str, head: str, smoothing: float, toys) -> None:
    objective = make(toys, kind=kind, view=view, head=head, smoothing=smoothing)
    assert (objective.bias is None) == (head != "linear" and kind == "one_of")
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


@pytest.mark.parametrize("pseudo", [1.0, 0.51])
def test_the_head_learns_first_and_then_the_backbone_too(pseudo: float, toys) -> None:
    objective = make(toys, head_first=0.5, pseudo_above=pseudo)
    batch, views = toys.batch(8, labelled=0.5), toys.tokens(8, 1)
    for tokens in (views.clean, views.global_):
        tokens.cls.requires_grad_()
    (target,) = objective.targets([toys.tokens(8, 2)], [batch], 0.0)
    found = {}
    for progress in (0.49, 0.5):
        loss = sum(objective(views, target, batch, progress).values())
        assert loss.item() == pytest.approx(sum(objective(views, target, batch, 1.0).values()).item())
        assert objective.reaches(progress) == (progress >= 0.5)
        shown = [views.clean.cls, *([views.global_.cls] if pseudo < 1 else [])]
        found[progress] = torch.autograd.grad(loss, [objective.weight, *shown])  # all are on the graph
    torch.testing.assert_close(found[0.49][0], found[0.5][0])
    assert all(gradient.eq(0).all() for gradient in found[0.49][1:])
    assert all(gradient.ne(0).any() for gradient in found[0.5][1:])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"start": 0.7, "head_first": 0.7}, "0.75"),
        ({"start": 0.7, "head_first": 0.1}, "0.75"),
        ({"start": 0.98, "head_first": 0.5}, "0.99"),
        ({"start": 0.7, "init": "text"}, "0.75"),  # .1 by itself
    ],
)
def test_what_would_be_over_before_labels_start_is_refused(wrong: dict, right: str) -> None:
    key = "head_first" if "head_first" in wrong else "unfreeze_at"
    with pytest.raises(UserError, match=rf"objectives\.labels\.{key}=.* start at .*such as {right}, or 0"):
        Options(**wrong)
    for value in (float(right), 0.0, 1.0):
        Options(**{**wrong, key: value})
    Options(start=0.7)  # prototypes that begin at random never rest
    Options(start=0.7, init="text", unfreeze_at=0.7)  # and words that learn with all else need not


def test_random_cosine_prototypes_are_unit_rows(toys) -> None:
    torch.testing.assert_close(make(toys).weight.norm(dim=1), torch.ones(toys.CLASSES))


@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        ({}, {"init": "text"}, "python -m hybridssl prototypes"),
        ({"prototypes": torch.randn(3, 12)}, {"init": "text"}, r"\[3, 12\].*\[5, 12\]"),
        ({"classes": 0, "named": torch.zeros(0, 0)}, {}, "names no class; .* objectives.labels=null"),
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


# ------------------------------------------------------------------------------------------------------------ ontology

NAMES = ("melanoma", "bcc", "nevus", "wart", "skin cancer")  # sources: the first three; nevus, wart, skin cancer; none
TREE = "name,parents\nmelanoma,skin cancer\nbcc,skin cancer\nskin cancer,\nnevus,benign\nwart,benign\nbenign,\n"
BENIGN = 5


@pytest.fixture
def tree(tmp_path: Path) -> str:
    path = tmp_path / "ontology.csv"
    path.write_text(TREE)
    return str(path)


def single(toys, source: int, *labels: int):
    """A batch of one labelled image."""
    row = torch.zeros(1, toys.CLASSES, dtype=torch.uint8)
    row[0, list(labels)] = 1
    return replace(toys.batch(1), labels=row, source=torch.tensor([source]), labelled=torch.tensor([True]))


def test_one_of_with_an_ontology_is_the_mean_over_the_levels(tree: str, toys) -> None:
    objective, views = make(toys, {"names": NAMES}, ontology=tree), toys.tokens(1, 1)
    assert objective.ancestors is None
    logits = objective.logits(views.clean.cls)[0].detach()

    def p(*classes: int, among: tuple[int, ...]) -> float:
        return float(logits[list(classes)].exp().sum() / logits[list(among)].exp().sum())

    fine, coarse = (0, 1, 2), (0, 1, 2, 3)  # skin cancer is no atom: no source names it beside one of its kinds
    cases = {
        (0, 0): [p(0, among=fine), p(0, 1, among=fine)],  # melanoma, skin cancer
        (0, 2): [p(2, among=fine)] * 2,  # nevus and benign are one thing to this source
        (1, 4): [p(0, 1, among=coarse)],  # skin cancer alone
        (1, 3): [p(3, among=coarse), p(2, 3, among=coarse)],
    }
    for (source, label), levels in cases.items():
        expected = -sum(map(math.log, levels)) / len(levels)
        assert run(objective, views, single(toys, source, label)).item() == pytest.approx(expected, rel=1e-5)


def test_an_ancestor_of_all_that_a_source_can_name_does_not_count_as_a_level(tree: str, toys) -> None:
    cancers = torch.tensor([[1, 1, 0, 0, 0]]).bool()
    deep, flat = (make(toys, {"names": NAMES, "named": cancers}, ontology=o) for o in (tree, ""))
    views = toys.tokens(1, 1)
    torch.testing.assert_close(run(deep, views, single(toys, 0, 1)), run(flat, views, single(toys, 0, 1)))


def test_a_coarse_label_pulls_at_all_its_kinds_and_at_no_prototype_of_its_own(tree: str, toys) -> None:
    objective = make(toys, {"names": NAMES}, ontology=tree)
    run(objective, toys.tokens(1, 1), single(toys, 1, 4)).backward()
    assert (objective.weight.grad.abs().sum(1) > 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_multi_with_an_ontology_is_bce_over_what_the_label_tells(tree: str, smoothing: float, toys) -> None:
    objective = make(toys, {"names": NAMES}, ontology=tree, kind="multi", smoothing=smoothing)
    torch.nn.init.normal_(objective.bias)
    views = toys.tokens(1, 1)
    logits = objective.logits(views.clean.cls)[0].detach()
    assert logits.shape == (toys.CLASSES + 1,)
    told = {
        (0, 0): {0: 1, 1: 0, 2: 0, 4: 1},
        (0, 2): {0: 0, 1: 0, 2: 1, 4: 0, BENIGN: 1},
        (1, 4): {2: 0, 3: 0, 4: 1, BENIGN: 0},
        (1, 2): {0: 0, 1: 0, 2: 1, 3: 0, 4: 0, BENIGN: 1},
    }
    for (source, label), truths in told.items():
        total = 0.0
        for v, y in truths.items():
            q, aim = 1 / (1 + math.exp(-float(logits[v]))), y * (1 - smoothing) + smoothing / 2
            total -= aim * math.log(q) + (1 - aim) * math.log(1 - q)
        assert run(objective, views, single(toys, source, label)).item() == pytest.approx(total / len(truths), rel=1e-5)


def test_an_ancestor_starts_amid_its_classes_and_rests_with_them(tree: str, toys) -> None:
    rows = torch.randn(toys.CLASSES, toys.DIM)
    context = {"names": NAMES, "prototypes": rows}
    objective = make(toys, context, ontology=tree, kind="multi", init="text")
    torch.testing.assert_close(objective.ancestors.detach(), F.normalize(rows, dim=1)[2:4].mean(0, keepdim=True))
    assert {id(p) for p in objective.frozen(0.0)} == {id(objective.weight), id(objective.ancestors)}


def test_an_ontology_that_lacks_a_class_is_named(tree: str, toys) -> None:
    with pytest.raises(UserError, match=r"objectives.labels.ontology=.*'bcx' \(nearest: 'bcc'\)"):
        make(toys, {"names": ("melanoma", "bcx", *NAMES[2:])}, ontology=tree)


# ------------------------------------------------------------------------------------------------------- class balance


def test_logit_adjustment_adds_the_log_prior_of_the_source(toys) -> None:
    counts = torch.tensor([[90, 8, 2, 0, 0], [0, 0, 1, 1, 98], [0, 0, 0, 0, 0]])
    objective, views = make(toys, {"counts": counts}, adjust=True), toys.tokens(1, 1)
    logits = objective.logits(views.clean.cls)[0].detach()
    for source, label in ((0, 2), (1, 2), (1, 4)):
        able = toys.NAMED[source].nonzero()[:, 0].tolist()
        q = {c: float(counts[source, c] / counts[source].sum() * logits[c].exp()) for c in able}
        expected = -math.log(q[label] / sum(q.values()))
        assert run(objective, views, single(toys, source, label)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"adjust": True, "kind": "multi"}, "kind=one_of"), ({"pseudo_above": 0.4}, "above .5")],
)
def test_options_that_do_not_go_together_are_named(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Options(**options)


# ------------------------------------------------------------------------------------------------------- pseudo-labels


@pytest.mark.parametrize("kind", ["one_of", "multi"])
@pytest.mark.parametrize("ontology", [False, True])
def test_pseudo_labels_equal_the_naive_loop(kind: str, ontology: bool, tree: str, toys) -> None:
    options = {"kind": kind, "pseudo_above": 0.7, "ontology": tree if ontology else "", "smoothing": 0.1}
    student = make(toys, {"names": NAMES}, **options)
    teacher = copy.deepcopy(student)
    torch.nn.init.normal_(teacher.weight)
    views, taught, batch = toys.tokens(24, 1), toys.tokens(24, 2), toys.batch(24, labelled=0.3)
    (target,) = teacher.targets([taught], [batch], 0.5)
    got = student(views, target, batch, 0.5)

    def p(objective: Labels, tokens, view: int, i: int) -> list[float]:
        x = objective.logits(tokens.global_.cls[view * 24 + i][None])[0].detach()
        if kind == "multi":
            return x.sigmoid().tolist()
        voc = objective.vocabulary
        exp = {a: float(x[a].exp()) for a in range(5) if voc.allowed[batch.source[i], a]}
        return [sum(e for a, e in exp.items() if voc.above[a, v]) / sum(exp.values()) for v in range(voc.size)]

    total, labelled_by_teacher = 0.0, 0
    for i in range(24):
        if batch.labelled[i]:
            continue
        sure = [(a + b) / 2 for a, b in zip(p(teacher, taught, 0, i), p(teacher, taught, 1, i), strict=True)]
        for view in range(2):
            mine = p(student, views, view, i)
            if kind == "multi":
                terms = [-math.log(q) for q, s in zip(mine, sure, strict=True) if s >= 0.7]
                terms += [-math.log(1 - q) for q, s in zip(mine, sure, strict=True) if s <= 0.3]
            else:  # what is certain of its source says nothing
                terms = [-math.log(q) for q, s in zip(mine, sure, strict=True) if s >= 0.7 and s < 1 - 1e-6]
            total += sum(terms) / max(len(terms), 1) / 2
        labelled_by_teacher += bool(terms)
    without = int((~batch.labelled).sum())
    assert labelled_by_teacher > 0
    assert kind == "multi" or labelled_by_teacher < without
    assert got["pseudo"].item() == pytest.approx(total / without, rel=1e-4)
    found = student.health(views, target, batch)["pseudo_labelled"]
    assert found.item() == pytest.approx(labelled_by_teacher / without)
    torch.testing.assert_close(got["labels"], run(student, views, batch))


def test_pseudo_labels_need_the_teacher_and_the_global_views(toys) -> None:
    objective = make(toys, pseudo_above=0.95)
    assert objective.taught
    assert objective.views == {"clean", "global"}
    assert not make(toys).taught


@pytest.mark.parametrize("labelled", [0.0, 1.0])
def test_pseudo_labels_with_all_labels_or_none(labelled: float, toys) -> None:
    objective, batch, views = make(toys, pseudo_above=0.6), toys.batch(6, labelled=labelled), toys.tokens(6, 1)
    (target,) = objective.targets([toys.tokens(6, 2)], [batch], 0.5)
    found = objective(views, target, batch, 0.5)
    sum(found.values()).backward()
    assert found["labels" if labelled == 0 else "pseudo"].item() == 0
    assert found["pseudo" if labelled == 0 else "labels"].item() > 0
    assert objective.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["one_of", "multi"])
def test_one_class_alone(kind: str, toys) -> None:
    objective = make(toys, {"classes": 1, "named": torch.ones(1, 1).bool()}, kind=kind, pseudo_above=0.9)
    batch = replace(toys.batch(4), labels=torch.tensor([[1], [1], [0], [0]], dtype=torch.uint8))
    batch = replace(batch, source=torch.zeros(4, dtype=torch.long), labelled=torch.tensor([1, 1, 1, 0]).bool())
    (target,) = objective.targets([toys.tokens(4, 2)], [batch], 0.5)
    found = objective(toys.tokens(4, 1), target, batch, 0.5)
    sum(found.values()).backward()
    assert objective.weight.grad.isfinite().all()
    assert (found["labels"].item() > 0) == (kind == "multi")  # a softmax over one class has nothing to say


def test_the_projection_is_learnt_and_the_features_are_not_the_logits(toys) -> None:
    objective = make(toys, head="mlp")
    run(objective, toys.tokens(6, 1), toys.batch(6)).backward()
    assert all(p.grad.abs().sum() > 0 for p in objective.project.parameters())
    assert make(toys).project(torch.ones(1, 3)).tolist() == [[1, 1, 1]]
