"""`parse`: from a plain document to a `Resource`, or an error that says what is wrong in plain words.

The way without errors is pydantic's alone. Only when it refuses is its verdict retold: where (file, line,
object, field), the offending value, what is allowed, and the nearest known word for a misspelt one.
"""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hookline.model._problems import (
    FieldPath,
    InvalidResource,
    Locate,
    Origin,
    Problem,
    Refused,
    did_you_mean,
    field_text,
    value_text,
)
from hookline.model._resource import Resource, registered, supported_kinds

# Errors that concern a key rather than its value: a null there is no value left out.
ABOUT_KEYS = frozenset({"missing", "extra_forbidden", "invalid_key"})
NO_RANGE = (None, None)
# Kinds that are no misspelling of another, though their names are near to one: it would not mean the same.
_NO_TIERS = "Its tiers and its Deny have no place in NetworkPolicy, which is another kind."
NOT_SUPPORTED = dict.fromkeys(
    ("ClusterNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy"), _NO_TIERS
)


def parse(document: object, origin: Origin | None = None, *, locate: Locate | None = None) -> Resource:
    """The resource that a document describes.

    Args:
        document: The document as YAML or JSON gives it: mappings, lists and plain values.
        origin: Where it was read, for errors and for `Resource.origin`.
        locate: Finds a field's line; without it errors give the document's first line.

    Raises:
        InvalidResource: With one problem for every field that is wrong.
    """
    if not isinstance(document, dict):
        raise _invalid(
            f"{value_text(document)} is not a resource",
            "a resource is a mapping with apiVersion, kind and metadata",
            (),
            origin,
            locate,
        )
    kind = _kind_of(document, origin, locate)
    fields = {key: value for key, value in document.items() if key not in ("apiVersion", "kind")}
    try:
        with _collecting_later():
            resource = kind.model_validate(fields, by_alias=True, by_name=False)
    except ValidationError as error:
        resource = _second_look(kind, fields, error, origin, locate)
    resource._origin = origin
    return resource


@contextmanager
def _collecting_later() -> Iterator[None]:
    """Keeps the garbage collector away: of a document with 100,000 parts, all of which stay, it took four fifths of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _kind_of(document: dict[Any, Any], origin: Origin | None, locate: Locate | None) -> type[Resource]:
    problems = []
    for field, example in (("apiVersion", "v1 or hookline.dev/v1alpha1"), ("kind", "VirtualService")):
        value = document.get(field)
        if field not in document:
            near = next(
                (key for key in document if isinstance(key, str) and key.lower() == field.lower()), None
            )
            remedy = f"write {field} instead of {near}" if near else f"add {field}, such as {example}"
            problems.append(_problem(f"{field} is missing", remedy, (), origin, locate))
        elif not isinstance(value, str) or not value:
            problems.append(
                _problem(f"{value_text(value)} is not text such as {example}", "", (field,), origin, locate)
            )
    if problems:
        raise InvalidResource(problems)
    api_version, name = document["apiVersion"], document["kind"]
    if kind := registered(api_version, name):
        return kind
    kinds = supported_kinds()
    same = [kind for kind in kinds if kind.kind == name]
    if same:
        raise _invalid(
            f"{value_text(api_version)} has no kind {name} that Hookline knows",
            f"write {same[0].api_version}",
            ("apiVersion",),
            origin,
            locate,
        )
    names = [kind.kind for kind in kinds]
    if name in NOT_SUPPORTED:
        raise _invalid(
            f"{value_text(name)} is not supported",
            f"{NOT_SUPPORTED[name]} Supported: {', '.join(names)}",
            ("kind",),
            origin,
            locate,
        )
    raise _invalid(
        f"{value_text(name)} is not a kind that Hookline knows",
        " ".join(filter(None, (did_you_mean(name, names), f"Supported: {', '.join(names)}"))),
        ("kind",),
        origin,
        locate,
    )


def _second_look(
    kind: type[Resource],
    document: dict[Any, Any],
    error: ValidationError,
    origin: Origin | None,
    locate: Locate | None,
) -> Resource:
    """Parses again without the nulls that were refused: Kubernetes reads ``field: null`` as left out."""
    errors = error.errors(include_url=False)
    nulls = [
        detail["loc"] for detail in errors if detail["input"] is None and detail["type"] not in ABOUT_KEYS
    ]
    if nulls:
        document = copy.deepcopy(document)
        removed = [_remove(document, path) for path in nulls]
        if any(removed):
            try:
                return kind.model_validate(document, by_alias=True, by_name=False)
            except ValidationError as second:
                errors = second.errors(include_url=False)
    reference = _reference(kind, document)
    problems = [
        _problem(why, remedy, path, origin, locate, reference)
        for detail in errors
        for path, why, remedy in _retold(kind, detail)
    ]
    raise InvalidResource(problems) from None


def _remove(document: Any, path: Sequence[Any]) -> bool:
    """Takes a mapping's key out of a document; False where the path leads elsewhere."""
    for step in path[:-1]:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return False
    if isinstance(document, dict) and path and path[-1] in document:
        del document[path[-1]]
        return True
    return False


def _reference(kind: type[Resource], document: Mapping[Any, Any]) -> str:
    metadata = document.get("metadata")
    found: Mapping[Any, Any] = metadata if isinstance(metadata, dict) else {}
    parts: list[Any] = [kind.kind]
    if kind.is_namespaced():
        parts.append(found.get("namespace") or "default")
    parts.append(found.get("name"))
    if all(isinstance(part, str) and 0 < len(part) <= 253 and part.isprintable() for part in parts):
        return "/".join(parts)
    return kind.kind


