"""``hookline policy test``: tables tried offline and with real packets, and how it tells what came out otherwise."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hookline import cli, lab
from tests.lab.conftest import traces

TABLE = """
apiVersion: hookline.dev/v1alpha1
kind: PolicyTest
metadata: {name: web}
spec:
  resources:
    - {apiVersion: v1, kind: Node, metadata: {name: node-1}}
    - {apiVersion: v1, kind: Node, metadata: {name: node-2}}
    - {apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: a}}, spec: {nodeName: node-1}}
    - {apiVersion: v1, kind: Pod, metadata: {name: b, labels: {app: b}}, spec: {nodeName: node-1}}
    - {apiVersion: v1, kind: Pod, metadata: {name: c, labels: {app: c}}, spec: {nodeName: node-2}}
    - {apiVersion: v1, kind: Pod, metadata: {name: h}, spec: {nodeName: node-2, hostNetwork: true}}
    - apiVersion: networking.k8s.io/v1
      kind: NetworkPolicy
      metadata: {name: web}
      spec:
        podSelector: {matchLabels: {app: b}}
        ingress:
          - from: [{podSelector: {matchLabels: {app: c}}}]
            ports: [{port: 80}, {port: 5000, protocol: UDP}, {port: 132, protocol: SCTP}]
          - from: [{ipBlock: {cidr: 198.51.100.0/24, except: [198.51.100.128/25]}}]
  probes:
    - {from: c, to: b, port: 80, expect: allow}
    - {from: c, to: b, port: 5000, protocol: UDP, expect: allow}
    - {from: c, to: b, port: 132, protocol: SCTP, expect: allow}
    - {from: c, to: b, port: [81, 132], expect: deny}
    - {from: c, to: b, port: 80, protocol: [UDP, SCTP], expect: deny}
    - {from: [a, h], to: b, port: 80, expect: deny}
    - {from: b, to: [a, c, h, node/node-2, 198.51.100.200], port: 80, protocol: [TCP, UDP, SCTP], expect: allow}
    - {from: 198.51.100.7, to: b, port: 9, protocol: [TCP, UDP, SCTP], expect: allow}
    - {from: 198.51.100.200, to: b, port: 9, protocol: [TCP, UDP, SCTP], expect: deny}
    - {from: node/node-1, to: b, port: 9, protocol: [TCP, UDP, SCTP], expect: allow}
    - {from: node/node-2, to: b, port: 9, protocol: [TCP, UDP, SCTP], expect: deny}
    - {from: b, to: b, port: 9, protocol: [TCP, UDP, SCTP], expect: allow}
  steps:
    - description: one pod has other labels, one is elsewhere, and one is new
      resources:
        - {apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: c}}, spec: {nodeName: node-1}}
        - {apiVersion: v1, kind: Pod, metadata: {name: c, labels: {app: x}}, spec: {nodeName: node-1}}
        - {apiVersion: v1, kind: Pod, metadata: {name: d, labels: {app: b}}, spec: {nodeName: node-2}}
      remove: [Pod/default/h]
      probes:
        - {from: a, to: [b, d], port: 80, expect: allow}
        - {from: c, to: [b, d], port: 80, expect: deny}
        - {from: d, to: c, port: 80, expect: allow}
    - remove: [NetworkPolicy/default/web]
      probes:
        - {from: c, to: [b, d], port: [80, 81], protocol: [TCP, UDP, SCTP], expect: allow}
"""
EVERYTHING_ALLOWED = """
apiVersion: hookline.dev/v1alpha1
kind: PolicyTest
metadata: {name: open}
spec:
  resources:
    - {apiVersion: v1, kind: Pod, metadata: {name: a}}
  probes:
    - {from: a, to: a, port: 80, expect: allow}
"""


SERVICE = """
apiVersion: hookline.dev/v1alpha1
kind: PolicyTest
metadata: {name: service}
spec:
  resources:
    - {apiVersion: v1, kind: Node, metadata: {name: node-1}}
    - {apiVersion: v1, kind: Node, metadata: {name: node-2}}
    - {apiVersion: v1, kind: Pod, metadata: {name: a}}
    - {apiVersion: v1, kind: Pod, metadata: {name: b}, status: {podIPs: [{ip: 10.1.1.1}, {ip: "fd01::1"}]}}
    - {apiVersion: v1, kind: Pod, metadata: {name: c}, spec: {nodeName: node-2}}
    - apiVersion: hookline.dev/v1alpha1
      kind: VirtualService
      metadata: {name: s}
      spec:
        addresses: [192.0.2.10, "2001:db8::10"]
        ports:
          - {name: web, port: 80, targetPort: 8080}
          - {name: dns, port: 53, targetPort: 5353, protocol: UDP}
        backends: [{address: 10.1.1.1}, {address: "fd01::1"}]
  probes:
    - {from: [a, c, node/node-1], to: [192.0.2.10, "2001:db8::10"], port: 80, expect: allow}
    - {from: [a, c, node/node-2], to: [192.0.2.10, "2001:db8::10"], port: 53, protocol: UDP, expect: allow}
    - {from: 198.51.100.7, to: 192.0.2.10, port: 80, expect: allow}
