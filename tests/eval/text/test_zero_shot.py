"""Zero-shot classification and retrieval from the command line, against computations of their own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import recall_score, top_k_accuracy_score
from torch import Tensor

from dinov3.data import make_classification_eval_transform, make_dataset
from dinov3.eval.report import collect, format_table
from dinov3.eval.text import zero_shot
from dinov3.eval.text.config import ZERO_SHOT_RESULTS_FILENAME, TextModelConfig
from dinov3.eval.text.model import TextModel, load_text_model
from dinov3.eval.text.prompts import imagenet_class_names, read_class_names
from dinov3.eval.text.retrieval import recalls
from dinov3.eval.text.zero_shot import score_zero_shot
from tests.eval.text.scenes import write_captions, write_folder
from tests.hub.small_dinotxt import make_published_dinotxt_small, write_dinotxt

TEMPLATES = ("a photo of {}.", "my {}")


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    make_published_dinotxt_small(monkeypatch)
    (tmp_path / "templates.txt").write_text("".join(f"{line}\n" for line in TEMPLATES))
    return write_dinotxt(tmp_path)


@pytest.fixture
def run(weights: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the command on a data set; returns the row of the results file, and the JSON file beside it."""

    def run_on(dataset: str, *more: str) -> dict[str, Any]:
        arguments = (
            f"model.weights={weights['head']}",
            f"model.backbone_weights={weights['backbone']}",
            f"prompts.templates={tmp_path / 'templates.txt'}",
            f"eval.test_dataset={dataset}",
            "eval.num_workers=0",
            "eval.batch_size=4",
            "transform.resize_size=32",
            "transform.crop_size=32",
            f"features.cache_dir={tmp_path / 'features'}",
            f"output_dir={tmp_path / 'out'}",
        )
        assert zero_shot.main([*arguments, *more]) == 0
        path = tmp_path / "out" / ZERO_SHOT_RESULTS_FILENAME
        (row,) = csv.DictReader(path.open())
        return {
            "row": {name: float(value) for name, value in row.items()},
            **json.loads(path.with_suffix(".json").read_text()),
        }

    return run_on


def load(weights: dict[str, Any]) -> TextModel:
    return load_text_model(TextModelConfig(str(weights["head"]), str(weights["backbone"])))


@torch.no_grad()
def encode(model: TextModel, dataset: Any) -> tuple[Tensor, list[Any]]:
    samples = [dataset[index] for index in range(len(dataset))]
    return torch.cat([model.model.encode_image(image[None]) for image, _ in samples]), [target for _, target in samples]


