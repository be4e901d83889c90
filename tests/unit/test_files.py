"""Files as a source: what is read, YAML without surprises, and errors that name their line."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookline.model import InvalidResource, Origin, VirtualService
from hookline.sources import files
from hookline.sources._yaml import plain_value, read_yaml

ORDERS = """\
apiVersion: hookline.dev/v1alpha1
kind: VirtualService
metadata: {name: orders}
spec:
  addresses: [192.0.2.10, "2001:db8::10"]
  ports:
    - name: http
      port: 80
      targetPort: 8080
  backends:
    - {address: 10.244.1.10, weight: 100}
    - selector: {app: orders}
"""
NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n"


def refused(text: str | bytes, *, is_json: bool = False) -> str:
    with pytest.raises(InvalidResource) as caught:
        files.loads(text, "a.yaml", is_json=is_json)
    return str(caught.value)


# --- what is read


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "orders.yaml"
    path.write_text("# a comment\n---\n" + ORDERS + "---\n---\n" + NAMESPACE % "shop")
    service, namespace = files.load([path])
    assert isinstance(service, VirtualService)
    assert service.origin == Origin(str(path), 3)
    assert str(namespace.origin) == f"{path}:17"


def test_folder_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.yml", "a.yaml", "c.json", "d.txt", ".e.yaml"):
        (tmp_path / name).write_text(
            '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "c"}}'
            if name.endswith("json")
            else NAMESPACE % name[0]
        )
    (tmp_path / "empty.yaml").write_text("# nothing here\n")
    (tmp_path / "inner.yaml").mkdir()
    assert [resource.name for resource in files.load([str(tmp_path)])] == ["a", "b", "c"]


def test_standard_input() -> None:
    (resource,) = files.load(["-"], stdin=io.BytesIO(ORDERS.encode()))
    assert str(resource.origin) == "standard input:1"


def test_list_is_expanded() -> None:
    items = "".join(
        f"- apiVersion: v1\n  kind: Namespace\n  metadata: {{name: {name}}}\n" for name in ("one", "two")
    )
    first, second = files.loads(f"apiVersion: v1\nkind: List\nitems:\n{items}", "a.yaml")
    assert (first.reference, str(first.origin)) == ("Namespace/one", "a.yaml:4")
    assert (second.reference, str(second.origin)) == ("Namespace/two", "a.yaml:7")
    broken = items.replace("{name: two}", "{nam: two}")
    assert refused(f"apiVersion: v1\nkind: List\nitems:\n{broken}") == (
        "a.yaml:9: Namespace: metadata.name: this field is required"
    )


def test_json() -> None:
    document = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": "a", "annotations": {"x": "😀"}},
    }
    (resource,) = files.loads("\n" + json.dumps(document), "a.json", is_json=True)
    assert resource.to_document() == document
    assert str(resource.origin) == "a.json:2"


def test_byte_order_mark_and_carriage_returns() -> None:
    (resource,) = files.loads(b"\xef\xbb\xbf" + ORDERS.replace("\n", "\r\n").encode())
    assert resource.name == "orders"


def test_dump_round_trip() -> None:
    tricky = [
        "on",
        "1e3",
        "0777",
        "10:20",
        "2001:db8::10",
        "0o17",
        "null",
        "~",
        "",
        "true",
        "1_000",
        "2024-01-01",
    ]
    text = (
        NAMESPACE % "a" + "  annotations: " + json.dumps({f"k{i}": value for i, value in enumerate(tricky)})
    )
    resources = files.loads(text.replace("metadata: {name: a}", "metadata:\n  name: a"))
    written = files.dump(resources)
    assert files.loads(written) == resources
    assert list(resources[0].metadata.annotations.values()) == tricky


# --- YAML without surprises


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2001:db8::10", "2001:db8::10"),
        ("10:20", "10:20"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("0777", "0777"),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("+7", 7),
        ("-7", -7),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("1e999", "1e999"),
        (".inf", ".inf"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3.4", "1.2.3.4"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    assert plain_value(text) == value
    assert type(plain_value(text)) is type(value)


def test_unquoted_address_is_text() -> None:
    (service,) = files.loads(ORDERS.replace('"2001:db8::10"', "2001:db8::10"))
    assert isinstance(service, VirtualService)
    assert str(service.addresses[1]) == "2001:db8::10"


def test_keys_are_text() -> None:
    assert read_yaml("{on: 1, 80: 2, null: 3, 'x': 4}", "a")[0].value == {"on": 1, "80": 2, "null": 3, "x": 4}


def test_anchors_and_merges() -> None:
    document = read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, &s text, *s]\n", "a")[0].value
    assert document["b"] == {"y": 3, "x": 1}
    assert document["c"] == [{"x": 1, "y": 2}, "text", "text"]


def test_tags_of_the_core_schema() -> None:
    assert read_yaml("[!!str 80, !!int 80, !!float 80, !!bool true, !!map {}, !!seq []]", "a")[0].value == [
        "80",
        80,
        80.0,
        True,
        {},
        [],
    ]


# --- errors


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "port: 80\n",
            "port: 70000\n",
            (
                "a.yaml:8: VirtualService/default/orders: spec.ports[0].port: "
                "70000 is not a whole number from 1 to 65535"
            ),
        ),
        (
            "weight: 100",
            "wieght: 100",
            (
                "a.yaml:11: VirtualService/default/orders: spec.backends[0].wieght: there is no such field "
                "(did you mean weight?)"
            ),
        ),
        (
            "    - selector: {app: orders}",
            "    - {}",
            (
                "a.yaml:12: VirtualService/default/orders: spec.backends[1]: a backend has exactly one of "
                "address and selector; this one has neither"
            ),
        ),
        (
            "      port: 80\n",
            "",
            "a.yaml:7: VirtualService/default/orders: spec.ports[0].port: this field is required",
        ),
        (
            "kind: VirtualService",
            "kind: VirtualServer",
            (
                'a.yaml:2: kind: "VirtualServer" is not a kind that Hookline knows '
                "(did you mean VirtualService? Supported: DNSCapture, EndpointSlice, ExternalHost, HostPolicy, "
                "LocalRedirectPolicy, Namespace, NetworkPolicy, Node, NodeConfig, Pod, PolicyTest, Service, "
                "ServicePolicy, VirtualService)"
            ),
        ),
        ("kind: VirtualService\n", "", "a.yaml:1: kind is missing (add kind, such as VirtualService)"),
        (
            "      targetPort: 8080",
            "      port: 8080",
            "a.yaml:9:7: the key 'port' is given twice in one mapping (keep one of them)",
        ),
        (
            "      port: 80\n",
            "\tport: 80\n",
            "a.yaml:8:1: not valid YAML: a tab indents this line (YAML indents with spaces: replace the tab)",
        ),
        (
            "name: orders}",
            "name: orders",
            (
                "a.yaml:4:5: not valid YAML: did not find expected ',' or '}' while parsing a flow mapping "
                "that begins on line 3, at 'spec:' (mend the file there; until then nothing of it is applied)"
            ),
        ),
        (
            "weight: 100",
            "weight: on",
            (
                "a.yaml:11: VirtualService/default/orders: spec.backends[0].weight: "
                '"on" is not a whole number from 0 to 65535'
            ),
        ),
    ],
)
def test_error_names_its_line(old: str, new: str, expected: str) -> None:
    assert old in ORDERS
    assert refused(ORDERS.replace(old, new)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a.yaml: the file holds no resource (write one with apiVersion, kind and metadata)"),
        (
            "# only this\n---\n",
            "a.yaml: the file holds no resource (write one with apiVersion, kind and metadata)",
        ),
        (
            "- 1\n",
            "a.yaml:1: a list is not a resource (a resource is a mapping with apiVersion, kind and metadata)",
        ),
        (
            "hello",
            (
                'a.yaml:1: "hello" is not a resource '
                "(a resource is a mapping with apiVersion, kind and metadata)"
            ),
        ),
        ("? [a]\n: 1\n", "a.yaml:1:3: a key is text, and here it is not"),
        ("a: *b\n", "a.yaml:1:4: the alias *b stands for nothing before it"),
        ("a: &a [*a]\n", "a.yaml:1:8: the alias *a stands for nothing before it"),
        ("a: !!python/object:os.system x\n", None),
        ("<<: 5\n", "a.yaml:1:1: << takes in mappings, and this is none"),
        ("a: " + "[" * 70 + "]" * 70, "a.yaml:1:67: nested more than 64 deep"),
        (b"a: \xff", "a.yaml:1: not UTF-8 text: byte 0xff (save it as UTF-8)"),
        (b"a: 1\nb: \x00\n", None),
        ("a: 'open", None),
        ("a: b: c", None),
        ("%YAML 3.0\n---\na: 1", None),
        ("@", None),
    ],
)
def test_broken_text(text: str | bytes, expected: str | None) -> None:
    message = refused(text)
    assert message.startswith("a.yaml:")
    assert expected is None or message == expected


def test_alias_bomb() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    started = time.monotonic()
    assert "the aliases unfold into more than 100000 values (write the values out)" in refused(bomb)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "a.yaml:1:2: not valid JSON: expecting property name enclosed in double quotes"),
        ('{"a": 1, "a": 2}', "a.yaml: the key 'a' is given twice in one mapping"),
        ("[" * 100000, "a.yaml: nested more than 64 deep"),
        ("[" * 100 + "]" * 100, "a.yaml: nested more than 64 deep"),
        ('{"a": NaN}', "a.yaml: NaN is not a number that JSON has"),
        ('{"a": 1e999}', "a.yaml: 1e999 is too large a number"),
        ('{"a": "\\ud800"}', "a.yaml: '\\ud800' is not Unicode text: half of a surrogate pair"),
        ("  \n", "a.yaml: the file holds no resource (write one with apiVersion, kind and metadata)"),
        ("1" * 6000, f"a.yaml: {'1' * 40}… is too large a number"),
    ],
)
def test_broken_json(text: str, expected: str) -> None:
    assert refused(text, is_json=True) == expected


def test_json_error_names_its_line() -> None:
    text = '{\n"apiVersion": "v1",\n"kind": "Namespace",\n"metadata": {\n"name": 5}}'
    assert (
        refused(text, is_json=True) == "a.yaml:5: Namespace: metadata.name: 5 is not text (put it in quotes)"
    )


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidResource) as caught:
        files.load([tmp_path / "none.yaml"])
    assert str(caught.value) == f"{tmp_path}/none.yaml: there is no such file (check the path)"


def test_unreadable_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InvalidResource, match=r"a\.yaml: this user may not read it \(run as a user who may"):
        files.load(["a.yaml"])


def test_folder_without_resources(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(InvalidResource) as caught:
        files.load([tmp_path])
    assert str(caught.value) == (
        f"{tmp_path}: the folder holds no resource in a *.yaml, *.yml or *.json file "
        "(its subfolders are not read: name them)"
    )


def test_same_object_twice(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("\n" + ORDERS)
    (tmp_path / "b.yaml").write_text(ORDERS)
    with pytest.raises(InvalidResource) as caught:
        files.load([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert str(caught.value) == (
        f"{tmp_path}/b.yaml:1: VirtualService/default/orders: "
        f"the same object is already at {tmp_path}/a.yaml:2 "
        "(keep one of them)"
    )


def test_problems_of_all_files_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(ORDERS.replace("port: 80\n", "port: 0\n"))
    (tmp_path / "b.yaml").write_text("a: [")
    with pytest.raises(InvalidResource) as caught:
        files.load([tmp_path, "/nonexistent"])
    assert [problem.place.removeprefix(f"{tmp_path}/") for problem in caught.value.problems] == [
        "a.yaml:8",
        "b.yaml:1:5",
        "/nonexistent",
    ]
    assert str(caught.value).count("\n") == 3


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_garbage_bytes(data: bytes) -> None:
    for is_json in (False, True):
        with pytest.raises(InvalidResource):
            files.loads(data, "a", is_json=is_json)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_file_with_a_scar(data: st.DataObject) -> None:
    """A good file with a piece replaced by punctuation: read, or refused in words."""
    start = data.draw(st.integers(0, len(ORDERS)))
    length = data.draw(st.integers(0, 8))
    scar = data.draw(st.text("{}[]:,-&*!|>'\"%@`#? \t\n0a<", max_size=6))
    try:
        assert len(files.loads(ORDERS[:start] + scar + ORDERS[start + length :], "a.yaml")) >= 1
    except InvalidResource as refusal:
        text = str(refusal)
    else:
        text = ""
    assert text == "" or "a.yaml" in text


def test_thousand_services_are_read_quickly() -> None:
    """1,000 services with 10 backends each: 0.36 s on the development machine; a busy one has more time."""
    text = "---\n".join(
        ORDERS.replace("name: orders", f"name: orders-{index}").replace(
            "    - selector: {app: orders}\n",
            "".join(f"    - {{address: 10.1.{index % 250}.{n}, weight: 100}}\n" for n in range(1, 10)),
        )
        for index in range(1000)
    )
    best = 60.0
    for _ in range(3):
        started = time.process_time()
        assert len(files.loads(text)) == 1000
        best = min(best, time.process_time() - started)
    assert best < 1.5
