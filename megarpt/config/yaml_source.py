"""YAML text to plain data that still knows the line every key came from.

The scalars are those people expect of a configuration rather than YAML 1.1's: `1e-3` is a number, `yes`, `on`, `12:30` and
`2026-01-01` are text, `1_000_000` is an integer. Keys are always text. A key given twice is a mistake, not the last one wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with its own idea of what an unquoted scalar is."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


@dataclass(slots=True)
class Parsed:
    """`lines` has an entry for every key and list item; `problems` are (path, line, what is wrong)."""

    data: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[Path, int, str]] = field(default_factory=list)


def parse_yaml(text: str) -> Parsed:
    """Read one document. Never raises: syntax errors are problems too."""
    parsed = Parsed()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            parsed.data = _plain(loader, node, (), parsed, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        parsed.problems.append(((), mark.line + 1 if mark else 1, f"not valid YAML: {error.problem or error.context}"))
    except (yaml.YAMLError, ValueError) as error:
        parsed.problems.append(((), 1, f"not valid YAML: {' '.join(str(error).split())}"))
    return parsed


def _plain(loader: _Loader, node: yaml.Node, path: Path, out: Parsed, open_nodes: tuple[yaml.Node, ...]) -> Any:
    line = node.start_mark.line + 1
    if any(node is each for each in open_nodes):
        out.problems.append((path, line, "an alias that contains itself"))
        return None
    inside = (*open_nodes, node)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            here = (*path, str(index))
            out.lines[here] = item.start_mark.line + 1
            items.append(_plain(loader, item, here, out, inside))
        return items
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        at = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            out.problems.append((path, at, "a key that is not text"))
            continue
        key, here = key_node.value, (*path, key_node.value)
        if key == "<<":
            out.problems.append((here, at, "merge keys are not supported; write the keys out"))
        elif key in values:
            out.problems.append((here, at, f"given twice, first on line {out.lines[here]}; keep one"))
        else:
            out.lines[here] = at
            values[key] = _plain(loader, value_node, here, out, inside)
    return values
