"""Published weights as the start of phi: from the Hugging Face hub, or a state dict in a file.

ResNet18 and 34 have torchvision's parameter names, which timm's files keep, so both fit as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trajshift.errors import UsageError, first_line
from trajshift.learners.initialization import Initialization, load_initialization

HUB = "hub:"
_HUB_FORM = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_TORCH_FILES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def locate(start: str | Path) -> Path:
    """The file behind a path, or behind `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION`, downloaded at first use.

    The file taken from a repository is `model.safetensors`; without a revision from the main branch.

    Raises:
        UsageError: another form, `huggingface_hub` is not installed, or no such file there.
    """
    if not str(start).startswith(HUB):
        return Path(start)
    form = _HUB_FORM.fullmatch(str(start))
    if form is None:
        raise UsageError(f"{start!r} names no weights; write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UsageError(f"weights from the hub need {error.name}: pip install 'trajshift[data]'") from error
    try:
        return Path(hf_hub_download(form["id"], "model.safetensors", revision=form["revision"]))
    # Whatever the library or the network raises, the user gets one sentence.
    except Exception as error:
        raise UsageError(f"{start} is not available from the hub ({first_line(error)}); give a local file") from error


def load_start(start: str | Path) -> Initialization:
    """Named tensors to start phi from, buffers such as BatchNorm statistics included.

    Args:
        start: an `initialization.safetensors` of a run, any other safetensors file of named tensors, a state dict
            saved by `torch.save` (.pth, .pt, .bin, .tar, .ckpt; alone, or under `state_dict`, `model_state_dict` or
            `model`, with or without the prefix `module.`), or what `locate` accepts.

    Raises:
        UsageError: no such file, or one without named tensors.
    """
    path = locate(start)
    if path.suffix not in _TORCH_FILES:
        return load_initialization(path)
    if not path.is_file():
        raise UsageError(f"no weights at {path}; give the path of a state dict")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises whatever unpickling does, and its own refusal of anything but tensors.
    except Exception as error:
        reason = first_line(error)
        if reason.startswith("Weights only"):  # torch's message continues with how to load it anyway
            reason = "it contains more than tensors"
        raise UsageError(
            f"{path} is not a readable state dict ({reason}); save the module's state_dict() alone"
        ) from error
    tensors = _tensors(found)
    if not tensors:
        raise UsageError(f"{path} contains no named tensors; save the module's state_dict()")
    return Initialization(tensors)


def _tensors(found: object) -> dict[str, Tensor]:
    """The named tensors in what a file held, without wrapper and prefix."""
    if not isinstance(found, Mapping):
        return {}
    inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), found)
    tensors = {str(name): tensor.detach() for name, tensor in inner.items() if isinstance(tensor, Tensor)}
    if all(name.startswith("module.") for name in tensors):  # as nn.DataParallel names them
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors
