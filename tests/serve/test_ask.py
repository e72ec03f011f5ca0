import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from matplotlib.image import imread
from rich.cells import cell_len
from typer.testing import Result

from model.errors import InvalidRequestError
from serve.client import Client, ServerError
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.show import alignment
from tests.serve import asking
from tests.serve.fake_server import FakeService, cross_weights, running

Ask = Callable[..., Result]

ALIGNED = """\
F OW1 N
score -0.375  log-probability -1.500  g2p 3

tokens     F 0.00  OW1 -0.25  N -0.50  </s> -0.75
alignment  p→F  h→OW1  n→N

Cross-attention, layer 1, head 2

     p  h  o  n  e  </s>
   F ██                   ← p 90%
 OW1    ██                ← h 90%
   N          ██          ← n 90%
</s>             ██       ← e 90%

0%    ░░ ▒▒ ▓▓ ██  90%
"""


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def address(service: FakeService) -> Iterator[str]:
    with running(service) as address:
        yield address


@pytest.fixture
def run(address: str) -> Ask:
    """Runs `ask`; fails on any error that is not a refusal of the options."""

    def run(*arguments: str, address: str = address) -> Result:
        return asking.run(*arguments, "--address", address)

    return run


def asked(service: FakeService) -> Any:
    """The last request."""
    return service.requests[-1]


def test_prints_the_answer_and_where_it_came_from(run: Ask, service: FakeService) -> None:
    assert run("phone").stdout == ALIGNED
    assert asked(service).search == pb.SearchOptions()
    assert asked(service).attention.families == [pb.ATTENTION_FAMILY_CROSS]
    assert (asked(service).attention.layers, asked(service).attention.heads) == ([1], [2])


def test_a_stream_prints_the_same(run: Ask, service: FakeService) -> None:
    assert run("phone", "--stream").stdout == ALIGNED
    assert isinstance(asked(service), pb.GenerateStreamRequest)


def test_all_heads_are_shown_where_none_is_known_to_align(run: Ask, service: FakeService) -> None:
    service.aligned = False
    assert "Cross-attention, mean of 2 layers, mean of 3 heads" in run("phone").stdout
    assert not asked(service).attention.layers


def test_layers_and_heads_can_be_chosen(run: Ask, service: FakeService) -> None:
    output = run("phone", "--head", "0", "--head", "2", "--reduce", "max").stdout
    assert "Cross-attention, max of 2 layers, max of 2 heads" in output
    assert asked(service).attention.heads == [0, 2]
    assert not asked(service).attention.layers


@pytest.mark.parametrize(("family", "title"), [("encoder", "Encoder self-att"), ("decoder", "Decoder self-att")])
def test_other_families_are_drawn_but_align_nothing(run: Ask, family: str, title: str) -> None:
    output = run("phone", "-f", family).stdout
    assert f"{title}ention, mean of 2 layers, mean of 3 heads" in output
    assert "alignment" not in output


def test_without_the_heat_map_the_alignment_stays(run: Ask, service: FakeService) -> None:
    assert run("phone", "--no-heat-map").stdout == ALIGNED[: ALIGNED.index("\nCross")]
    run("phone", "--no-heat-map", "-f", "decoder")
    assert not asked(service).attention.families


def test_several_hypotheses_are_listed(run: Ask, service: FakeService) -> None:
    output = run("phone", "--n-best", "2").stdout
    assert asked(service).search == pb.SearchOptions(beam_size=2, hypotheses=2)
    assert output.splitlines()[3:5] == ["n-best     -0.375  F OW1 N", "           -0.750  F OW1 N Z  cut off"]
    run("phone", "-n", "2", "-b", "4", "--length-penalty", "0", "--longest", "9")
    assert asked(service).search == pb.SearchOptions(beam_size=4, hypotheses=2, length_penalty=0, longest=9)


def test_a_target_is_scored(run: Ask, service: FakeService) -> None:
    output = run("phone", "--target", "F OW2 N", "--length-penalty", "0.5").stdout
    assert output.startswith("F OW2 N\nscore -0.375")
    assert "p→F  h→OW2  n→N" in output
    assert isinstance(asked(service), pb.ScoreRequest)
    assert (asked(service).target, asked(service).length_penalty) == ("F OW2 N", 0.5)


def test_several_texts_are_kept_apart(run: Ask) -> None:
    lines = run("phone", "phono\ngraph", "--no-heat-map").stdout.splitlines()
    assert lines[0] == "phone " + "─" * 74
    assert lines[6:8] == ["", "phono graph " + "─" * 68]
    assert lines.count("F OW1 N") == 2


def test_nothing_is_wider_than_the_terminal_but_texts(run: Ask) -> None:
    words = " ".join(f"W{index}" for index in range(60))
    lines = run("a" * 50, "--target", words).stdout.splitlines()
    assert lines[0] == words
    assert max(map(cell_len, lines[1:])) <= 80
    assert not any(line.endswith(" ") for line in lines)
    assert sum("W30 -7.50" in line for line in lines) == 1


