"""Many probes at once: what gets through, what does not, and what is lost on the way back, told apart."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator

import pytest

from hookline import lab, net
from hookline.lab import Family, Lab, LabError, Prober, Question
from hookline.model.names import Protocol
from tests.lab.conftest import document, pods
from tests.requirements import missing_program, need

PROTOCOLS: tuple[Protocol, ...] = ("tcp", "udp", "sctp")
FAMILIES: tuple[Family, ...] = (4, 6)


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """Two nodes with two pods each, and a machine outside; nobody serves."""
    name = unique_name()
    try:
        yield lab.up(
            [*pods(4), document("ExternalHost", "x", spec={"address": "203.0.113.7"})], name, serve=False
        )
    finally:
        lab.down(name)


@pytest.fixture
def prober(place: Lab) -> Iterator[Prober]:
    with Prober(place) as opened:
        yield opened


def everything(place: Lab, port: int = 80) -> list[Question]:
    """Everybody asks everybody, over everything."""
    names = [member.endpoint for member in place.members]
    return [
        Question(source, target, port, protocol, family)
        for source, target in itertools.product(names, names)
        for protocol in PROTOCOLS
        for family in FAMILIES
    ]


def filtered(place: Lab, endpoint: str, *rules: str) -> Iterator[None]:
    """nftables' rules in a member's network namespace, of the chains ``in`` and ``out``, until the test is over."""
    need("lab", missing_program("nft"))
    text = (
        "add table inet t\n"
        "add chain inet t in { type filter hook input priority 0; }\n"
        "add chain inet t out { type filter hook output priority 0; }\n"
        + "\n".join(f"add rule inet t {rule}" for rule in rules)
    )
    with net.inside(place.member(endpoint).netns):
        subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
    yield
    with net.inside(place.member(endpoint).netns):
        subprocess.run(["nft", "delete", "table", "inet", "t"], check=True)


@pytest.fixture
def deaf(place: Lab) -> Iterator[None]:
    """Nothing comes in at default/p1 on port 81 or 5000."""
    yield from filtered(
        place,
        "default/p1",
        "in tcp dport {81, 5000} drop",
        "in udp dport {81, 5000} drop",
        "in sctp dport {81, 5000} drop",
    )


@pytest.fixture
def mute(place: Lab) -> Iterator[None]:
    """Nothing goes out of default/p1 from port 82."""
    yield from filtered(
        place, "default/p1", "out tcp sport 82 drop", "out udp sport 82 drop", "out sctp sport 82 drop"
    )


def test_everybody_reaches_everybody(place: Lab, prober: Prober) -> None:
    questions = everything(place)
    heard = prober.ask(questions)
    assert len(heard) == 7 * 7 * 3 * 2
    assert {one.outcome for one in heard} == {"allow"}, [
        (q, h) for q, h in zip(questions, heard, strict=True) if h.outcome != "allow"
    ]


def test_no_program_runs_a_server_there(place: Lab) -> None:
    assert place.server_counts().members == {}


@pytest.mark.usefixtures("deaf")
def test_what_does_not_arrive_is_denied_and_the_rest_gets_through(place: Lab, prober: Prober) -> None:
    questions = [*everything(place, 81), *everything(place, 80), *everything(place, 5000)]
    for question, heard in zip(questions, prober.ask(questions), strict=True):
        denied = question.target == "default/p1" and question.port != 80
        # nftables stands behind the packet socket: of TCP it is seen that the opening packet came as far as that.
        expected = ("unanswered" if question.protocol == "tcp" else "deny") if denied else "allow"
        assert heard.outcome == expected, (question, heard)
        assert heard.reached == (expected != "deny")


@pytest.mark.usefixtures("mute")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_is_lost_is_no_denial(prober: Prober, protocol: Protocol, family: Family) -> None:
    (heard,) = prober.ask([Question("default/p0", "default/p1", 82, protocol, family)])
    assert (heard.outcome, heard.reached) == ("unanswered", True)


def test_a_port_that_nobody_can_be_asked_on(place: Lab, prober: Prober) -> None:
    with pytest.raises(LabError, match="has no default/nobody"):
        prober.ask([Question("default/p0", "default/nobody", 80, "tcp", 4)])


@pytest.fixture
def slow(place: Lab) -> Iterator[None]:
    """What goes out of default/p2 gets through a narrow pipe: two small packets at once, then one every second."""
    pipe = ["root", "tbf", "rate", "500bit", "burst", "130", "limit", "9000"]
    place.run("default/p2", ["tc", "qdisc", "add", "dev", "eth0", *pipe])
    yield
    place.run("default/p2", ["tc", "qdisc", "del", "dev", "eth0", "root"])


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(("protocol", "number", "patience_s"), [("tcp", 2, 3.0), ("udp", 3, 1.5)])
def test_what_arrives_late_is_noticed(
    prober: Prober, protocol: Protocol, number: int, patience_s: float
) -> None:
    heard = prober.ask([Question("default/p2", "default/p3", 90, protocol, 4)] * number)
    given_up = [one for one in heard if one.outcome == "deny"]
    assert given_up
    assert not any(one.reached for one in given_up)
    prober.settle(patience_s)
    assert all(one.late and one.reached for one in given_up)


def test_a_pod_that_is_made_again_is_asked_again(place: Lab, prober: Prober) -> None:
    question = Question("default/p0", "default/p3", 80, "tcp", 4)
    assert prober.ask([question])[0].outcome == "allow"
    (pod,) = (one for one in place.resources() if one.reference == "Pod/default/p3")
    prober.forget("default/p3")
    place.remove_pod("default/p3")
    with pytest.raises(LabError):
        prober.ask([question])
    place.add_pod(pod)
    assert prober.ask([question])[0].outcome == "allow"