@torch.no_grad()
def test_accuracies_are_those_of_the_definition(
    run: Callable[..., dict[str, Any]], weights: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"ImageFolder:root={write_folder(tmp_path / 'photos')}"
    results = run(folder)
    model = load(weights)
    dataset = make_dataset(
        dataset_str=folder, transform=make_classification_eval_transform(resize_size=32, crop_size=32)
    )
    features, targets = encode(model, dataset)
    classes = []
    for name in ("blue", "green grass", "red"):  # the folders, in alphabetical order
        texts = model.tokenizer.tokenize([template.format(name) for template in TEMPLATES])
        classes.append(F.normalize(model.model.encode_text(texts), dim=-1).mean(dim=0))
    logits = 100 * F.normalize(features, dim=-1) @ F.normalize(torch.stack(classes), dim=-1).mT
    hits = logits.argmax(dim=1) == torch.tensor(targets)
    assert results["row"]["top-1"] == pytest.approx(100 * float(hits.float().mean()))
    expected = [
        {"class": name, "images": 3, "top-1": round(100 * float(hits[[t == place for t in targets]].float().mean()), 2)}
        for place, name in enumerate(("blue", "green grass", "red"))
    ]
    assert results["per_class"] == expected and results["datasets"]["templates"] == 2
    assert results["row"]["top-1 mean over classes"] == pytest.approx(results["row"]["top-1"])  # classes of one size
    assert "zero-shot classification of 9 images, 3 classes, 2 sentences" in capsys.readouterr().out
    table = format_table(collect([tmp_path / "out"]))
    assert f"| {results['row']['top-1']:.2f}" in table.replace("**", "") and "zero-shot" in table


def test_images_are_encoded_once_for_other_sentences(
    run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"ImageFolder:root={write_folder(tmp_path / 'photos')}"
    run(folder)
    assert "images: read from" not in capsys.readouterr().out
    assert run(folder, "prompts.templates=imagenet")["datasets"]["templates"] == 80
    assert "images: read from" in capsys.readouterr().out


def test_scores_of_unequal_classes_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(50, 8, generator=generator), dim=-1)
    classes = F.normalize(torch.randn(7, 8, generator=generator), dim=-1)
    targets = torch.randint(0, 6, (50,), generator=generator)  # the last class has no images
    names = [*"aabcdef"]  # two classes of one name stay two
    metrics, per_class = score_zero_shot(features, targets, classes, names)
    scores = (features @ classes.mT).numpy()
    for k in (1, 5):
        expected = 100 * top_k_accuracy_score(targets, scores, k=k, labels=range(7))
        assert metrics[f"top-{k}"] == pytest.approx(expected)
    recalls_by_class = 100 * recall_score(targets, scores.argmax(axis=1), labels=range(6), average=None)
    assert metrics["top-1 mean over classes"] == pytest.approx(recalls_by_class.mean())
    assert [entry["top-1"] for entry in per_class] == [*map(pytest.approx, recalls_by_class.round(2)), None]
    assert [entry["class"] for entry in per_class] == names


@torch.no_grad()
def test_retrieval_with_several_captions_is_that_of_the_definition(
    run: Callable[..., dict[str, Any]], weights: dict[str, Any], tmp_path: Path
) -> None:
    captions = [[f"thing {number} {word}" for word in "abc"[: 1 + number % 3]] for number in range(12)]
    root = write_captions(tmp_path / "coco", captions)
    results = run(f"CocoCaptions:split=VAL:root={root}")
    model = load(weights)
    transform = make_classification_eval_transform(resize_size=32, crop_size=32)
    dataset = make_dataset(dataset_str=f"CocoCaptions:split=VAL:root={root}", transform=transform)
    images = F.normalize(encode(model, dataset)[0], dim=-1)
    pairs = [(owner, caption) for owner, own in enumerate(captions) for caption in own]
    texts = F.normalize(model.model.encode_text(model.tokenizer.tokenize([text for _, text in pairs])), dim=-1)
    cosines = images @ texts.mT
    for k in (1, 5, 10):
        found = [
            any(pairs[place][0] == image for place in row.topk(k).indices.tolist()) for image, row in enumerate(cosines)
        ]
        assert results["row"][f"image to text R@{k}"] == pytest.approx(100 * sum(found) / 12)
        found = [pairs[text][0] in row.topk(k).indices.tolist() for text, row in enumerate(cosines.mT)]
        assert results["row"][f"text to image R@{k}"] == pytest.approx(100 * sum(found) / len(pairs))
    assert results["datasets"]["test"]["captions"] == len(pairs)


def test_perfect_and_constant_features() -> None:
    images = torch.eye(20)
    owners = torch.arange(20).repeat_interleave(2)
    assert set(recalls(images, images[owners], owners).values()) == {100.0}
    assert set(recalls(torch.ones(20, 4), torch.ones(40, 4), owners).values()) == {0.0}


def test_names_that_do_not_fit_are_refused(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    folder = f"ImageFolder:root={write_folder(tmp_path / 'photos')}"
    with pytest.raises(ValueError, match=r"prompts.classes=imagenet has 1000 names \(tench, .*data set has 3 classes"):
        run(folder, "prompts.classes=imagenet")
    with pytest.raises(FileNotFoundError, match="prompts.classes=names.txt: expected dataset or imagenet, or a file"):
        run(folder, "prompts.classes=names.txt")
    for content, problem in (("", "is empty"), ("a\n\nb\n", "line 2 is empty"), ("a\nb\n", "has 2 names")):
        (tmp_path / "names.txt").write_text(content)
        with pytest.raises(ValueError, match=problem):
            run(folder, f"prompts.classes={tmp_path / 'names.txt'}")
    (tmp_path / "bad.txt").write_text("a photo\n")
    with pytest.raises(ValueError, match="template 'a photo' has no place for the class"):
        run(folder, f"prompts.templates={tmp_path / 'bad.txt'}")
    with pytest.raises(FileNotFoundError, match="model.vocabulary=v.gz: there is no such file"):
        run(folder, "model.vocabulary=v.gz")


def test_word_net_ids_are_not_names() -> None:
    class Folders:
        classes = ("n01440764", "n01443537")

    with pytest.raises(ValueError, match=r"are WordNet ids \(n01440764, n01443537\).* give prompts.classes=imagenet"):
        read_class_names("dataset", Folders(), 2)
    assert read_class_names("imagenet", Folders(), 1000) == imagenet_class_names()
    with pytest.raises(ValueError, match="list does not know the names of its classes: give prompts.classes=FILE"):
        read_class_names("dataset", [], None)


def test_texts_that_are_cut_are_counted(
    run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("a\nb\n" + "word " * 90 + "\n")
    folder = f"ImageFolder:root={write_folder(tmp_path / 'photos')}"
    run(folder, f"prompts.classes={tmp_path / 'names.txt'}")
    assert (
        "2 of 6 texts are longer than the model's 77 tokens and are cut, the first is 'a photo of word"
        in capsys.readouterr().out
    )
