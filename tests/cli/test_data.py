"""`trajshift data` as a user types it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import hub
from trajshift.cli.main import main
from trajshift.data import cache_writer
from trajshift.data.registry import find, registered

pytest.importorskip("datasets")
pytest.importorskip("PIL.Image")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with hub.offline(tmp_path / "cache"):
        yield


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `trajshift data ...` in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["trajshift", "data", *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def copies() -> None:
    images = hub.pictures(12, (32, 32, 3))
    hub.repository(Path("copy"), find("cifar10"), images, images[:10])


def test_list_says_what_is_registered_and_what_was_verified(data: Command) -> None:
    status, out, _ = data("list")
    assert status == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()[:1]}
    for name, entry in registered().items():
        assert rows[name][1:4] == [entry.hub, "never", "-"]
    assert rows["stanford-dogs"][4:] == ["84", "3", "120", "12,000", "8,580"]
    status, out, _ = data("list", "stl10")
    assert status == 0
    assert f"  revision: {find('stl10').revision}\n" in out
    assert "  verified: null\n" in out
    assert "  source of classes, images: Coates et al. (2011)\n" in out


def test_prepare_and_check(data: Command) -> None:
    copies()
    status, out, err = data("prepare", "cifar10", "--from", "copy", "--jobs", "1")
    assert (status, out) == (0, "cifar10 is in data/cifar10\n")
    assert "warning: cifar10: 12 images in split 'train' were found, 50000 are registered" in err
    assert "cifar10 test: image 10/10" in err
    status, out, _ = data("check")
    assert status == 0
    assert out.splitlines() == [
        "cifar10: complete; 12 train, 10 test images of 3x32x32, 10 classes",
        "  warning: 12 images in split 'train' were found, 50000 are registered",
        "  warning: 10 images in split 'test' were found, 10000 are registered",
    ]
    assert [line.split()[3] for line in data("list")[1].splitlines() if line.strip().startswith("cifar10 ")] == ["yes"]
    with Path("data/cifar10/test-labels.npy").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\x05")
    status, out, err = data("check", "cifar10")
    assert status == 2
    assert "test-labels.npy is damaged" in out
    assert err == "trajshift: 1 of 1 caches are damaged, missing or wrong: cifar10\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prepare", "cifar"], "unknown data set 'cifar'; did you mean 'cifar10'?"),
        (["prepare", "size=3"], "no data set was named; see: trajshift data list"),
        (
            ["prepare", "cifar10", "--from", "copy", "sise=3"],
            "has no field 'sise' to set; did you mean 'size'?",
        ),
        (["prepare", "cifar10", "--from", "copy", "--jobs", "0"], "--jobs is 0; use at least 1"),
        (
            ["prepare", "cifar10", "svhn", "--from", "copy"],
            "--from is a copy of one repository, but 2 are named",
        ),
        (
            ["prepare", "cifar10", "--from", "copi"],
            "copi: no such file or folder; give a local copy of",
        ),
        (
            ["prepare", "cifar10", "--from", "copy", "label=digit"],
            "copy has no column 'digit'; set label to one of",
        ),
        (["prepare", "cifar10", "--from", "copy", "--quiet", "--root", "copy/file"], "cannot write to copy/file"),
        (["prepare", "cifar10", "stl10", "hub=a/b"], "hub= is one repository, but 2 data sets are named; name one"),
        (
            ["prepare", "cifar10", "hub=copy"],
            "copy is also a folder here and would be used instead of the repository on the",
        ),
        (["prepare", "cifar10"], "uoft-cs/cifar10 cannot be opened as a data set"),
        (["check"], "there is no cache in data; make one with: trajshift data prepare NAME --root data"),
        (["check", "svhn"], "1 of 1 caches are damaged, missing or wrong: svhn"),
        (["list", "svn"], "unknown data set 'svn'; did you mean 'svhn'?"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, data: Command) -> None:
    copies()
    Path("copy/file").touch()
    status, _, err = data(*arguments)
    assert status == 2
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert not Path("data").exists()


def test_a_full_disk_names_the_command_that_goes_on(data: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    images = hub.pictures(300, (4, 4, 3))
    hub.repository(Path("copy"), find("cifar10"), images, images[:10])
    begin, limits = cache_writer._begin, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(part: Path, *others: Any) -> None:
        (part / cache_writer.PLAN_FILE).touch()
        monkeypatch.setattr(cache_writer, "replace_file", lambda *_: None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            begin(part, *others)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(cache_writer, "_begin", on_a_full_disk)
    status, _, err = data("prepare", "cifar10", "size=4", "--from", "copy", "--root", "my data", "--quiet")
    assert status == 2
    assert err == (
        "trajshift: no space left on the disk of my data; free some and continue with: trajshift data prepare cifar10"
        " size=4 --from copy --root 'my data' --quiet\n"
    )


def test_a_missing_extra_is_named(data: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    status, _, err = data("prepare", "cifar10")
    assert status == 2
    assert "pip install 'trajshift[data]'" in err
