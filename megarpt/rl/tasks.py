"""What completions are rewarded for, from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from megarpt.config.schema import VerifierConfig
from megarpt.errors import ConfigError
from megarpt.rl.verifiers import Closeable, Exact, Format, Math, MultipleChoice, NextToken, Verifier, WeightedSum

# A new verifier is a class and one line here.
VERIFIERS: dict[str, Callable[..., Verifier]] = {
    "next_token": NextToken,
    "math": Math,
    "multiple_choice": MultipleChoice,
    "exact": Exact,
    "format": Format,
}

_ANSWER = {"think_close", "require_thinking"}
OPTIONS = {
    "next_token": _ANSWER | {"unescape", "first_token_only"},
    "math": _ANSWER | {"require_box", "limit_s", "workers"},
    "multiple_choice": _ANSWER | {"require_box"},
    "exact": _ANSWER | {"unescape", "any_blanks"},
    "format": {"pattern", "limit_s"},
}
"""Which fields of its configuration each kind reads, besides name and weight."""


def build_verifier(configs: Sequence[VerifierConfig], *, where: str = "verifiers") -> Verifier:
    """One verifier of weight 1 as it is, others as their weighted sum. Those of mathematics hold processes: see `Closeable`.

    Args:
        configs: at least one.
        where: the name of the option, for messages.

    Raises:
        ConfigError: there is none; one has an option that its kind does not read, or lacks one; two have the same name; all
            weights are zero; or a library is missing.
    """
    if not configs:
        raise ConfigError(f"{where}: got none, expected at least one; without a verifier no completion has a reward")
    problems = [problem for place, config in enumerate(configs) for problem in _problems(config, f"{where}.{place}")]
    if problems:
        raise ConfigError("\n  ".join(problems))
    with ExitStack() as stack:  # what was built is let go of where the rest cannot be
        weighted = []
        for config in configs:
            verifier = _build(config)
            if isinstance(verifier, Closeable):
                stack.callback(verifier.close)
            weighted.append((verifier, config.weight))
        whole = weighted[0][0] if len(weighted) == 1 and weighted[0][1] == 1.0 else WeightedSum(weighted)
        stack.pop_all()
    return whole


def _build(config: VerifierConfig) -> Verifier:
    options: dict[str, Any] = {name: getattr(config, name) for name in OPTIONS[config.kind]}
    if options.get("limit_s", 0) is None:
        del options["limit_s"]
    if "think_close" in options:
        options["think_close"] = config.think_close.encode()
    return VERIFIERS[config.kind](name=config.name or config.kind, **options)


def _problems(config: VerifierConfig, where: str) -> list[str]:
    """Options that cannot take effect. A configuration that was read again names all of them, so the default is none."""
    read = OPTIONS[config.kind] | {"kind", "weight", "name"}
    found = [
        f"{where}.{name}: got {getattr(config, name)!r} with kind {config.kind}, which does not read it; leave it out"
        for name, field in type(config).model_fields.items()
        if name not in read and getattr(config, name) != field.default
    ]
    if config.kind == "format" and config.pattern is None:
        found.append(f"{where}.pattern: got null, expected the regular expression that completions have to match")
    return found