def _retold(kind: type[Resource], detail: ErrorDetails) -> Iterator[tuple[FieldPath, str, str]]:
    """One of pydantic's errors as (path, why, remedy)."""
    path: FieldPath = tuple(detail["loc"])
    if path and path[-1] == "[key]":
        path = path[:-1]
    shown = value_text(detail["input"])
    context = detail.get("ctx", {})
    match detail["type"]:
        case "value_error" if isinstance(refused := context.get("error"), Refused):
            for at, why, remedy in refused.complaints:
                yield path + at, why, remedy
        case "missing":
            yield path, "this field is required", ""
        case "extra_forbidden" | "invalid_key":
            yield path, *_unknown_field(kind, path)
        case "literal_error":
            yield path, *_not_one_of(kind, path, detail["input"])
        case "int_type" | "greater_than_equal" | "less_than_equal" | "int_parsing_size":
            low, high = _range_at(kind, path)
            allowed = "a whole number" + (f" from {low} to {high}" if (low, high) != NO_RANGE else "")
            text = detail["input"]
            quoted = isinstance(text, str) and text.isascii() and text.isdigit()
            yield path, f"{shown} is not {allowed}", "remove the quotes" if quoted else ""
        case "string_type":
            scalar = isinstance(detail["input"], bool | int | float)
            yield path, f"{shown} is not text", "put it in quotes" if scalar else ""
        case "bool_type":
            yield path, f"{shown} is not true or false", ""
        case "tuple_type" | "list_type":
            yield (
                path,
                f"{shown} is not a list",
                "write each entry on a line of its own that begins with a hyphen",
            )
        case "model_type" | "dict_type" | "model_attributes_type" | "mapping_type":
            yield path, f"{shown} is not a mapping of fields to values", ""
        case "too_short" if detail["input"]:
            pass  # its entries were refused, each with its own error
        case "too_short":
            yield path, "at least one entry is needed", ""
        case "string_unicode":
            yield path, f"{shown} is not Unicode text", ""
        case _:
            yield path, f"{shown} is not allowed here: {detail['msg']}", ""


def _unknown_field(kind: type[Resource], path: FieldPath) -> tuple[str, str]:
    model = _annotation_at(kind, path[:-1])
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return "there is no such field", ""
    known = [field.alias or name for name, field in model.model_fields.items()]
    if not known:
        return "there is no such field", "none exists here yet"
    remedy = did_you_mean(str(path[-1]), known)
    return "there is no such field", remedy or f"the fields here are {', '.join(known)}"


def _not_one_of(kind: type[Resource], path: FieldPath, value: object) -> tuple[str, str]:
    choices = [str(choice) for choice in get_args(_annotation_at(kind, path))]
    if choices == [""]:
        return f"{value_text(value)} is not allowed: a {kind.kind} belongs to no namespace", "remove it"
    remedy = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"{value_text(value)} is not one of {', '.join(choices)}", remedy


def _annotation_at(annotation: Any, path: FieldPath) -> Any:
    """The bare type of the field that a path leads to, None where it leads out of what is typed."""
    annotation = _bare(annotation)
    for step in path:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = _field(annotation, step)
            annotation = _bare(field.annotation) if field else None
        else:
            inner = get_args(annotation)
            annotation = _bare(inner[0] if isinstance(step, int) else inner[-1]) if inner else None
    return annotation


def _range_at(kind: type[Resource], path: FieldPath) -> tuple[int | None, int | None]:
    """The bounds that the field at a path declares, or those of a list's entries."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    model = _annotation_at(kind, path[:-1])
    if not (isinstance(model, type) and issubclass(model, BaseModel)) or not path:
        return NO_RANGE
    field = _field(model, path[-1])
    if field is None:
        return NO_RANGE
    bounds = [*field.metadata, *_metadata_within(field.annotation)]
    low = next((bound.ge for bound in bounds if hasattr(bound, "ge")), None)
    high = next((bound.le for bound in bounds if hasattr(bound, "le")), None)
    return low, high


def _metadata_within(annotation: Any) -> Iterator[Any]:
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Annotated:
            for extra in part.__metadata__:
                if isinstance(extra, FieldInfo):
                    yield from extra.metadata
                else:
                    yield extra


def _field(model: type[BaseModel], step: str | int) -> FieldInfo | None:
    for name, field in model.model_fields.items():
        if step == (field.alias or name):
            return field
    return None


def _bare(annotation: Any) -> Any:
    """A type without Annotated and without None."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            rest = [part for part in get_args(annotation) if part is not type(None)]
            if len(rest) != 1:
                return annotation
            annotation = rest[0]
        else:
            return annotation


def _invalid(
    why: str, remedy: str, path: FieldPath, origin: Origin | None, locate: Locate | None
) -> InvalidResource:
    return InvalidResource(_problem(why, remedy, path, origin, locate))


def _problem(
    why: str,
    remedy: str,
    path: FieldPath,
    origin: Origin | None,
    locate: Locate | None,
    reference: str = "",
) -> Problem:
    place = ""
    if origin is not None:
        place = f"{origin.path}:{locate(path) if locate else origin.line}"
    return Problem(why, remedy=remedy, place=place, reference=reference, field=field_text(path), path=path)
