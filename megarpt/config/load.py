"""A YAML file and `section.key=value` overrides to a checked, frozen configuration.

Every mistake is collected and reported in one ConfigError: syntax, unknown keys, wrong types and values, then the rules
across sections (validate.py), which still run on whatever part of the configuration could be read.

Paths in a configuration are kept as written and are relative to the working directory of the process, not to the YAML file:
a configuration copied into a run folder keeps its meaning.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megarpt.config import validate
from megarpt.config.fields import iter_fields, nested_section, section_at, type_name
from megarpt.config.schema import COMMANDS, Section, TrainingConfig
from megarpt.config.yaml_source import parse_yaml
from megarpt.errors import ConfigError

Key = tuple[str, ...]
AnySection = TypeVar("AnySection", bound=Section)
AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)


@dataclass(slots=True)
class _Source:
    """Raw values, where each came from, and what was wrong so far."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    origin: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def where(self, key: Key) -> str:
        """The line or override that set `key`, or something below it, or the nearest section above it."""
        if key in self.origin:
            return self.origin[key]
        below = (place for each, place in self.origin.items() if each[: len(key)] == key and key)
        above = (self.origin[key[:n]] for n in range(len(key) - 1, 0, -1) if key[:n] in self.origin)
        return next(below, None) or next(above, self.name)

    def report(self, key: Key, message: str) -> None:
        """Note a mistake in the value of `key`."""
        self.problems.append(f"{self.where(key)}: {'.'.join(key)}: {message}")


@overload
def load_config(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> TrainingConfig: ...


@overload
def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, kind: type[AnyConfig], world_size: int | None = None
) -> AnyConfig: ...


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kind: type[TrainingConfig] | None = None,
    world_size: int | None = None,
) -> TrainingConfig:
    """Read, override, check.

    Args:
        path: the YAML file; a run folder's `config.yaml` is one too.
        overrides: `section.key=value`, the value in YAML; later ones win. List items by index: `data.train.0.weight=2`.
        kind: what it has to be; None takes what its key `command` says, without one a PretrainConfig.
        world_size: number of ranks when it is known; the batch is then checked against it as well.

    Raises:
        ConfigError: listing every mistake with its key, value, expectation and place.
    """
    source = _read(Path(path))
    for text in overrides:
        _override(source, text)
    return _finish(source, kind or config_kind(source.data), world_size)


def config_from_dict(data: Mapping[str, Any], *, world_size: int | None = None) -> TrainingConfig:
    """The same checks for a configuration built in Python or read from a checkpoint."""
    return _finish(_Source("configuration", data=dict(data)), config_kind(data), world_size)


def config_kind(data: Mapping[str, Any]) -> type[TrainingConfig]:
    """Which configuration the values are of, by their key `command`; those without one are of `megarpt pretrain`.

    Raises:
        ConfigError: there is no such command.
    """
    command = data.get("command", "pretrain")
    if not isinstance(command, str) or command not in COMMANDS:
        raise ConfigError(f"command: got {_show(command)}, expected one of {', '.join(COMMANDS)}: which command it is for")
    return COMMANDS[command]


