"""A bundle with a shortlist: what it says of it, what is refused, and the commands that make and measure one."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.bundle import Shortlisting, export_bundle
from export.manifest import SHORTLIST_ANSWERS, SHORTLIST_VALUES, BundleError, check_files, read_manifest
from export.runtime import OnnxStepModel
from export.shortlist import check_size
from export.verify import TOLERANCES, VerificationError
from export.verify_shortlist import AmongCandidates
from model.errors import ConfigError, DataError
from model.torch_steps import TorchStepModel
from tests.export.case import ask, case_of
from tests.export.shortlisting import SIZE, Shortlisted, training_pairs
from tests.export.test_bundle import double_a_weight
from tests.export.test_commands import figures, run
from tests.export.test_manifest import Values, rewrite
from tests.export.test_shortlist import POSITIONS, in_order, restricted
from tests.export.toy import PAIRS, Toy, retrace


def test_the_bundle_says_what_it_has(shortlisted: Shortlisted, tied: Toy) -> None:
    manifest = read_manifest(shortlisted.toy.bundle)
    assert manifest == shortlisted.toy.manifest
    check_files(shortlisted.toy.bundle, manifest)
    for precision, graphs in manifest.graphs.items():
        assert graphs.shortlist is not None
        assert graphs.shortlist.size == SIZE
        found = manifest.provenance.parity[precision]
        assert 0 <= found[SHORTLIST_ANSWERS] <= found["answers"] == len(PAIRS)
        assert found[SHORTLIST_VALUES] <= TOLERANCES[precision].get("log_probabilities", np.inf)
        for name in ("shortlist", "decoder_shortlist", "greedy_shortlist"):
            onnx.checker.check_model(str(shortlisted.toy.bundle / precision / f"{name}.onnx"), full_check=True)
    assert all(graphs.shortlist is None for graphs in tied.manifest.graphs.values())


def moved(values: Values) -> None:
    """The graph that finds candidates lies elsewhere."""
    values["graphs"]["fp32"]["shortlist"]["candidates"]["file"] = "../x"


WRONG: dict[str, tuple[Callable[[Values], object], str]] = {
    "path up": (moved, r"'\.\./x' points out of the bundle"),
    "no checksum": (lambda v: v["files"].pop("fp32/greedy_shortlist.onnx"), "no checksum for fp32/greedy_shortlist.on"),
    "missing graph": (
        lambda v: v["graphs"]["int8"]["shortlist"].pop("decoder"),
        r"graphs\.int8\.shortlist\.decoder: Field required",
    ),
    "another size": (
        lambda v: v["graphs"]["fp32"]["shortlist"].update(size=19),
        r"candidate_ids has the axes \('batch', 20\), a shortlist of 19 needs that many",
    ),
    "none": (
        lambda v: v["graphs"]["fp32"]["shortlist"].update(size=0),
        r"shortlist\.size: .*greater than or equal to 1",
    ),
    "more than there are": (lambda v: v.update(target_vocabulary=10), "a shortlist of 20 from a vocabulary of 10"),
}
"""What is wrong, how it comes to be, and what is said of it."""


@pytest.mark.parametrize("shortlisted", ["untied"], indirect=True)
@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_that_contradicts_itself_is_refused(shortlisted: Shortlisted, what: str, tmp_path: Path) -> None:
    shutil.copy(shortlisted.toy.bundle / "bundle.json", tmp_path)
    change, message = WRONG[what]
    rewrite(tmp_path, change)
    with pytest.raises(BundleError, match=rf"bundle\.json: .*{message}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("shortlisted", ["untied"], indirect=True)
def test_graphs_of_another_size_than_the_manifest_says_are_refused(shortlisted: Shortlisted, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(shortlisted.toy.bundle, tmp_path / "bundle"))

    def narrow(values: Values) -> None:
        shortlist = values["graphs"]["fp32"]["shortlist"]
        shortlist["size"] = 19
        for spec in shortlist["candidates"]["outputs"]:
            spec["axes"][1] = 19

    rewrite(bundle, narrow)
    manifest = read_manifest(bundle)
    exact = OnnxStepModel(bundle, manifest, "fp32")
    with pytest.raises(
        BundleError, match=r"fp32/shortlist\.onnx: memory\.candidate_\w+ is .*20.*, the manifest says .*19"
    ):
        OnnxStepModel(bundle, manifest, "fp32", shortlist_of=exact)


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, ...]:
    """Options that point a toy at some pairs."""
    lines = (f"{pair.source}\t{pair.target}\n" for pair in training_pairs())
    (tmp_path / "pairs.tsv").write_text("".join(lines), encoding="utf-8")
    values = ("data.kind=pairs", *(f"data.{part}.tsv={tmp_path / 'pairs.tsv'}" for part in ("train", "validation")))
    return tuple(word for value in values for word in ("--set", value))


@pytest.mark.parametrize("shortlisted", ["untied"], indirect=True)
def test_the_command_adds_it_and_says_what_it_changes(
    shortlisted: Shortlisted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: tuple[str, ...]
) -> None:
    retrace(shortlisted.toy, monkeypatch)
    bundle, options = tmp_path / "bundle", ("--shortlist", str(SIZE), "--validation-pairs", "9", *data)
    told = run("export", shortlisted.toy.checkpoint, bundle, *options)
    parity = read_manifest(bundle).provenance.parity
    kept = [f"{parity[precision][SHORTLIST_ANSWERS]:.0f} of 9" for precision in ("fp32", "int8")]
    assert re.search(rf"shortlist: as without\W+{kept[0]}\W+{kept[1]}\W", told)
    exact, short = (figures(bundle, *more, *data, "--limit", "9") for more in ((), ("--shortlist",)))
    assert (exact["shortlist"], short["shortlist"]) == (False, True)
    assert run("evaluate", bundle, *data, "--shortlist", "--limit", "9").endswith("(9 sources; beam 1, shortlist)\n")


def test_a_checkpoint_is_searched_exactly(untied: Toy) -> None:
    with pytest.raises(
        ConfigError, match=r"^--shortlist: \S+ is no bundle; a checkpoint is searched exactly, by PyTorch$"
    ):
        run("evaluate", untied.checkpoint, "--shortlist")


def test_without_training_data_there_is_no_shortlist(untied: Toy, tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("a\tb\n", encoding="utf-8")
    options = ("--set", "data.kind=pairs", "--set", f"data.validation.tsv={tmp_path / 'pairs.tsv'}")
    nowhere = ("--set", f"data.train.tsv={tmp_path / 'nowhere.tsv'}")
    with pytest.raises(
        DataError, match=r"nowhere\.tsv: no such file; a shortlist is learnt from training data: name others"
    ):
        run("export", untied.checkpoint, tmp_path / "bundle", "--shortlist", str(SIZE), *options, *nowhere)


@pytest.mark.parametrize(("size", "vocabulary"), [(7, 100), (0, 100), (-1, 100), (99, 100), (100, 100), (11, 12)])
def test_a_size_that_cannot_be_is_refused(size: int, vocabulary: int) -> None:
    with pytest.raises(BundleError) as caught:
        check_size(size, vocabulary)
    assert str(caught.value) == (
        f"a shortlist of {size} candidates: choose from 8 to {vocabulary - 2}, all that can be written with a target "
        f"vocabulary of {vocabulary}"
    )


def test_sizes_that_can_be() -> None:
    check_size(8, 10)
    check_size(98, 100)
    with pytest.raises(BundleError, match=r"^a target vocabulary of 9 is too small for a shortlist: export without"):
        check_size(8, 9)


def test_a_refused_export_writes_nothing(untied: Toy, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a shortlist of 500 candidates"):
        export_bundle(untied.checkpoint, tmp_path / "new", PAIRS, shortlist=Shortlisting(500, training_pairs()))
    with pytest.raises(DataError, match="a shortlist is learnt from training pairs, and there are none"):
        export_bundle(untied.checkpoint, tmp_path / "new", PAIRS, shortlist=Shortlisting(SIZE, []))
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_differs_from_the_network_is_not_written(
    shortlisted: Shortlisted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrace(shortlisted.toy, monkeypatch, double_a_weight, only="ShortlistDecoderGraph")
    with pytest.raises(
        VerificationError, match=r"^the shortlist differs from the checkpoint: fp32 log_probabilities by \S+, the limit"
    ):
        export_bundle(
            shortlisted.toy.checkpoint, tmp_path / "new", PAIRS, shortlist=Shortlisting(SIZE, training_pairs())
        )
    assert list(tmp_path.iterdir()) == []


def test_pytorch_is_asked_for_the_whole_vocabulary(shortlisted: Shortlisted) -> None:
    """The reference of the verification says what PyTorch says: candidates are all that the graphs have a say in."""
    case, short = case_of(shortlisted.toy), shortlisted.short()
    reference = AmongCandidates(TorchStepModel(case.network), short)
    memory = reference.encode(case.source_ids, case.source_mask)
    step = ask(reference, memory, case.target_ids, POSITIONS)
    np.testing.assert_allclose(np.exp(step.top_log_probabilities).sum(-1), 1, atol=1e-5)
    whole = ask(case.torch, case.torch.encode(case.source_ids, case.source_mask), case.target_ids, POSITIONS)
    ids = np.sort(memory.tensors[-1])
    expected = restricted(in_order(whole.top_log_probabilities, whole.top_ids), ids)
    np.testing.assert_allclose(in_order(step.top_log_probabilities, step.top_ids), expected, rtol=0, atol=1e-5)