"""


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], str]:
    """Writes a table, and gives its file's name."""

    def write(text: str) -> str:
        path = tmp_path / "table.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], lab_name: str) -> Callable[..., tuple[int, str, str]]:
    """Runs ``hookline policy test`` with a lab of this name: exit status, output, errors. The lab is gone then."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.run(["policy", "test", *arguments, "--lab", lab_name])
        written = capsys.readouterr()
        assert traces(lab_name) == []
        return status, written.out, written.err

    return run


def read(call: Any, *arguments: str) -> list[dict[str, Any]]:
    _, out, err = call(*arguments, "--json")
    assert err == ""
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


def test_offline_asks_what_the_policies_mean(call: Any, table: Any) -> None:
    status, out, err = call(table(TABLE), "--mode", "offline")
    assert (status, err) == (0, "")
    rows = read(call, table(TABLE), "--mode", "offline")
    assert out == f"{len(rows)} probes of 1 table came out as expected (offline)\n"
    assert all(row["offline"] == row["expect"] and row["live"] is None for row in rows)
    assert {row["expect"] for row in rows} == {"allow", "deny"}
    assert rows[0] == {
        "test": "web",
        "step": 0,
        "from": "c",
        "to": "b",
        "port": 80,
        "protocol": "TCP",
        "family": 4,
        "expect": "allow",
        "offline": "allow",
        "live": None,
        "decidedBy": rows[0]["decidedBy"],
    }
    assert "NetworkPolicy/default/web ingress[0]" in rows[0]["decidedBy"]
    assert {row["step"] for row in rows} == {0, 1, 2}


def test_without_the_programs_everything_gets_through_and_the_test_fails(call: Any, table: Any) -> None:
    status, out, _ = call(table(TABLE), "--no-datapath", "--mode", "live", "--json")
    assert status == 1
    rows = json.loads(out)
    assert {row["live"] for row in rows} == {"allow"}
    assert {row["offline"] for row in rows} == {None}
    denied = [row for row in rows if row["expect"] == "deny"]
    assert {(row["protocol"], row["family"]) for row in denied} == {
        (protocol, family) for protocol in ("TCP", "UDP", "SCTP") for family in (4, 6)
    }
    status, out, err = call(table(TABLE), "--no-datapath")
    assert (status, err) == (1, "")
    assert out.count("MISMATCH web") == len(denied)
    assert (
        "MISMATCH web: c to b:81/TCP IPv4: expected deny, offline deny, live allow (the nonce came back)\n"
        in out
    )
    assert "  decided by ingress: default/b (" in out
    assert out.endswith(
        f"{len(denied)} of {len(rows)} probes of 1 table came out otherwise than expected (offline and live)\n"
    )


def test_a_table_that_cannot_tell_fails_without_the_programs_too(call: Any, table: Any) -> None:
    status, out, err = call(table(EVERYTHING_ALLOWED), "--no-datapath")
    assert status == 1
    assert out == "2 probes of 1 table came out as expected (offline and live)\n"
    assert "cannot tell whether the data path works" in err


def test_a_mismatch_is_shown_with_the_policy_and_rule_that_decide(call: Any, table: Any) -> None:
    wrong = TABLE.replace(
        "{from: c, to: b, port: 80, expect: allow}", "{from: c, to: b, port: 80, family: 4, expect: deny}"
    )
    status, out, _ = call(table(wrong), "--mode", "offline")
    assert status == 1
    assert out.splitlines()[:2] == [
        "MISMATCH web: c to b:80/TCP IPv4: expected deny, offline allow",
        "  decided by ingress: NetworkPolicy/default/web ingress[0] allows podSelector {app=c}, 80/TCP",
    ]
    assert "1 of " in out.splitlines()[-1]


def test_real_packets_fare_as_the_policies_mean(call: Any, table: Any) -> None:
    status, out, err = call(table(TABLE))
    assert (status, err) == (0, "")
    assert out.endswith(" probes of 1 table came out as expected (offline and live)\n")


def test_what_is_denied_in_error_is_no_reason_to_wait_for_ever(call: Any, table: Any) -> None:
    """An expectation that is wrong in either way is a mismatch live, too."""
    wrong = TABLE.replace("from: c, to: b, port: 80, expect: allow", "from: c, to: b, port: 80, expect: deny")
    wrong = wrong.replace(
        "from: c, to: b, port: [81, 132], expect: deny", "from: c, to: b, port: 81, expect: allow"
    )
    status, out, _ = call(table(wrong), "--mode", "live", "--json")
    assert status == 1
    found = {
        (one["port"], one["expect"], one["live"]) for one in json.loads(out) if one["live"] != one["expect"]
    }
    assert found == {(80, "deny", "allow"), (81, "allow", "deny")}


def test_tables_that_do_not_fit_into_one_network_are_tried_all_the_same(call: Any, table: Any) -> None:
    """A node has another address in the second, and a pod that of a machine outside in the third."""
    tables = [
        f"""
