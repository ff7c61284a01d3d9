"""The learned initialization: named tensors in one safetensors file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from trajshift.errors import UsageError, first_line
from trajshift.utils.files import parsed_json, replace_file, safetensors_header, shortened

METADATA_KEY = "trajshift"
_DIGEST, _ZEROS = "sha256", "0" * 64
_SEALED = {"sealed": True}
"""In the metadata of every file with a digest, so that a damaged digest is not taken for none."""
_DIGEST_FORM = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')
_SEALED_FORM = re.compile(rb'\\"sealed\\": true')
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Initialization(Mapping[str, Tensor]):
    """phi by parameter name, with what is known about it.

    Attributes:
        about: JSON values: method, seed, step, heads.
        model: the factory it was learned with, if known.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None, *, model: Any = None
    ) -> None:
        self._tensors = dict(tensors)
        self.about = dict(about or {})
        self.model = model

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and values."""
        state = sha256()
        for name, tensor in sorted(self.items()):
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return state.hexdigest()

    def to_bytes(self) -> bytes:
        """The safetensors file: its bytes depend on the tensors and `about` alone (no date, no path).

        Its metadata has the SHA-256 of the file as it is with zeros in that place.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.items()}
        about = {**self.about, **_SEALED, _DIGEST: _ZEROS}
        return _sealed(serialize(tensors, {METADATA_KEY: json.dumps(about, sort_keys=True)}))

    def save(self, path: str | Path) -> Path:
        """Writes the safetensors file, in one move."""
        path = Path(path)
        replace_file(path, self.to_bytes())
        return path


def _sealed(content: bytes) -> bytes:
    """A file with zeros in place of its digest, with the digest."""
    found = _DIGEST_FORM.search(content)
    assert found is not None
    digest = sha256(content).hexdigest().encode()
    return content[: found.start(1)] + digest + content[found.end(1) :]


def _check_digest(path: Path) -> None:
    """Compare a file with the digest in its metadata, if it has one.

    Raises:
        UsageError: the file was changed since it was written.
    """
    header = safetensors_header(path)
    found = _DIGEST_FORM.search(header)
    if found is None and _SEALED_FORM.search(header) is None:
        return  # of version 0.1, or weights from elsewhere
    if found is not None:
        state = sha256(len(header).to_bytes(8, "little"))
        state.update(header[: found.start(1)] + _ZEROS.encode() + header[found.end(1) :])
        with open(path, "rb") as file:
            file.seek(8 + len(header))
            while block := file.read(2**20):
                state.update(block)
        if state.hexdigest().encode() == found[1]:
            return
    raise UsageError(
        f"{path} is damaged: its SHA-256 is not the one that was written with it; put the file back, or delete it and "
        "resume its run, which writes it again"
    )


def is_statistic(name: str) -> bool:
    """Whether a tensor's name is that of BatchNorm statistics, which published weights bring and phi never has."""
    return name.rpartition(".")[2] in _STATISTICS


def tensor_names(module: nn.Module) -> frozenset[str]:
    """The names of all parameters and buffers of a module; a tied parameter has several."""
    return frozenset({*dict(module.named_parameters(remove_duplicate=False)), *dict(module.named_buffers())})


@dataclass(frozen=True, slots=True)
class Match:
    """Which parameters of a module an initialization filled. True if all tensors found their place."""

    matched: tuple[str, ...]
    """Copied into the module; buffers that are no statistics included."""
    missing: tuple[str, ...]
    """Parameters of the module that the initialization does not have: they keep their values (heads, usually)."""
    unexpected: tuple[str, ...]
    """Tensors that the module has no parameter for."""
    unequal: tuple[str, ...]
    """Parameters of another shape: they keep their values."""

    def __bool__(self) -> bool:
        return not (self.missing or self.unexpected or self.unequal)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} parameters matched"]
        for label in ("missing", "unexpected", "unequal"):
            names = getattr(self, label)
            if names:
                parts.append(f"{label}: {', '.join(names)}")
        return "; ".join(parts)


@overload
def load_initialization(path: str | Path) -> Initialization: ...
@overload
def load_initialization(path: str | Path, model: nn.Module) -> Match: ...


def load_initialization(path: str | Path, model: nn.Module | None = None) -> Initialization | Match:
    """Reads an initialization; with a module, copies it in and says which parameters matched.

    Args:
        path: an `initialization.safetensors`.
        model: your own module; parameters keep their dtype and device.

    Raises:
        UsageError: no such file, not a safetensors file, or not one parameter matches.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no initialization at {path}; give the path of a .safetensors file")
    try:
        _check_digest(path)
        with safe_open(path, framework="pt") as file:
            about = _about((file.metadata() or {}).get(METADATA_KEY, "{}"))
            found = Initialization({name: file.get_tensor(name) for name in list(file.keys())}, about)
    except UsageError:
        raise
    except (SafetensorError, ValueError, OSError, MemoryError) as error:
        reason = shortened(first_line(error), 200)
        raise UsageError(f"{path} is not a readable safetensors file ({reason}); save it again") from error
    return found if model is None else fill(model, found)


def _about(text: str) -> dict[str, Any]:
    """What the metadata of a file says about it.

    Raises:
        ValueError: it is not a mapping with a whole number as `step` and names as `heads`, where it has these.
    """
    about = parsed_json(text)
    if not isinstance(about, dict):
        raise ValueError("its metadata is not a mapping")
    heads = about.get("heads", [])
    if not isinstance(about.get("step", 0), int):
        raise ValueError(f"its metadata has step {shortened(repr(about['step']))}")
    if not isinstance(heads, (list, tuple)) or not all(isinstance(head, str) for head in heads):
        raise ValueError(f"its metadata has heads {shortened(repr(heads))}")
    return {name: value for name, value in about.items() if name not in (_DIGEST, *_SEALED)}


def fill(module: nn.Module, initialization: Mapping[str, Tensor]) -> Match:
    """Copies named tensors into the parameters of a module with the same name and shape, in place.

    Buffers that are no statistics (a fixed random projection) are filled too.

    Raises:
        UsageError: not one parameter matches.
    """
    parameters = dict(module.named_parameters())
    buffers = {name: buffer for name, buffer in module.named_buffers() if not is_statistic(name)}
    places = {**buffers, **parameters}
    equal = [n for n, t in initialization.items() if n in places and places[n].shape == t.shape]
    if not equal:
        raise UsageError(
            f"no parameter of {type(module).__name__} matches the initialization, which has "
            f"{', '.join(list(initialization)[:3])}, ...; use the model it was learned with"
        )
    with torch.no_grad():
        for name in equal:
            places[name].copy_(initialization[name])
    return Match(
        matched=tuple(equal),
        missing=tuple(name for name in parameters if name not in initialization),
        unexpected=tuple(name for name in initialization if name not in places),
        unequal=tuple(n for n in initialization if n in places and n not in equal),
    )
