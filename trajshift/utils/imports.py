"""Objects named as `package.module:name`, and packages that may be missing. This module never imports torch."""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from trajshift.errors import UsageError


def load_object(path: str, role: str) -> Any:
    """The object that `package.module:name` names; modules in the current directory are found too.

    Args:
        path: the import path; the name after the colon may be dotted.
        role: what the object is used as, for the error message ("model", "source").

    Raises:
        UsageError: a path of another form, a module that cannot be imported, or a name it does not have.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")]):
        raise UsageError(f"{role} {path!r} is not an import path; write package.module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # at the end: a file here must not hide an installed package
    try:
        found: Any = import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"{role} {path!r}: cannot import {module_name!r} ({error}); "
            "install it or start from the directory that contains it"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{role} {path!r}: {module_name!r} has no {part!r}; check the name after the colon")
        found = getattr(found, part)
    return found


def need_report_extra() -> None:
    """Fail early if the report extra, which will be needed later, is not installed.

    Raises:
        UsageError: one of its packages is missing.
    """
    for package in ("scipy", "matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise missing_report_extra(package)


def missing_report_extra(package: str) -> UsageError:
    """The error for a missing package of the report extra."""
    return UsageError(f"intervals, figures and pages need {package}: pip install 'trajshift[report]'")
