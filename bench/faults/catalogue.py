"""The forty-two faults: those that are put to all three servers, and why the others are not."""

from collections.abc import Mapping, Sequence

from bench.faults import connections, failing, queueing, reloading, requests, securing, stopping, transport
from bench.faults.case import Fault

FAULTS: Sequence[Fault] = sorted(
    (
        *requests.FAULTS,
        *transport.FAULTS,
        *connections.FAULTS,
        *queueing.FAULTS,
        *failing.FAULTS,
        *stopping.FAULTS,
        *reloading.FAULTS,
        *securing.FAULTS,
    ),
    key=lambda fault: fault.number,
)

ELSEWHERE: Mapping[str, Sequence[int]] = {
    "the protocol has no such request, or leaves it to the model": (1, 2, 6, 7, 8, 13, 14, 17),
    "not a moment but a load, which `make bench-load`, `make overload` and `make soak` are for": (23, 42),
    "it takes a hook inside the runtime": (33,),
}
"""Numbers of the faults that are not put to others, by the reason."""