apiVersion: hookline.dev/v1alpha1
kind: PolicyTest
metadata: {{name: {name}}}
spec:
  resources:
    - apiVersion: v1
      kind: Node
      metadata: {{name: node-1}}
      status: {{addresses: [{{type: InternalIP, address: {node}}}]}}
    - {{apiVersion: v1, kind: Pod, metadata: {{name: a}}, status: {{podIP: {pod}}}}}
    - apiVersion: networking.k8s.io/v1
      kind: NetworkPolicy
      metadata: {{name: p}}
      spec: {{podSelector: {{}}, ingress: [{{from: [{{ipBlock: {{cidr: {outside}/32}}}}]}}]}}
  probes:
    - {{from: {outside}, to: a, port: 80, family: 4, expect: allow}}
    - {{from: 192.0.2.99, to: a, port: 80, expect: deny}}
    - {{from: a, to: node/node-1, port: 80, expect: allow}}
"""
        for name, node, pod, outside in (
            ("first", "172.30.0.9", "10.1.1.1", "198.51.100.1"),
            ("second", "172.30.0.8", "10.1.1.1", "198.51.100.1"),
            ("third", "172.30.0.8", "198.51.100.1", "198.51.100.2"),
        )
    ]
    status, out, err = call(table("---".join(tables)))
    assert (status, err) == (0, ""), out
    assert out == "12 probes of 3 tables came out as expected (offline and live)\n"


def test_the_example_holds(call: Any) -> None:
    examples = Path(__file__).parents[2] / "examples" / "policies"
    status, out, err = call(str(examples))
    assert (status, err) == (0, ""), out


def test_the_tables_of_the_specification_hold_for_real_packets(call: Any) -> None:
    """All of tests/policy, which the evaluator passes too: what the issue of policies is done by."""
    rows = read(call, str(Path(__file__).parents[1] / "policy"))
    assert len(rows) >= 1000
    assert len({(row["test"], row["step"]) for row in rows}) >= 100
    assert [row for row in rows if not row["expect"] == row["offline"] == row["live"]] == []


def test_services_bring_their_packets_to_the_backend(call: Any, table: Any) -> None:
    status, out, err = call(table(SERVICE))
    assert (status, out, err) == (0, "13 probes of 1 table came out as expected (offline and live)\n", "")


@pytest.mark.parametrize(
    ("arguments", "text", "status", "message"),
    [
        (["--no-datapath", "--mode", "offline"], TABLE, 2, "--no-datapath says nothing with --mode offline"),
        (["--mode", "sideways"], TABLE, 2, "sideways"),
        ([], "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n", 1, "there is nothing to try"),
        ([], TABLE.replace("to: b, port: 132, protocol: SCTP", "to: z, port: 132"), 1, "there is no z"),
        ([], TABLE.replace("expect: deny", "expect: refuse", 1), 1, "expect"),
        ([], TABLE.replace("kind: NetworkPolicy", "kind: NetworkPolicies"), 1, "NetworkPolicies"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    call: Any, table: Any, arguments: list[str], text: str, status: int, message: str
) -> None:
    ended, out, err = call(table(text), *arguments)
    assert (ended, out) == (status, "")
    assert message in err
    assert err.startswith("error: ")
    _, _, err = call(table(text), *arguments, "--json")
    assert message in json.loads(err)["error"] + json.loads(err)["why"]


def test_a_lab_that_is_there_stays(table: Any, lab_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lab.up([], lab_name)
    assert cli.run(["policy", "test", table(TABLE), "--lab", lab_name]) == 1
    assert f"lab {lab_name} is up already" in capsys.readouterr().err
    assert lab.Lab.open(lab_name).members


def test_who_is_asked_to_end_takes_the_lab_along(table: Any, lab_name: str, tmp_path: Path) -> None:
    """Each step waits until it is quiet: it would take ten seconds and more."""
    steps = "".join(
        f"    - probes: [{{from: c, to: b, port: {port}, expect: deny}}]\n" for port in range(1000, 1100)
    )
    path = table(TABLE.partition("  steps:")[0] + "  steps:\n" + steps)
    command = [sys.executable, "-m", "hookline", "policy", "test", path, "--mode", "live", "--lab", lab_name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not any(one.name == lab_name and one.status == "up" for one in lab.list_labs()):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 130
    assert traces(lab_name) == []


ORDINARY_USER = """
import os, shlex, sys
from hookline import bpf, cli
from hookline.cli import objects

offline = ["policy", "test", sys.argv[1], "--mode", "offline"]
bpf.lacking()
cli.run(offline)  # imports what it takes, which an ordinary user may not be able to read
os.setresuid(65534, 65534, 65534)
print(cli.run(offline), cli.run(["policy", "test", sys.argv[1]]))
"""


def test_without_root_only_offline() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(TABLE)
        file.flush()
        Path(file.name).chmod(0o644)
        command = [sys.executable, "-c", ORDINARY_USER, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 3", done.stderr
    assert "cannot make a lab and send packets in it" in done.stderr
