"""Recipes as YAML, by the rules of YAML 1.2 where those of 1.1 surprise.

1e-3 is a number; `no`, `on`, `007`, `0x10`, `12:30` and `2024-01-01` are words; a key is always a word; a key given
twice is an error. What a hostile or broken file contains is refused in one sentence, and soon.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from trajshift.errors import UsageError, first_line
from trajshift.utils.files import shortened

MAX_LETTERS = 2_000_000
MAX_DEPTH = 40
MAX_NODES = 200_000
"""Values in a file once its aliases are written out; a recipe of ten thousand tasks has half as many."""
MAX_DIGITS = 400
_MERGE = "tag:yaml.org,2002:merge"
_STR = "tag:yaml.org,2002:str"


class WrittenInt(int):
    """A whole number that knows how it was written, as it may turn out to be a name."""

    text: str


class WrittenFloat(float):
    """A number that knows how it was written, as it may turn out to be a name."""

    text: str


class _Loader(yaml.SafeLoader):
    """Keys are words and given once; merge keys (`<<`) work; only plain values have tags."""

    yaml_implicit_resolvers: ClassVar[Any] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[Any] = {}

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _at(key, "a key is a list or a mapping; use a word")
            if key.tag != _MERGE:
                key.tag = _STR
            if key.value in seen:
                raise _at(key, f"{shortened(key.value)!r} is given twice")
            seen.add(key.value)
        return node

    def number(self, node: yaml.ScalarNode) -> int | float:
        """An integer or a floating-point number."""
        text, digits = node.value, node.value.replace("_", "")
        if len(text) > MAX_DIGITS:
            raise _at(node, f"a number has {len(text)} digits; at most {MAX_DIGITS} can be read")
        form = digits.lower().replace(".inf", "inf").replace(".nan", "nan")
        try:
            made: WrittenInt | WrittenFloat = WrittenInt(form) if node.tag.endswith("int") else WrittenFloat(form)
        except ValueError:
            raise _at(node, f"{shortened(text)!r} is not a number") from None
        made.text = text
        return made

    def truth(self, node: yaml.ScalarNode) -> bool:
        """True or false."""
        if node.value.lower() not in ("true", "false"):
            raise _at(node, f"{shortened(node.value)!r} is neither true nor false")
        return bool(node.value.lower() == "true")


def _at(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class _Dumper(yaml.SafeDumper):
    """YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
for _tag, _form, _first in (
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("merge", re.compile(r"<<$"), "<"),
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _form, list(_first))
for _tag, _maker in (
    ("null", yaml.SafeLoader.construct_yaml_null),
    ("bool", _Loader.truth),
    ("int", _Loader.number),
    ("float", _Loader.number),
    ("str", yaml.SafeLoader.construct_yaml_str),
    ("seq", yaml.SafeLoader.construct_yaml_seq),
    ("map", yaml.SafeLoader.construct_yaml_map),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _maker)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)  # type: ignore[type-var]
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _load(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        UsageError: too long, too deep, or with too many values.
        yaml.YAMLError: anything else that is wrong.
    """
    if len(text) > MAX_LETTERS:
        raise UsageError(f"has {len(text):,} letters; at most {MAX_LETTERS:,} are read")
    _refuse_what_explodes(text)
    try:
        return yaml.load(text, _Loader)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError) as error:
        raise yaml.YAMLError(shortened(first_line(error), 200)) from None


def _refuse_what_explodes(text: str) -> None:
    """Count values, those behind aliases as often as they are used, before any of them is built."""
    open_at: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    count = 0
    for event in yaml.parse(text, _Loader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if any(name == anchor for name, _ in open_at):
                raise UsageError(f"has the alias *{shortened(str(anchor))} inside of what it stands for")
            count += sizes.get(str(anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_at.append((anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_at.pop()
            if name is not None:
                sizes[name] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
        if len(open_at) > MAX_DEPTH:
            raise UsageError(f"is nested more than {MAX_DEPTH} levels deep")
        if count > MAX_NODES:
            raise UsageError(f"has more than {MAX_NODES:,} values once its aliases are written out")


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        UsageError: not YAML, or not a mapping at the top.
    """
    try:
        data = _load(text)
    except UsageError as error:
        raise UsageError(f"{where} {error}; a recipe is a short file") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise UsageError(f"{where} is not valid YAML: {shortened(problem, 300)}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{where} is not a mapping of fields; a recipe starts with lines such as method: reptile")
    return data


def parse_value(text: str) -> Any:
    """The value of an override, read as YAML (`1e-3`, `true`, `null`, `[a, b]`, words).

    Raises:
        UsageError: it is too long, too deep, or a number of too many digits.
    """
    try:
        return _load(text)
    except UsageError as error:
        raise UsageError(f"the value {shortened(text, 40)!r} {error}") from None
    except yaml.YAMLError as error:
        if "digits" in str(error):
            raise UsageError(f"the value {shortened(text, 40)!r}: {getattr(error, 'problem', error)}") from None
        return text


def as_written(value: Any) -> Any:
    """A number or a truth value as the word that it was written as; anything else as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return getattr(value, "text", str(value))
    return value


def dump(data: dict[str, Any]) -> str:
    """Plain mappings as YAML that `read_yaml` reads back, in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
