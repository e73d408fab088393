"""The model card: valid metadata, figures of these very weights with their intervals, and nothing that breaks out."""

from __future__ import annotations

import copy
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from finetune import backbones
from hybridssl import run
from hybridssl.__main__ import main
from hybridssl.errors import UserError
from hybridssl.export import export
from hybridssl.stated import Stated
from hybridssl.weights import weights_sha256
from tests.hybridssl.exports import NASTY, make_run

RESULT = {
    "format": "hybridssl-results",
    "version": 1,
    "protocol": "knn",
    "backbone": {"name": "models/derm-s", "sha256": "", "baseline": False, "dim": 32, "input_size": 32},
    "data": {
        "index": "/home/somebody/ward-7/derm",
        "sha256": "ab",
        "synthetic": False,
        "source": None,
        "labels": 0.1,
        "splits": {"train": 100, "val": 10, "test": 1990},
        "groups": {"train": 90, "val": 9, "test": 1495},
        "group_column": "group",
        "classes": {"test": {"mel": 1990}},
    },
    "metrics": {
        "accuracy": {"value": 0.7, "low": 0.65, "high": 0.75},
        "balanced_accuracy": {"value": 0.41234, "low": 0.377, "high": 0.455},
        "recall mel": {"value": None, "low": None, "high": None},
    },
    "selected": {"split": "val", "by": "balanced_accuracy", "choices": [{}]},
    "seeds": [0],
    "cost": {"seconds": 1.0, "labels_used": {}},
    "leaks": {"pretraining": 0, "groups": 0, "images": 0, "allowed": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("trained") / "run")


def result_of(folder, **changes) -> dict:
    found = copy.deepcopy(RESULT)
    found["backbone"]["sha256"] = weights_sha256(run.load_backbone(folder)[0].model.state_dict())
    return found | changes


def head_and_body(text: str) -> tuple[dict, str]:
    """As the hub reads a card: metadata between two lines of dashes."""
    _, head, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head), re.sub(r"^(`{3,})\w+\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)


def test_evaluation_and_export_agree_on_what_a_backbone_is(trained, tmp_path):
    export(trained, tmp_path / "out")
    expected = result_of(trained)["backbone"]["sha256"]
    assert backbones.load(str(trained)).sha256 == backbones.load(str(tmp_path / "out")).sha256 == expected


def test_card_shows_figures_with_intervals_for_readers_and_for_the_hub(trained, tmp_path, capsys):
    folder = tmp_path / "results/knn"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(result_of(trained)))
    other = tmp_path / "results/random"
    other.mkdir()
    drift = result_of(trained, protocol="drift", data=RESULT["data"] | {"splits": {"new": 9}})
    (folder / "drift").mkdir()
    (folder / "drift/results.json").write_text(json.dumps(drift))
    (other / "results.json").write_text(json.dumps(RESULT | {"protocol": "another's"}))
    said = ["--license", "CC-BY-NC-4.0", "--dataset", "marmal88/ham", "--tag", "dermatology", "--tag", "timm"]
    said += ["--data-license", "HAM10000: CC BY-NC 4.0", "--results", str(tmp_path / "results")]
    assert main(["export", str(trained), "--out", str(tmp_path / "out"), *said]) == 0
    assert "evaluations of this backbone in the model card: 1" in capsys.readouterr().out
    text = (tmp_path / "out/README.md").read_text()
    assert "| knn | derm, 1,990 images, 1,495 groups | 10% | balanced&#95;accuracy | 0.412 [0.377, 0.455] |" in text
    assert text.index("balanced&#95;accuracy") < text.index("| accuracy |")  # what was selected by comes first
    assert "HAM10000&#58; CC BY-NC 4.0" in text
    assert "another" not in text
    assert "drift" not in text  # it judges the images
    assert "recall" not in text  # could not be computed
    assert not re.search("somebody|ward-7", text)

    data = ModelCard.load(tmp_path / "out/README.md").data  # huggingface_hub's own reader
    assert (data.license, data.library_name, data.datasets) == ("cc-by-nc-4.0", "timm", ["marmal88/ham"])
    assert "dermatology" in data.tags
    assert data.tags.count("timm") == 1
    assert data.metrics == ["balanced_accuracy", "accuracy"]
    (score, _) = data.eval_results
    assert score.metric_name == "balanced_accuracy (knn, 10% of the labels)"
    assert (score.metric_value, score.metric_args, score.dataset_name) == (
        0.4123,
        {"low": 0.377, "high": 0.455},
        "derm",
    )


def test_results_of_other_weights_are_refused(trained, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(RESULT | {"backbone": RESULT["backbone"] | {"sha256": "feed"}}))
    command = ["export", str(trained), "--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert "holds results of models/derm-s: other weights than these" in printed
    assert not (tmp_path / "out").exists()
    (tmp_path / "results.json").write_text(json.dumps(result_of(trained)))
    assert main([*command, "--which", "student"]) == 2  # the teacher was judged
    assert main(command) == 0


def test_leaks_and_synthetic_images_are_said(trained, tmp_path):
    leaks = {"pretraining": 3, "groups": 0, "images": 1, "allowed": True}
    found = result_of(trained, leaks=leaks, data=RESULT["data"] | {"synthetic": True, "group_column": None})
    export(trained, tmp_path / "out", stated=Stated(results={"x": [found]}))
    text = (tmp_path / "out/README.md").read_text()
    assert (
        "knn on derm (synthetic), 1,990 images leaks:** 3 judged images were read in pretraining, 1 identical" in text
    )
    export(trained, tmp_path / "bare")
    assert "None is stated here" in (tmp_path / "bare/README.md").read_text()


def test_nothing_that_is_stated_breaks_the_card(trained, tmp_path):
    metrics = {NASTY: {"value": 0.5, "low": 0.4, "high": 0.6}}
    found = result_of(trained, protocol=NASTY, metrics=metrics, data=RESULT["data"] | {"index": f"/x/{NASTY}"})
    stated = Stated(NASTY, (), (NASTY,), (NASTY, "key: [value"), {"x": [found]})
    export(trained, tmp_path / "out", stated=stated)
    text = (tmp_path / "out/README.md").read_text()
    head, prose = head_and_body(text)
    assert (head["license"], head["library_name"]) == ("other", "timm")
    assert re.fullmatch(r"[a-z0-9.-]+", head["license_name"])
    assert "key: [value" in head["tags"]
    assert prose.lstrip().startswith("# out\n")  # the metadata ended where it should
    assert not re.search("<[a-z/]", prose)
    assert not re.search(r"^(# head|---)", prose, re.MULTILINE)
    tables = re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1  # no data opened another cell


@pytest.mark.parametrize("name", ["my data", "a/b/c", "x\n", "<b>"])
def test_a_dataset_that_is_no_hub_id_is_refused(name):
    with pytest.raises(UserError, match="is no hub id"):
        Stated(datasets=(name,))
