"""knn and probe through the door, on the small index, held to scikit-learn and torch on the same features."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, recall_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from finetune import features, kinds, metrics, probe, results
from finetune.__main__ import main
from finetune.backbones import load
from finetune.features import extract
from shards.errors import DataError
from tests.finetune.conftest import rows
from tests.finetune.judging import point


@pytest.fixture
def evaluate(index, export_folder, tmp_path):
    """Run a verb; give the result."""

    def run(verb, *options, backbone=export_folder, data=index.root, out=tmp_path / "out", protocol=""):
        arguments = [verb, "--backbone", str(backbone), "--data", str(data), "--out", str(out), "--device", "cpu"]
        assert main([*arguments, *map(str, options)]) == 0
        return results.read(out / (protocol or verb) / "results.json")

    return run


@pytest.fixture(scope="module")
def parts(index, export_folder):
    """{split: (x, y)} of all three splits, straight from the extractor."""
    encoder, found = load(str(export_folder)), {}
    for name in ("train", "val", "test"):
        features = extract(encoder, index, index.select([name]))
        found[name] = (features.x, features.label)
    return found


def test_knn_agrees_with_scikit_learn(evaluate, parts):
    result = evaluate("knn", "--k", 3, 9, 15)
    (train_x, train_y), (val_x, val_y), (test_x, test_y) = (parts[s] for s in ("train", "val", "test"))

    def reference(k):
        weight = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weight)
        return model.fit(train_x["cls"], train_y)

    on_val = {k: point("balanced_accuracy", val_y, reference(k).predict_proba(val_x["cls"])) for k in (3, 9, 15)}
    best = max(on_val, key=lambda k: on_val[k])
    assert result.about["selected"]["choices"] == [{"seed": 0, "k": best, "val": round(on_val[best], 4)}]
    expected = reference(best).predict_proba(test_x["cls"])
    predictions = result.predictions()
    np.testing.assert_allclose(predictions["scores"][0], expected, atol=1e-4)
    np.testing.assert_array_equal(predictions["y"], test_y)
    assert result.metrics["accuracy"].value == pytest.approx((expected.argmax(1) == test_y).mean())


@pytest.fixture(scope="module")
def toned(new_index, table):
    """The small index again: its labels are a column `tone`, but for one group; `label` says something else."""
    silent = table[0]["group"]
    return new_index(
        [
            {**row, "tone": row["label"] if row["group"] != silent else "", "label": "xy"[n % 2], "age": str(n)}
            for n, row in enumerate(table)
        ]
    )


def test_another_column_may_be_asked_for(evaluate, toned, index, tmp_path):
    for verb, protocol in (("knn", "knn"), ("probe", "logistic")):
        asked = evaluate(verb, "--column", "tone", data=toned.root, protocol=protocol, out=tmp_path / "tone")
        assert list(asked.about["data"]["classes"]) == ["blue", "brown", "red"]
        plain = evaluate(verb, protocol=protocol)
        key = {i: index.read(i).meta["path"] for i in range(len(index))}
        mine = {toned.read(i).meta["path"]: i for i in range(len(toned))}
        own, other = asked.predictions(), plain.predictions()
        at = dict(zip(own["number"].tolist(), own["y"].tolist(), strict=True))
        assert [at[mine[key[n]]] for n in other["number"].tolist()] == other["y"].tolist()
        silent = sum(not toned.meta(i).get("tone") for i in range(len(toned)))
        assert silent > 0
        assert asked.about["data"]["splits"]["train"] == plain.about["data"]["splits"]["train"] - silent


def test_answers_about_two_columns_are_kept_apart(evaluate, toned, export_folder, tmp_path, capsys):
    out = tmp_path / "out"
    labels = evaluate("knn", data=toned.root, out=out / "labels")
    tones = evaluate("knn", "--column", "tone", data=toned.root, out=out / "tones")
    assert labels.metrics["balanced_accuracy"].value < 0.7 < tones.metrics["balanced_accuracy"].value
    capsys.readouterr()
    again = ["knn", "--backbone", str(export_folder), "--data", str(toned.root), "--device", "cpu"]
    assert main([*again, "--out", str(out / "tones")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["compare", str(out / "labels/knn"), str(out / "tones/knn"), "--out", str(out)]) == 2
    assert "differ in column (None; tone)" in capsys.readouterr().err
    assert main(["report", str(out), "--out", str(out / "report.html")]) == 0
    assert f"{toned.root}, column tone" in (out / "report.html").read_text()
    table = (out / "report.csv").read_text().splitlines()
    assert {line.split(",")[2] for line in table} == {"column", "", "tone"}


def test_a_column_has_no_several_labels(toned, export_folder, tmp_path, capsys):
    asked = ["--backbone", str(export_folder), "--data", str(toned.root), "--out", str(tmp_path), "--column", "tone"]
    for verb in ("knn", "probe"):
        assert main([verb, *asked, "--multi-label"]) == 2
        assert "--column tone has one value per image: leave --multi-label out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_column_of_numbers_is_no_class(toned, export_folder, tmp_path, capsys):
    asked = ["knn", "--backbone", str(export_folder), "--data", str(toned.root), "--out", str(tmp_path), "--column"]
    assert main([*asked, "age"]) == 2
    assert f"--column age has {len(toned)} values" in capsys.readouterr().err
    assert main([*asked, "tones"]) == 2
    assert "did you mean 'tone'?" in capsys.readouterr().err


def test_result_says_all_that_a_reviewer_asks(evaluate, index, export_folder):
    result = evaluate("knn")
    about = result.about
    assert about["backbone"]["name"] == str(export_folder)
    assert about["backbone"]["sha256"] == load(str(export_folder)).sha256
    data = about["data"]
    assert (data["sha256"], data["group_column"], data["labels"]) == (index.sha256, "group", 1.0)
    assert data["groups"] == {"train": 42, "val": 24, "test": 30}
    assert data["splits"] == {name: len(index.select([name])) for name in ("train", "val", "test")}
    assert about["selected"]["split"] == "val"
    assert about["cost"]["labels_used"] == {"train": [data["splits"]["train"]], "val": [data["splits"]["val"]]}
    assert about["cost"]["seconds"] > 0
    assert about["leaks"] == {"pretraining": None, "groups": 0, "images": 0, "allowed": False}
    assert any("does not record what it was pretrained on" in note for note in about["notes"])
    for m in result.metrics.values():
        assert 0 <= m.low <= m.value <= m.high <= 1
    predictions = result.predictions()
    again = metrics.bootstrap(predictions["y"], predictions["scores"], predictions["group"], metrics.ONE_OF)
    assert again["balanced_accuracy"].low == pytest.approx(result.metrics["balanced_accuracy"].low, abs=1e-6)
    assert set(predictions["number"]) == set(index.select(["test"]))


def stacked(parts):
    """x, y and the rows of train, val and test, as `probe.fit` wants them."""
    x = {kind: np.concatenate([x[kind] for x, _ in parts.values()]) for kind in ("cls", "patch_mean")}
    ends = np.cumsum([0] + [len(y) for _, y in parts.values()])
    return x, np.concatenate([y for _, y in parts.values()]), [np.arange(*ends[i : i + 2]) for i in range(3)]


ONE_OF = kinds.choose("one-of", "abc")


def test_logistic_agrees_with_a_cold_scikit_learn_pipeline(parts):
    x, y, (train, val, test) = stacked(parts)
    head = probe.fit(x, y, train, val, ONE_OF, 3)
    values = probe.readouts(x)[head.choice["features"]]
    c = head.choice["C"]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=5000))
    model.fit(values[train], y[train])
    assert c in probe.CS
    assert head.choice["converged"]
    ours = head.predict({kind: v[test] for kind, v in x.items()})
    np.testing.assert_allclose(ours, model.predict_proba(values[test]), atol=0.02)
    assert head.val == pytest.approx(ONE_OF.point(y[val], model.predict_proba(values[val])), abs=0.02)


def test_two_classes_are_no_special_case(parts):
    x, y, (train, val, _) = stacked(parts)
    two = lambda rows: rows[y[rows] != 1]  # noqa: E731
    head = probe.fit(x, y, two(train), two(val), ONE_OF, 3)
    values = probe.readouts(x)[head.choice["features"]]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=head.choice["C"], class_weight="balanced"))
    model.fit(values[two(train)], y[two(train)])
    expected = np.insert(model.predict_proba(values[val]), 1, 0, axis=1)
    np.testing.assert_allclose(head.predict({kind: v[val] for kind, v in x.items()}), expected, atol=0.02)


def test_several_labels_are_one_regression_each(parts):
    x, y, (train, val, _) = stacked(parts)
    many = np.eye(3, dtype=np.uint8)[y]
    many[::4, 0] = 1
    kind = kinds.choose("multi-label", "abc")
    head = probe.fit(x, many, train, val, kind, 3)
    values = probe.readouts(x)[head.choice["features"]]
    for k in range(3):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=head.choice["C"], max_iter=2000))
        expected = model.fit(values[train], many[train, k]).predict_proba(values[val])[:, 1]
        np.testing.assert_allclose(head.predict({kind: v[val] for kind, v in x.items()})[:, k], expected, atol=0.02)
    linear = probe.fit(x, many, train, val, kind, 3, method="linear")
    assert linear.val > 0.8


def test_linear_agrees_with_torchs_own_optimiser(parts, monkeypatch):
    x, y, (train, val, test) = stacked(parts)
    x = {"cls": x["cls"]}
    monkeypatch.setattr(probe, "STEPS", (40, 40))
    monkeypatch.setattr(probe, "BATCH", 16)
    head = probe.fit(x, y, train, val, ONE_OF, 3, seed=5, method="linear")
    mean, deviation = x["cls"][train].mean(0), x["cls"][train].std(0)
    images = torch.from_numpy((x["cls"] - mean) / deviation)
    layer = torch.nn.Linear(images.shape[1], 3)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=head.choice["lr"], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    target, counts = torch.from_numpy(y), np.bincount(y[train])
    weight = torch.tensor(len(train) / (3 * counts), dtype=torch.float32)
    draw = torch.Generator().manual_seed(5)
    order = torch.cat([torch.randperm(len(train), generator=draw) for _ in range(40 * 16 // len(train) + 1)])
    for step in range(40):
        at = train[order[step * 16 : (step + 1) * 16]]
        losses = torch.nn.functional.cross_entropy(layer(images[at]), target[at], reduction="none")
        optimizer.zero_grad()
        (losses * weight[target[at]]).mean().backward()
        optimizer.step()
        schedule.step()
    expected = layer(images[test]).softmax(1).detach().numpy()
    np.testing.assert_allclose(head.predict({"cls": x["cls"][test]}), expected, atol=1e-4)


@pytest.mark.parametrize("method", ["logistic", "linear"])
def test_a_class_without_training_labels_gets_no_score(parts, method):
    x, y, (train, val, test) = stacked(parts)
    head = probe.fit(x, y, train[y[train] != 1], val, ONE_OF, 3, method=method)
    scores = head.predict({kind: v[test] for kind, v in x.items()})
    assert (scores[:, 1] == 0).all()
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)


def test_constant_features_are_harmless():
    x = np.ones((6, 2), dtype=np.float32)
    x[:, 1] = np.arange(6)
    mean, scale = probe.spread(x)
    assert scale[0] == 0
    assert ((x - mean) * scale)[:, 1].std() == pytest.approx(1)


def test_grades_and_disease_are_judged_in_their_own_terms(evaluate, capsys, index, tmp_path):
    result = evaluate("knn", "--k", 3, "--grades", "red", "brown", "blue", "--positive", "red", "brown")
    assert list(result.about["data"]["classes"]) == ["red", "brown", "blue"]
    assert result.about["selected"]["by"] == "quadratic_kappa"
    found = result.predictions()
    said = found["scores"][0].argmax(1)
    kappa = cohen_kappa_score(found["y"], said, weights="quadratic")
    assert result.metrics["quadratic_kappa"].value == pytest.approx(kappa)
    ill = found["scores"][0][:, :2].sum(1)
    assert result.metrics["disease_auroc"].value == pytest.approx(roc_auc_score(found["y"] < 2, ill))
    assert result.metrics["sensitivity"].value == pytest.approx(recall_score(found["y"] < 2, ill > 0.5))
    assert result.metrics["specificity"].value == pytest.approx(recall_score(found["y"] == 2, ill <= 0.5))
    assert kinds.of(result.about).metrics.keys() == result.metrics.keys()
    base = ["knn", "--backbone", "histogram", "--data", str(index.root), "--out", str(tmp_path / "o")]
    assert main([*base, "--grades", "red", "blue"]) == 2
    assert "the data has blue, brown, red" in capsys.readouterr().err
    assert main([*base, "--positive", "mel"]) == 2
    assert "--positive mel: no such class here; there are blue, brown, red" in capsys.readouterr().err


@pytest.mark.timeout(900)  # a regression a label for each of twenty penalties, on a thousand features
def test_several_labels_an_image(evaluate, new_index, table):
    """Every third image shows a second finding; val scores are kept beside those of test."""
    other = {"blue": "red", "brown": "blue", "red": "brown"}
    many = [
        {**row, "label": f"{row['label']}|{other[row['label']]}"} if i % 3 == 0 else row for i, row in enumerate(table)
    ]
    data = new_index(many)
    for verb, protocol in (("knn", "knn"), ("probe", "logistic"), ("probe", "linear")):
        result = evaluate(
            verb, "--multi-label", "--labels", 0.5, data=data.root, protocol=protocol, backbone="histogram"
        )
        assert set(result.metrics) == {"macro_auroc", "average_precision"}
        assert result.metrics["macro_auroc"].value > 0.6
        found = result.predictions()
        assert found["y"].shape == found["scores"][0].shape
        assert found["y"].sum(1).max() == 2
        assert found["val_scores_0"].shape == found["val_y_0"].shape
        on_val = kinds.of(result.about).point(found["val_y_0"], found["val_scores_0"])
        assert on_val == pytest.approx(result.about["selected"]["choices"][0]["val"], abs=1e-3)


def test_what_a_source_cannot_name_is_not_taken_for_absent(evaluate, new_index, table, tmp_path, capsys):
    """The clinic's list has no "red": whether its images show it is unknown, neither yes nor no."""
    away = [{**row, "source": "clinic" if "-0" in row["group"] and row["label"] != "red" else "ward"} for row in table]
    many = [{**row, "label": f"{row['label']}|flat" if i % 3 == 0 else row["label"]} for i, row in enumerate(away)]
    data = new_index(many).root
    command = ["knn", "--backbone", "histogram", "--data", str(data), "--out", str(tmp_path / "o"), "--multi-label"]
    assert main(command) == 2
    assert "clinic cannot name red" in (said := capsys.readouterr().err)
    assert "--source NAME" in said
    assert not (tmp_path / "o").exists()
    one = evaluate("knn", "--multi-label", "--source", "ward", data=data, backbone="histogram")
    assert set(one.about["data"]["classes"]) == {"blue", "brown", "flat", "red"}
    same = [{**row, "source": "clinic" if "-0" in row["group"] else "ward"} for row in many]
    assert evaluate("knn", "--multi-label", data=new_index(same).root, backbone="histogram", out=tmp_path / "same")


