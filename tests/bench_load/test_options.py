"""Every server is started with the same limits."""

from pathlib import Path

import pytest

from bench.load.options import Precision, ServingOptions, read_peer, write_port
from bench.load.servers import Server, ServerName, share_processors
from serve.jobs import EngineLimits

OPTIONS = ServingOptions(precision=Precision.INT8, threads=2, rows=8, tokens=100, queue=5, beam=4, longest=12)


def test_a_peer_reads_what_it_is_started_with() -> None:
    peer = read_peer(["model", "folder", *OPTIONS.arguments()])
    assert (peer.model, peer.port_file, peer.options) == (Path("model"), Path("folder/port"), OPTIONS)


def test_the_limits_are_those_of_our_server() -> None:
    limits = EngineLimits()
    assert (ServingOptions().rows, ServingOptions().queue) == (limits.rows, limits.queue)


@pytest.mark.parametrize(
    ("sentences", "longest", "fits"), [(2, 12, True), (3, 1, False), (2, 13, False), (1, 25, True), (1, 26, False)]
)
def test_rows_and_tokens_bound_a_batch(sentences: int, longest: int, fits: bool) -> None:
    assert OPTIONS.fits(sentences, longest) is fits


@pytest.mark.parametrize("name", list(ServerName))
def test_limits_reach_every_server(name: ServerName, tmp_path: Path) -> None:
    command = Server(name=name, python=Path("python"), model=Path("model"), options=OPTIONS).command(tmp_path)
    assert {"--precision=int8", "--threads=2", "--rows=8", "--queue=5"} <= set(command)


def test_a_port_is_written_whole(tmp_path: Path) -> None:
    write_port(tmp_path / "port", 1234)
    assert [path.name for path in tmp_path.iterdir()] == ["port"]
    assert (tmp_path / "port").read_text(encoding="ascii") == "1234\n"


def test_processors_are_set_aside_where_there_are_enough() -> None:
    apart, together = share_processors(1), share_processors(10_000)
    assert apart.server
    assert apart.generator
    assert together.server == together.generator