def dump_resolved(cfg: TrainingConfig) -> str:
    """YAML of every field, defaults included; `load_config` of it gives an equal configuration."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, default_flow_style=False, allow_unicode=True)


def config_hash(cfg: TrainingConfig) -> str:
    """sha256 over all resolved values; independent of file layout, key order and of what was left to defaults."""
    canonical = json.dumps(cfg.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def build_section(model: type[AnySection], data: Mapping[str, Any], *, name: str) -> AnySection:
    """One section from plain values, all mistakes at once; for the options of the smaller commands."""
    source = _Source(name, data=dict(data))
    built = _schema_check(model, source)
    if isinstance(built, set):
        raise ConfigError(_message(source))
    return built


def _read(path: Path) -> _Source:
    source = _Source(str(path))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML configuration file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; expected a YAML configuration file") from error
    parsed = parse_yaml(text)
    source.origin = {key: f"{path}:{line}" for key, line in parsed.lines.items()}
    for key, line, message in parsed.problems:
        source.problems.append(f"{path}:{line}: {'.'.join(key) + ': ' if key else ''}{message}")
    if parsed.data is None and any("not valid YAML" in each for each in source.problems):
        raise ConfigError(_message(source))  # nothing below a syntax error can be trusted
    if isinstance(parsed.data, dict):
        source.data = parsed.data
    elif parsed.data is not None:
        raise ConfigError(f"{path}: got {_show(parsed.data)} at the top, expected sections such as `run:` and `data:`")
    return source


def _override(source: _Source, text: str) -> None:
    """Set one value in the raw data, making sections on the way."""
    place = f"override {text}"
    name, equals, value_text = text.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        source.problems.append(f"{place}: expected section.key=value, for example optimizer.lr=3e-4")
        return
    value = parse_yaml(value_text)
    if value.problems:
        source.problems.append(f"{place}: {value.problems[0][2]}")
        return
    holder: Any = source.data
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) >= len(holder):
                got = f"got index {part!r}, expected 0 to {len(holder) - 1}"
                source.problems.append(f"{place}: {'.'.join(key[:depth])} is a list of {len(holder)}; {got}")
                return
            slot: Any = int(part)
        elif isinstance(holder, dict):
            slot = part
            if not last and holder.get(slot) is None:
                holder[slot] = {}
        else:
            source.problems.append(f"{place}: {'.'.join(key[:depth])} is {_show(holder)}, which has no key {part!r}")
            return
        if last:
            holder[slot] = value.data
        else:
            holder = holder[slot]
    source.origin = {each: origin for each, origin in source.origin.items() if each[: len(key)] != key} | {key: place}


def _finish(source: _Source, kind: type[AnyConfig], world_size: int | None) -> AnyConfig:
    built = _schema_check(kind, source)
    partial = isinstance(built, set)
    readable = _readable(kind, source.data, built) if isinstance(built, set) else built
    for message in validate.problems(readable, world_size=world_size, partial=partial):
        key = tuple(message.partition(":")[0].split("."))
        source.problems.append(f"{source.where(key)}: {message}")
    if source.problems or isinstance(built, set):
        raise ConfigError(_message(source))
    return built


def _message(source: _Source) -> str:
    count = len(source.problems)
    head = f"{source.name}: {count} mistake{'s' if count != 1 else ''} in the configuration"
    return "\n  ".join([head, *source.problems])


def _schema_check(model: type[AnySection], source: _Source) -> AnySection | set[Key]:
    """The section, or the keys whose values cannot be used."""
    try:
        return model.model_validate(source.data)
    except ValidationError as error:
        bad: set[Key] = set()
        for detail in error.errors(include_url=False):
            key = tuple(str(part) for part in detail["loc"])
            bad.add(key)
            source.report(key, _explain(model, key, detail))
        return bad


def _explain(model: type[Section], key: Key, detail: ErrorDetails) -> str:
    kind, got = detail["type"], _show(detail["input"])
    section = section_at(model, key[:-1])
    about = section.model_fields.get(key[-1]) if section else None
    if kind == "extra_forbidden":
        return _unknown(model, key, got)
    inner, is_list = nested_section(about) if about else (section_at(model, key), False)
    expected_section = f"expected a section with the keys {', '.join(inner.model_fields)}" if inner else "expected a section"
    if kind == "missing" and inner is not None and not is_list:
        return f"missing, {expected_section}"
    if kind == "missing":
        doc = f": {' '.join(about.description.split())}" if about and about.description else ""
        return f"missing, expected {type_name(about) if about else 'a value'}{doc}"
    if kind in ("model_type", "model_attributes_type"):
        return f"got {got}, {expected_section}"
    if kind == "too_short":
        return f"got {got}, expected at least {detail['ctx']['min_length']} entry"
    if kind == "string_too_short":
        return "got empty text, expected at least one character"
    return f"got {got}, {detail['msg'].removeprefix('Value error, ').replace('Input should be', 'expected', 1)}"


def _unknown(model: type[Section], key: Key, got: str) -> str:
    suggestion = nearest_key(model, key)
    hint = f"; did you mean {suggestion}?" if suggestion else ""
    section = section_at(model, key[:-1])
    if section is not None and "mcore" in section.model_fields and suggestion is None:
        hint = f"; fields of megatron-core's own go under {'.'.join(key[:-1])}.mcore"
    elif section is not None and suggestion is None:
        hint = f"; expected one of {', '.join(section.model_fields)}"
    return f"unknown key (got {got}){hint}"


def nearest_key(model: type[Section], key: Key) -> str | None:
    """What `key` was probably meant to be: a neighbour with a similar name, else the same or a similar name elsewhere."""
    section, name = section_at(model, key[:-1]), key[-1].rpartition(".")[2]
    close = difflib.get_close_matches(name, list(section.model_fields), n=1) if section else []
    if close:
        return ".".join((*key[:-1], close[0]))
    everywhere = {each.key.rpartition(".")[2]: each.key for each in iter_fields(model)}
    elsewhere = difflib.get_close_matches(name, list(everywhere), n=1, cutoff=0.8)
    return everywhere[elsewhere[0]] if elsewhere else None


def _readable(model: type[Section], data: object, bad: set[Key], path: Key = ()) -> Any:
    """The configuration without its unusable values: reading one of those raises AttributeError, everything else works."""
    given = data if isinstance(data, Mapping) else {}
    values: dict[str, Any] = {}
    hidden = []
    for name, about in model.model_fields.items():
        here = (*path, name)
        inner, is_list = nested_section(about)
        value = given.get(name)
        if here in bad or (inner is None and any(each[: len(here)] == here for each in bad)):
            hidden.append(name)
        elif name not in given:
            continue
        elif inner is None or value is None:
            whole = "integer" in type_name(about) and isinstance(value, float) and value.is_integer()
            values[name] = int(value) if whole and value is not None else value
        elif not is_list:
            values[name] = _readable(inner, value, bad, here)
        elif any((*here, str(index)) in bad for index in range(len(value))):
            hidden.append(name)
        else:
            values[name] = [_readable(inner, item, bad, (*here, str(index))) for index, item in enumerate(value)]
    section = model.model_construct(**values)
    for name in hidden:
        section.__dict__.pop(name, None)
    return section


def _show(value: object) -> str:
    """A value as its author would recognize it, never longer than a line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"a section with the keys {', '.join(map(str, value))}" if value else "an empty section"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...'"
