"""``hookline verdicts``, ``policy audit`` and ``policy impact`` with real packets: what is told, and what a change would mean."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hookline import cli
from hookline.api import Node
from hookline.lab import Lab, Prober, Question
from hookline.model.names import Protocol
from tests.lab.conftest import lab_with, pod

POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
    - from: [{podSelector: {matchLabels: {app: client}}}]
      ports: [{port: 80}, {port: 8080}]
"""
NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}


def labelled(app: str) -> dict[str, Any]:
    return {"metadata": {"labels": {"app": app}}}


@pytest.fixture(scope="module")
def place(unique_name: Callable[[], str]) -> Iterator[Lab]:
    """A web server and a client that it knows, and one that it does not."""
    members = (pod("web", **labelled("web")), pod("client", **labelled("client")), pod("other"))
    with lab_with(unique_name(), *members) as made:
        yield made


@pytest.fixture
def node(place: Lab, tmp_path: Path) -> Iterator[Node]:
    """The lab's node with the policy from a file; what was told before is read."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    with Node(place.first_node) as opened:
        opened.apply(path)
        with opened.verdicts() as reader:
            reader.read()
        yield opened
        opened.delete(["NetworkPolicy/default/web"])


@pytest.fixture
def ask(place: Lab) -> Iterator[Callable[..., str]]:
    """Sends a probe, and says what became of it."""
    with Prober(place) as prober:

        def one(source: str, target: str, port: int, protocol: Protocol = "tcp", family: Any = 4) -> str:
            (heard,) = prober.ask([Question(source, target, port, protocol, family)])
            return heard.outcome

        yield one


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], place: Lab) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.run([*arguments, "--node", f"lab/{place.name}"])
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


def told(call: Any, *arguments: str) -> list[dict[str, Any]]:
    status, out, err = call("verdicts", "--json", *arguments)
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document.keys() == {"node", "verdicts", "lost", "suppressed"}
    assert document["lost"] == document["suppressed"] == 0
    found: list[dict[str, Any]] = document["verdicts"]
    return found


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
@pytest.mark.usefixtures("node")
def test_a_denied_packet_is_told_with_names(call: Any, ask: Any, protocol: Protocol, family: int) -> None:
    assert ask("default/other", "default/web", 81, protocol, family) == "deny"
    (event,) = told(call)
    assert (event["verdict"], event["reason"], event["direction"]) == ("deny", "no_rule", "ingress")
    assert (event["source"], event["destination"]) == ("default/other", "default/web")
    assert (event["destination_port"], event["protocol"]) == (81, NUMBERS[protocol])
    assert (":" in event["source_address"]) == (family == 6)
    assert event["policies"] == ["NetworkPolicy/default/web"]
    assert event["policies_changed"] is False
    assert told(call) == [], "each is told once"


@pytest.mark.usefixtures("node")
def test_lines_for_people(call: Any, ask: Any) -> None:
    ask("default/other", "default/web", 81)
    status, out, err = call("verdicts")
    assert (status, err) == (0, "")
    head, line = out.splitlines()
    assert head.split() == ["TIME", "VERDICT", "REASON", "DIRECTION", "FROM", "TO", "PROTOCOL", "POLICY"]
    words = line.split()
    assert words[1:4] == ["deny", "no_rule", "ingress"]
    assert words[4].startswith("default/other:")
    assert words[5:] == ["default/web:81", "TCP", "NetworkPolicy/default/web"]
    assert call("verdicts") == (0, "", "")


@pytest.mark.parametrize("as_json", [False, True])
def test_policies_that_changed_since_are_no_longer_what_decided(
    call: Any, ask: Any, node: Node, tmp_path: Path, as_json: bool
) -> None:
    ask("default/other", "default/web", 81)
    (tmp_path / "policy.yaml").write_text(POLICY.replace("{app: client}", "{app: nobody}"))
    node.apply(tmp_path / "policy.yaml")
    ask("default/other", "default/web", 82)
    if as_json:
        said = {one["destination_port"]: one["policies_changed"] for one in told(call)}
    else:
        lines = call("verdicts")[1].splitlines()[1:]
        said = {
            int(line.partition("default/web:")[2].split()[0]): line.endswith("(policies changed since)")
            for line in lines
        }
    assert said == {81: True, 82: False}


@pytest.mark.usefixtures("node")
def test_only_some(call: Any, ask: Any) -> None:
    ask("default/other", "default/web", 81)
    assert told(call, "--only", "allow") == []


def test_an_audited_policy_denies_nothing_and_says_what_it_would(call: Any, ask: Any, node: Node) -> None:
    assert ask("default/other", "default/web", 80) == "deny"
    told(call)
    assert call("policy", "audit", "default/web")[0] == 0
    for protocol in ("tcp", "udp", "sctp"):
        for family in (4, 6):
            assert ask("default/other", "default/web", 81, protocol, family) == "allow"
    assert ask("default/client", "default/web", 80) == "allow"
    events = told(call)
    assert {(one["verdict"], one["reason"], one["source"]) for one in events} == {
        ("audit", "would_deny", "default/other")
    }
    assert {tuple(one["policies"]) for one in events} == {("NetworkPolicy/default/web",)}
    assert {(one["protocol"], ":" in one["source_address"]) for one in events} == {
        (number, v6) for number in NUMBERS.values() for v6 in (False, True)
    }
    assert call("policy", "audit", "default/web", "--off")[0] == 0
    assert ask("default/other", "default/web", 81) == "deny"


def test_following_goes_on_until_it_is_ended(call: Any, ask: Any, node: Node) -> None:
    command = [sys.executable, "-m", "hookline", "verdicts", "--follow", "--json", "--node", str(node.name)]
    ask("default/other", "default/web", 81)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert json.loads(process.stdout.readline())["destination_port"] == 81
            ask("default/other", "default/web", 82)
            assert json.loads(process.stdout.readline())["destination_port"] == 82
            status, out, err = call("verdicts")
            assert (status, out) == (1, "")
            assert "are being read" in err, "each is told once, to one reader"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr.read() == ""
    assert told(call) == []


def test_a_node_without_policies_tells_nothing(call: Any, place: Lab) -> None:
    status, out, err = call("verdicts")
    assert (status, out) == (1, "")
    assert "error: " in err
    assert "do: " in err


# -- impact


@pytest.fixture
def connected(place: Lab) -> Iterator[Callable[[str, int], socket.socket]]:
    """Opens a connection to the web server, and leaves it open until the test is over."""
    opened: list[socket.socket] = []

    def connect(source: str, port: int) -> socket.socket:
        (handle,) = place.sockets(source, 4)
        opened.append(handle)
        handle.settimeout(5)
        handle.connect((str(place.member("default/web").address(4)), port))
        return handle

    yield connect
    for one in opened:
        one.close()


def test_what_a_change_would_mean_to_open_connections(
    call: Any, connected: Any, node: Node, tmp_path: Path
) -> None:
    handle = connected("default/client", 8080)
    new = tmp_path / "new.yaml"
    new.write_text(POLICY.replace(", {port: 8080}", ""))
    status, out, err = call("policy", "impact", str(new), "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["connections"] >= 1
    (change,) = document["changes"]
    assert {key: change[key] for key in ("from", "to", "port", "protocol", "before", "after")} == {
        "from": "default/client",
        "to": "default/web",
        "port": 8080,
        "protocol": "TCP",
        "before": "allow",
        "after": "deny",
    }
    assert "NetworkPolicy/default/web" in change["decidedBy"]
    handle.sendall(b"still there?\n")
    assert handle.recv(100) == b"default/web\n", "nothing was changed"
    status, out, _ = call("policy", "impact", str(new))
    assert out.splitlines()[1].split()[:6] == [
        "default/client",
        "default/web",
        "8080",
        "TCP",
        "allow",
        "deny",
    ]
    assert "would be judged otherwise" in out


def test_a_change_that_means_nothing_to_them(call: Any, connected: Any, node: Node, tmp_path: Path) -> None:
    connected("default/client", 8080)
    new = tmp_path / "new.yaml"
    new.write_text(POLICY.replace("name: web}\nspec", "name: more}\nspec"))
    status, out, _ = call("policy", "impact", str(new))
    assert status == 0
    assert out.startswith("0 of ")


def test_files_that_are_wrong_are_refused(call: Any, node: Node, tmp_path: Path) -> None:
    new = tmp_path / "new.yaml"
    new.write_text(POLICY.replace("ingress", "ingres"))
    status, _, err = call("policy", "impact", str(new))
    assert status == 1
    assert "ingres" in err