@pytest.mark.parametrize(("verb", "protocols"), [("knn", ["knn"]), ("probe", ["logistic", "linear"])])
def test_choices_never_see_the_test_labels(evaluate, new_index, table, tmp_path, verb, protocols):
    """The same images with every test label wrong: same choices, same scores, another figure."""
    names = sorted({row["label"] for row in table})
    wrong = [
        {**row, "label": names[(names.index(row["label"]) + 1) % 3]} if row["split"] == "test" else row for row in table
    ]
    poisoned = new_index(wrong)
    for protocol in protocols:
        a = evaluate(verb, protocol=protocol, out=tmp_path / "a")
        b = evaluate(verb, protocol=protocol, out=tmp_path / "b", data=poisoned.root)
        assert a.about["selected"] == b.about["selected"]
        np.testing.assert_array_equal(a.predictions()["scores"], b.predictions()["scores"])
        assert a.metrics["accuracy"].value > b.metrics["accuracy"].value + 0.2


def test_the_probe_learns_more_than_chance_and_the_histogram_sees_colours(evaluate, tmp_path):
    result = evaluate("probe", "--methods", "logistic", backbone="histogram", protocol="logistic")
    assert result.metrics["balanced_accuracy"].low > 0.5, "three classes of three colours"
    assert result.about["backbone"]["baseline"]


def test_the_next_step_that_is_named_can_be_taken(evaluate, export_folder, tmp_path, capsys):
    def said() -> str:
        return capsys.readouterr().out.rpartition("next: ")[2].strip()

    evaluate("knn", "--k", 3)
    same, _, compare = said().partition(", then ")
    null, out = re.fullmatch(r"the same with --backbone (\S+) --out (\S+)", same).groups()
    evaluate("knn", "--k", 3, backbone=null, out=Path(out))
    assert said() == f"python -m finetune compare {out}/knn OTHER/knn --out {tmp_path}"
    assert main(compare.split()[3:]) == 0
    (verdict,) = results.read(tmp_path / "compare-knn/results.json").about["detail"]["comparisons"]
    assert (verdict["a"], verdict["b"]) == (str(export_folder), null)
    assert main(said().split()[3:]) == 0
    assert (tmp_path / "report.html").is_file()


def test_few_labels_by_whole_groups(evaluate, index):
    result = evaluate("knn", "--labels", 0.3, "--seeds", 0, 1, "--k", 1, 3)
    used, total = result.about["cost"]["labels_used"]["train"], result.about["data"]["splits"]["train"]
    assert all(0.3 * total <= n <= 0.3 * total + 9 for n in used)
    assert result.about["data"]["labels"] == 0.3
    scores = result.predictions()["scores"]
    assert scores.shape[0] == 2
    assert (scores[0] != scores[1]).any(), "the seeds drew different labels"
    assert [c["seed"] for c in result.about["selected"]["choices"]] == [0, 1]


def test_without_val_a_part_of_train_chooses(evaluate, new_index, table):
    data = new_index([row for row in table if row["split"] != "val"])
    result = evaluate("knn", "--k", 1, 3, data=data.root)
    used, total = result.about["cost"]["labels_used"], result.about["data"]["splits"]["train"]
    assert used["train"][0] + used["val"][0] == total
    assert 0.15 * total < used["val"][0] < 0.35 * total
    assert "carved out of train" in result.about["selected"]["split"]


def test_a_val_that_outgrows_train_is_named(evaluate):
    note = "choices are better informed there than a clinic with so few labels could make them"
    few = evaluate("knn", "--labels", 0.1)
    used = few.about["cost"]["labels_used"]
    assert any(f"val keeps its {used['val'][0]} labels, even where {used['train'][0]} train: {note}" in n
               for n in few.about["notes"])  # fmt: skip
    assert not any(note in n for n in evaluate("knn", "--overwrite").about["notes"])


def test_a_test_split_of_few_patients_is_named(evaluate, new_index):
    few = evaluate("knn", data=new_index(rows(splits={"train": 6, "val": 4, "test": 3})).root)
    assert any("test has only 9 patients or lesions: with fewer than 20" in note for note in few.about["notes"])
    one = [{**row, "group": "p"} if row["split"] == "test" else row for row in rows(splits={"train": 6, "test": 3})]
    alone = evaluate("knn", "--overwrite", data=new_index(one).root)
    assert any("test is of one patient or lesion" in note for note in alone.about["notes"])
    assert np.isnan([m.low for m in alone.metrics.values()]).all()


