"""JSON files: one document, with what YAML would refuse refused here too."""

from __future__ import annotations

import json
import math
from typing import Any

from hookline.model import InvalidResource, Problem
from hookline.sources._yaml import DEPTH_LIMIT, Document


def read_json(text: str, path: str) -> list[Document]:
    """The document of a JSON text; none where it is blank.

    Raises:
        InvalidResource: It is not JSON, says a key twice, or is nested too deeply.
    """
    if not text.strip():
        return []
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_number,
            parse_int=_integer,
        )
        _check(value, 1)
    except json.JSONDecodeError as error:
        raise InvalidResource(
            Problem(
                f"not valid JSON: {error.msg[:1].lower()}{error.msg[1:]}",
                place=f"{path}:{error.lineno}:{error.colno}",
            )
        ) from None
    except RecursionError:
        raise _refused(path, f"nested more than {DEPTH_LIMIT} deep") from None
    except _NotAllowed as error:
        raise _refused(path, str(error)) from None
    return [Document(value, text[: len(text) - len(text.lstrip())].count("\n") + 1)]


class _NotAllowed(Exception):  # noqa: N818
    pass


def _refused(path: str, why: str) -> InvalidResource:
    return InvalidResource(Problem(why, place=path))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _NotAllowed(f"the key {twice[:60]!a} is given twice in one mapping")
    return result


def _no_constant(word: str) -> Any:
    raise _NotAllowed(f"{word} is not a number that JSON has")


def _number(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _NotAllowed(f"{digits[:60]} is too large a number")
    return number


def _integer(digits: str) -> int:
    if len(digits) > 40:
        raise _NotAllowed(f"{digits[:40]}… is too large a number")
    return int(digits)


def _check(value: Any, depth: int) -> None:
    if depth > DEPTH_LIMIT:
        raise RecursionError
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(key, depth)
            _check(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, depth + 1)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _NotAllowed(f"{value[:60]!a} is not Unicode text: half of a surrogate pair") from None