def test_json_holds_everything(run: Ask, service: FakeService) -> None:
    lines = run("phone", "téléphone", "--json", "-n", "2").stdout.splitlines()
    assert len(lines) == 2
    result = json.loads(lines[0])
    assert json.loads(lines[1])["source"] == "téléphone"
    assert (result["source"], result["answer"], result["model"]) == (
        "phone",
        "F OW1 N",
        {"name": "g2p", "version": "3"},
    )
    assert result["source_tokens"][0] == {"id": 4, "text": "p", "start": 0, "end": 1}
    best, second = result["hypotheses"]
    assert best["tokens"][1] == {"id": 5, "text": "OW1", "start": 2, "end": 5, "log_probability": -0.25}
    assert (best["score"], best["log_probability"], best["finish_reason"]) == (-0.375, -1.5, "stop")
    cross = best["attention"]["cross"]
    assert (cross["layers"], cross["heads"], cross["reduction"]) == ([0, 1], [0, 1, 2], "none")
    assert (cross["rows"], cross["columns"]) == (["F", "OW1", "N", "</s>"], [*"phone", "</s>"])
    np.testing.assert_allclose(cross["weights"], cross_weights(4, 6), rtol=0, atol=1e-6)
    assert np.shape(second["attention"]["cross"]["weights"]) == (2, 3, 5, 6)
    assert not asked(service).attention.layers


def test_json_holds_reduced_attention_if_asked(run: Ask) -> None:
    result = json.loads(run("phone", "--json", "--layer", "1", "--reduce", "max").stdout)
    cross = result["hypotheses"][0]["attention"]["cross"]
    assert (cross["layers"], cross["heads"], cross["reduction"]) == ([1], [0, 1, 2], "max")
    np.testing.assert_allclose(cross["weights"], cross_weights(4, 6)[1].max(0), rtol=0, atol=1e-6)


def test_json_holds_the_encoders_attention_once(run: Ask) -> None:
    result = json.loads(run("phone", "--json", "-f", "encoder", "-n", "2").stdout)
    assert np.shape(result["attention"]["encoder"]["weights"]) == (2, 3, 6, 6)
    assert not any("attention" in hypothesis for hypothesis in result["hypotheses"])


def test_json_without_attention_asks_for_none(run: Ask, service: FakeService) -> None:
    assert "attention" not in run("phone", "--json", "--no-heat-map").stdout
    assert not asked(service).attention.families


def test_draws_what_is_shown(run: Ask, tmp_path: Path) -> None:
    path = tmp_path / "phone.png"
    result = run("phone", "--plot", str(path))
    assert result.stdout == ALIGNED
    assert result.stderr == f"wrote {path}\n"
    assert imread(path).shape[2] == 4


def test_a_page_holds_all_attention_while_the_terminal_shows_its_part(
    run: Ask, service: FakeService, tmp_path: Path
) -> None:
    path = tmp_path / "phone.html"
    assert run("phone", "--plot", str(path)).stdout == ALIGNED
    assert (len(asked(service).attention.families), len(asked(service).attention.layers)) == (3, 0)
    page = path.read_text(encoding="utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [picture["family"] for picture in data["pictures"]] == ["cross", "encoder", "decoder"]
    assert all((picture["layers"], picture["heads"]) == ([0, 1], [0, 1, 2]) for picture in data["pictures"])
    assert "<dd>g2p 3</dd>" in page


def test_each_text_has_its_own_file(run: Ask, tmp_path: Path) -> None:
    result = run("phone", "photo", "--json", "--no-heat-map", "--plot", str(tmp_path / "a.b.html"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b-1.html", "a.b-2.html"]
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "a.pdf"], "'--plot': a.pdf: the suffix says what is drawn: .png or .html"),
        (["--plot", "no/a.png"], "'--plot': no/a.png: there is no folder no: create it first"),
        (["--stream", "--json"], "--stream: has no effect with --json: leave one of them out"),
        (["--stream", "--target", "F"], "--stream: has no effect with --target: leave one of them out"),
        (["--longest", "0", "--target", "F"], "--longest: has no effect with --target: leave one of them out"),
        (["--attention", "self"], "'self' is not one of 'encoder', 'decoder', 'cross'"),
    ],
)
def test_options_without_effect_are_refused(run: Ask, service: FakeService, arguments: list[str], message: str) -> None:
    result = run("phone", *arguments)
    assert result.exit_code == 2
    assert message in asking.said(result)
    assert not service.requests


def test_errors_of_the_server_go_through(run: Ask) -> None:
    with pytest.raises(ServerError, match="source: says the server") as caught:
        run("!INVALID_ARGUMENT")
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_a_layer_that_a_page_does_not_have_is_refused(run: Ask, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"attention.layers: 7 does not exist: there are 0, 1"):
        run("phone", "--layer", "7", "--plot", str(tmp_path / "a.html"))


def test_without_a_server_it_says_how_to_start_one(run: Ask) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(ServerError, match="no Limelight server answers there: start one with `limelight serve"):
            run("phone", address=f"127.0.0.1:{silent.getsockname()[1]}")


def test_the_address_may_be_in_the_environment(address: str) -> None:
    assert asking.invoke("phone", LIMELIGHT_ADDRESS=address).stdout == ALIGNED


def test_a_failing_stream_ends_its_line(address: str) -> None:
    result = asking.invoke("!INTERNAL", "--stream", "-a", address)
    assert isinstance(result.exception, ServerError)
    assert result.stdout == "F OW1\n"


def test_alignment_is_read_from_the_texts(address: str) -> None:
    with Client(address) as client:
        scored = client.score("ab", "X Y Z")
    weights = np.array([[0.1, 0.8, 0.1], [0.2, 0.7, 0.1], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert alignment("ab", scored, weights) == [("b", "X Y"), ("</s>", "Z")]


def test_control_characters_do_not_reach_the_terminal(run: Ask) -> None:
    output = run("p\x1bone", "--target", "\x1b[31mF OW1").stdout
    assert output.startswith("␛[31mF OW1\n")
    assert "p→␛[31mF" in output
    assert "\x1b" not in output