def test_a_split_of_which_nothing_decodes_is_an_error(index, tmp_path, monkeypatch, capsys):
    test, whole = {index.read(int(n)).image for n in index.select(["test"])}, features.decode

    def decode(data, *arguments):
        if data in test:
            raise DataError("damaged png image")
        return whole(data, *arguments)

    monkeypatch.setattr(features, "decode", decode)
    words = ["knn", "--backbone", "histogram", "--data", str(index.root), "--out", str(tmp_path / "o")]
    assert main([*words, "--cache", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert "no labelled image of split test" in said
    assert "damaged png image): build the index from whole images" in said


def test_the_histogram_has_one_size(index, tmp_path, capsys):
    words = ["knn", "--backbone", "histogram", "--data", str(index.root), "--out", str(tmp_path / "o"), "--size", "32"]
    assert main(words) == 2
    assert "--size 32 changes nothing for the histogram" in capsys.readouterr().err


def test_unlabelled_images_and_missing_classes(evaluate, new_index, table):
    changed = []
    for row in table:
        blank = row["split"] == "train" and row["group"].endswith(("-1", "-2"))
        gone = row["split"] == "test" and row["label"] == "red"
        if not gone:
            changed.append({**row, "label": "" if blank else row["label"]})
    result = evaluate("knn", "--k", 3, data=new_index(changed).root)
    labelled = sum(row["split"] == "train" and row["label"] != "" for row in changed)
    assert result.about["data"]["splits"]["train"] == labelled
    assert "no test image of red: the means are over the other classes" in result.about["notes"]
    assert result.about["data"]["classes"]["red"]["test"] == 0
    assert 0 <= result.metrics["balanced_accuracy"].value <= 1


def test_a_pretraining_image_in_test_stops_the_evaluation(evaluate, index, export_folder, tmp_path, capsys):
    folder = shutil.copytree(export_folder, tmp_path / "model")
    read = np.concatenate([index.select(["train"]), index.select(["test"])[:3]])
    save_file({"digest": np.array(index.column("digest")[read])}, folder / "pretraining.safetensors")
    arguments = ["knn", "--backbone", str(folder), "--data", str(index.root), "--out", str(tmp_path / "leaky")]
    assert main(arguments) == 2
    assert "3 val or test images were read in the backbone's own pretraining" in capsys.readouterr().err
    assert not (tmp_path / "leaky").exists()
    result = evaluate("knn", "--allow-leak", backbone=folder)
    assert result.about["leaks"] == {"pretraining": 3, "groups": 0, "images": 0, "allowed": True}
    assert "LEAK: 3 val or test images" in capsys.readouterr().out
    save_file({"digest": np.array(index.column("digest")[index.select(["train"])])}, folder / "pretraining.safetensors")
    clean = evaluate("knn", backbone=folder, out=tmp_path / "clean")
    assert clean.about["leaks"]["pretraining"] == 0


def test_a_group_in_two_splits_stops_the_evaluation(new_index, table, export_folder, tmp_path, capsys):
    moved = [{**row, "group": row["group"].replace("test-blue-0", "train-blue-0")} for row in table]
    data = new_index(moved).root
    out = tmp_path / "out"
    assert main(["knn", "--backbone", str(export_folder), "--data", str(data), "--out", str(out)]) == 2
    assert "1 groups (patients, lesions) are in more than one split" in capsys.readouterr().err


def test_an_image_without_a_label_gives_its_patient_away(new_index, table, export_folder, tmp_path, capsys):
    """A follow-up of a test patient without label and split, which pretraining reads."""
    one = next(row for row in table if row["group"] == "test-blue-0")
    data = new_index([*table, {**one, "path": "test-blue-0-9.png", "label": "", "split": ""}]).root
    out = tmp_path / "out"
    assert main(["knn", "--backbone", str(export_folder), "--data", str(data), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "1 groups (patients, lesions) are in more than one split, or were read in pretraining" in said
    assert not out.exists()


def test_another_backbones_result_is_not_overwritten(evaluate, export_folder, index, tmp_path, capsys):
    evaluate("knn")
    evaluate("knn")  # the same again: replaced
    arguments = ["knn", "--backbone", "histogram", "--data", str(index.root), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert f"holds the result of {export_folder}" in capsys.readouterr().err
    assert evaluate("knn", "--overwrite", backbone="histogram").about["backbone"]["name"] == "histogram"


def test_a_result_at_another_size_is_not_overwritten(evaluate, export_folder, index, tmp_path, capsys):
    evaluate("knn")
    arguments = ["knn", "--backbone", str(export_folder), "--data", str(index.root), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--size", "40"]) == 2
    assert f"holds the result of {export_folder} at 32 px with 100% of the labels" in capsys.readouterr().err


def test_several_labels_an_image_are_refused_by_name(new_index, table, tmp_path, capsys):
    many = [{**row, "label": "blue|red"} if i == 0 else row for i, row in enumerate(table)]
    data = new_index(many)
    if len(data.read(0).labels) == 1 and not any(len(data.read(i).labels) > 1 for i in range(len(data))):
        pytest.fail("the table's several labels did not arrive; write them as shards.build wants them")
    assert main(["knn", "--backbone", "histogram", "--data", str(data.root), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "1 images have several labels" in error
    assert "--multi-label" in error


def test_results_json_holds_no_nan(evaluate):
    path = evaluate("knn").path

    def refuse(word):
        raise AssertionError(word)

    json.loads(path.read_text(), parse_constant=refuse)
