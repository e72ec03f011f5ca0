"""The configuration: what is refused and in which words, what overrides do, and every file that we ship."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from model import config as sections
from model.config import CmudictData, PairsData, load_config, parse_config
from model.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("configs/*.toml"), *ROOT.glob("recipes/*/*.toml")])

DEFAULT = parse_config({}, "nothing")
FILES = {"train": {"tsv": "train.tsv"}, "validation": {"tsv": "dev.tsv"}}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown section": ({"modle": {}}, "modle: Extra inputs are not permitted"),
    "unknown key": ({"model": {"head": 4}}, "model.head: Extra inputs are not permitted (got 4)"),
    "wrong type": ({"model": {"heads": "four"}}, "model.heads: Input should be a valid integer"),
    "above the limit": ({"model": {"d_model": 8194}}, "model.d_model: Input should be less than or equal to 8192"),
    "dropout of everything": ({"model": {"dropout": 1.0}}, "model.dropout: Input should be less than 1 (got 1.0)"),
    "unknown choice": ({"model": {"norm": "mid"}}, "model.norm: Input should be 'pre' or 'post' (got 'mid')"),
    "heads": (
        {"model": {"d_model": 128, "heads": 3}},
        "model: d_model=128 is not divisible by heads=3: every head works in d_model / heads dimensions; choose "
        "another number of heads",
    ),
    "odd width": (
        {"model": {"d_model": 15, "heads": 5}},
        "model: d_model=15 is odd: sinusoidal positions come in pairs of sine and cosine",
    ),
    "pre-norm without an end": (
        {"model": {"norm": "pre", "final_norm": False}},
        "model: norm='pre' with final_norm=false leaves the output of the residual stream unnormalised: set "
        "final_norm=true or norm='post'",
    ),
    "one table, two vocabularies": (
        {"model": {"tied_embeddings": "all"}},
        "config: tied_embeddings='all' needs one vocabulary: set tokenizer.shared=true",
    ),
    "phoneme metric of text": (
        {"task": "text", "training": {"metric": "per"}},
        "config: training.metric='per' does not score task='text': use loss, bleu or chrf",
    ),
    "text metric of phonemes": (
        {"task": "g2p", "training": {"metric": "bleu"}},
        "config: training.metric='bleu' does not score task='g2p': use loss, wer or per",
    ),
    "shared and different": (
        {"tokenizer": {"shared": True, "source": {"kind": "bpe"}, "target": {"kind": "symbols"}}},
        "tokenizer: shared=true trains one tokenizer from [tokenizer.source]: remove [tokenizer.target]",
    ),
    "endless warm-up": (
        {"training": {"updates": 10, "warmup": 11}},
        "training: warmup=11 is longer than the whole training, updates=10",
    ),
    "beta of 1": ({"training": {"warmup": 1, "betas": [0.9, 1.0]}}, "training: betas=(0.9, 1.0) must lie in [0, 1)"),
    "name with a slash": ({"name": "a/b"}, "name: String should match pattern"),
    "kind of data": ({"data": {"kind": "csv"}}, "data: Input tag 'csv' found using 'kind' does not match"),
    "no files": ({"data": {"kind": "pairs"} | FILES | {"train": {}}}, "train: give either source and target, or tsv"),
    "both kinds of file": (
        {"data": {"kind": "pairs"} | FILES | {"train": {"tsv": "a", "source": "b", "target": "c"}}},
        "train: give either source and target, or tsv",
    ),
    "half a pair of files": (
        {"data": {"kind": "pairs"} | FILES | {"train": {"source": "b"}}},
        "train: give either source and target, or tsv",
    ),
    "target beside a table": (
        {"data": {"kind": "pairs"} | FILES | {"train": {"tsv": "a", "target": "c"}}},
        "train: give either source and target, or tsv",
    ),
    "negative column": (
        {"data": {"kind": "pairs"} | FILES | {"train": {"tsv": "a", "columns": [0, -1]}}},
        "train: columns=(0, -1) are counted from 0",
    ),
}
"""What is wrong, the values, and the words of the message."""

ALLOWED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "post-norm without an end": {"model": {"norm": "post", "final_norm": False}},
    "one table, one vocabulary": {"model": {"tied_embeddings": "all"}, "tokenizer": {"shared": True}},
    "phonemes by their error rate": {"task": "g2p", "training": {"metric": "per"}},
    "text by chrF": {"task": "text", "training": {"metric": "chrf"}},
    "anything by its loss": {"task": "g2p", "training": {"metric": "loss"}},
    "pairs of files": {"data": {"kind": "pairs"} | FILES | {"train": {"source": "b", "target": "c"}}},
    "shared and alike": {"tokenizer": {"shared": True, "source": {"kind": "bpe"}, "target": {"kind": "bpe"}}},
}


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_where_why_and_what_to_do(what: str) -> None:
    values, words = REFUSED[what]
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        parse_config(values, "run.toml")
    assert str(caught.value).startswith("run.toml: ")


@pytest.mark.parametrize("what", ALLOWED)
def test_what_is_allowed_survives_a_trip_through_json(what: str, tmp_path: Path) -> None:
    config = parse_config(ALLOWED[what], what)
    path = write(tmp_path, json.dumps(config.model_dump(mode="json")), "config.json")
    assert load_config(path) == config


def test_all_that_is_wrong_is_told_at_once() -> None:
    values = {"model": {"heads": 0, "width": 3}, "training": {"seed": -1}}
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "run.toml")
    findings = str(caught.value).removeprefix("run.toml: ").split("; ")
    assert [finding.partition(":")[0] for finding in findings] == ["model.heads", "model.width", "training.seed"]


def test_a_file_is_read_into_its_sections(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'name = "toy"\n[data]\nkind = "pairs"\ntrain.tsv = "a.tsv"\nvalidation = {source = "é", target = "t"}\n'
        "[model]\nd_model = 64\nheads = 8\n[training]\nbetas = [0.8, 0.9]\n",
    )
    config = load_config(path)
    assert (config.name, config.model.head_width, config.training.betas) == ("toy", 8, (0.8, 0.9))
    assert isinstance(config.data, PairsData)
    assert (config.data.train.tsv, config.data.validation.source) == (Path("a.tsv"), Path("é"))
    assert config.training.updates == DEFAULT.training.updates


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("training.updates=7000", "training.updates", 7000),
        ("training.learning_rate=1e-3", "training.learning_rate", 0.001),
        ("training.betas=[0.5, 0.6]", "training.betas", (0.5, 0.6)),
        ("model.norm=post", "model.norm", "post"),
        ('model.norm="post"', "model.norm", "post"),
        (" model.final_norm = true", "model.final_norm", True),
        ("tokenizer.source.kind=bpe", "tokenizer.source.kind", "bpe"),
        ("name=a-b", "name", "a-b"),
    ],
)
def test_overrides_replace_single_values(tmp_path: Path, override: str, key: str, expected: object) -> None:
    path = write(tmp_path, 'name = "toy"\n[model]\nnorm = "pre"\nheads = 2\n')
    before, after = load_config(path), load_config(path, [override])
    value: Any = after
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected
    assert (after.model.heads, after.tokenizer.target) == (2, before.tokenizer.target)


def test_the_last_override_wins(tmp_path: Path) -> None:
    overrides = ["training.seed=5", "training.seed=6", "training.keep=2"]
    training = load_config(write(tmp_path, ""), overrides).training
    assert (training.seed, training.keep) == (6, 2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.updates", "--set training.updates: write section.key=value, for example training.updates=2000"),
        ("training.updates=many", "training.updates: Input should be a valid integer"),
        ("training.update=5", "training.update: Extra inputs are not permitted (got 5)"),
        ("model.heads=3", "d_model=128 is not divisible by heads=3"),
        ("training.updates.most=3", "training.updates"),
        ("name.first=3", "name"),
    ],
)
def test_overrides_that_cannot_be_used_are_refused(tmp_path: Path, override: str, words: str) -> None:
    path = write(tmp_path, 'name = "toy"\n[training]\nupdates = 2000\n')
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(path, [override])


def test_a_missing_file_points_to_the_shipped_ones(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    words = f"{path}: no such configuration; the shipped ones are in configs/"
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.toml", b"name = "), ("run.json", b"{"), ("run.toml", b'name = "\xff"'), ("run.json", b"[1]")],
    ids=["toml", "json", "encoding", "a list"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: ")):
        load_config(path)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}: cannot be read")):
        load_config(tmp_path)


@pytest.mark.parametrize(("section", "key", "value"), [("model", "heads", 2), ("training", "seed", 3)])
def test_a_configuration_cannot_be_changed(section: str, key: str, value: int) -> None:
    part = getattr(DEFAULT, section)
    with pytest.raises(ValidationError, match="Instance is frozen"):
        setattr(part, key, value)
    assert getattr(part, key) != value


@pytest.mark.parametrize(
    "section",
    [x for x in vars(sections).values() if isinstance(x, type) and issubclass(x, BaseModel) and x.model_fields],
    ids=lambda section: section.__name__,
)
def test_every_field_has_its_docstring(section: type[BaseModel]) -> None:
    bare = [name for name, field in section.model_fields.items() if not (field.description or "").endswith(".")]
    assert bare == []
    assert section.model_config.get("extra") == "forbid"


def test_the_data_that_needs_no_folder_is_the_default() -> None:
    assert isinstance(DEFAULT.data, CmudictData)


def test_configurations_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert config.name != DEFAULT.name
