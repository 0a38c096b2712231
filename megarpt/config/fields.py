"""What the configuration can say: every field with its dotted key, type, default and documentation, read off the schema."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megarpt.config.schema import Section


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One line of the reference; `N` in a key stands for a list index."""

    key: str
    type: str
    default: str  # as written in YAML; "required" when there is none
    doc: str


def nested_section(field: FieldInfo) -> tuple[type[Section] | None, bool]:
    """The section a field holds, and whether it holds a list of them: `data.train` gives (CorpusSource, True)."""
    for candidate in _alternatives(field.annotation):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate, False
        if typing.get_origin(candidate) is list:
            (item,) = typing.get_args(candidate)
            if isinstance(item, type) and issubclass(item, Section):
                return item, True
    return None, False


def section_at(model: type[Section], path: tuple[str, ...]) -> type[Section] | None:
    """The section class a path leads to, None when it leads elsewhere."""
    current: type[Section] = model
    position = 0
    while position < len(path):
        field = current.model_fields.get(path[position])
        inner, is_list = nested_section(field) if field else (None, False)
        if inner is None:
            return None
        current = inner
        position += 2 if is_list else 1
    return current


def iter_fields(model: type[Section], prefix: str = "") -> Iterator[FieldDoc]:
    """Every leaf field below `model`, in the order of the schema."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        inner, is_list = nested_section(field)
        if inner is None or is_list or (not field.is_required() and field.default is None):
            yield FieldDoc(key, type_name(field), _default(field), " ".join((field.description or "").split()))
        if inner is not None:
            yield from iter_fields(inner, f"{key}.N." if is_list else f"{key}.")


def type_name(field: FieldInfo) -> str:
    """The field's type in words a YAML author knows."""
    return " or ".join(_describe(each) for each in _alternatives(field.annotation))


def _alternatives(annotation: object) -> tuple[object, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(flat for each in typing.get_args(annotation) for flat in _alternatives(each))
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    return (annotation,)


def _describe(annotation: object) -> str:
    names: dict[object, str] = {int: "integer", float: "number", str: "text", bool: "true/false", type(None): "null"}
    if annotation in names:
        return names[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(each) for each in args)
    if origin is list:
        return "list"
    if origin in (dict, tuple) or annotation is dict:
        return "mapping" if origin is not tuple else "list"
    return "section"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is PydanticUndefined else str(value)
