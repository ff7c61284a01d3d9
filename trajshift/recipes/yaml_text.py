"""Recipes as YAML: numbers such as 1e-3 are numbers, a key given twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

from trajshift.errors import UsageError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        UsageError: not YAML, or not a mapping at the top.
    """
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{where} is not a mapping of fields; a recipe starts with lines such as method: reptile")
    return data


def parse_value(text: str) -> Any:
    """The value of an override, read as YAML (`1e-3`, `true`, `null`, `[a, b]`, words)."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def dump(data: dict[str, Any]) -> str:
    """Plain mappings as YAML that `read_yaml` reads back, in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
