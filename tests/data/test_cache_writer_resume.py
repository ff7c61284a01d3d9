"""Preparation that dies, or meets another one, and goes on. No network."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import hub, processes
from tests.helpers.hub import contents, same, small, watch
from tests.helpers.waiting import wait_until
from trajshift.data import cache_writer
from trajshift.data.cache_reader import open_cache
from trajshift.data.cache_writer import prepare_cache
from trajshift.data.decoded_images import DecodedImages
from trajshift.data.registry import find
from trajshift.errors import UsageError

pytest.importorskip("datasets")
pytest.importorskip("PIL.Image")

# Python 3.12 and later warn of any fork once torch has threads; the workers use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path) -> Iterator[None]:
    with hub.offline(tmp_path / "cache"):
        yield


def prepare_and_die(copy: Path, root: Path, writes: int, jobs: int) -> None:
    """Prepares, and is killed when the `writes`-th piece of 4 images has reached the disk."""
    import datasets

    multiprocessing.current_process()._config["daemon"] = False  # it may have children
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    datasets.disable_progress_bars()
    cache_writer.CHUNK_BYTES, cache_writer.SYNC_BYTES = 2 * 3072, 4 * 3072
    sync, seen = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal seen
        sync(file)
        seen += os.path.realpath(f"/proc/self/fd/{file}").endswith("-images.npy")
        if seen == writes:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    prepare_cache("cifar10", root, copy=copy, jobs=jobs, quiet=True)


@pytest.mark.parametrize(("writes", "jobs", "torn", "first"), [(3, 1, 0, 6), (4, 2, 5, 9), (7, 1, 0, 17)])
def test_killed_and_resumed_is_the_same_as_undisturbed(
    writes: int, jobs: int, torn: int, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, copy = small("cifar10", tmp_path)
    undisturbed = contents(prepare_cache("cifar10", tmp_path / "whole", copy=copy, quiet=True))
    died = processes.start(prepare_and_die, copy, tmp_path, writes, jobs, log=tmp_path / "log.txt")
    wait_until(lambda: not Path(f"/proc/{died.pid}").exists(), "a death")  # its workers may live on for a while
    assert not (tmp_path / "cifar10").exists()
    if torn:
        file = tmp_path / "cifar10.part" / "train-images.npy"
        os.truncate(file, file.stat().st_size - torn)
    monkeypatch.setattr(cache_writer, "SYNC_BYTES", 4 * 3072)
    monkeypatch.setattr(cache_writer, "CHUNK_BYTES", 2 * 3072)
    decoded = watch(monkeypatch)
    prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    assert decoded[0] == first  # but for the last 6, which may not have reached the disk, what was there is kept
    assert contents(tmp_path / "cifar10") == undisturbed
    assert not (tmp_path / "cifar10.part").exists()
    assert processes.wait(died) == [-signal.SIGKILL], (tmp_path / "log.txt").read_text()


def stop_at(monkeypatch: pytest.MonkeyPatch, writes: int) -> dict[Path, int]:
    """Interrupts when the disk is waited for; the bytes of each file that it has for certain."""
    sync, safe = os.fsync, {}

    def fsync(file: int) -> None:
        path = Path(os.path.realpath(f"/proc/self/fd/{file}"))
        if len([name for name in safe if name.match("*-images.npy")]) == writes:
            raise KeyboardInterrupt
        sync(file)
        safe[path] = os.fstat(file).st_size

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(cache_writer, "SYNC_BYTES", 3 * 3072)
    monkeypatch.setattr(cache_writer, "CHUNK_BYTES", 2 * 3072)
    return safe


def test_what_the_disk_had_not_written_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, copy = small("cifar10", tmp_path)
    undisturbed = contents(prepare_cache("cifar10", tmp_path / "whole", copy=copy, quiet=True))
    with pytest.MonkeyPatch.context() as patch:
        safe = stop_at(patch, writes=1)
        with pytest.raises(KeyboardInterrupt):
            prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    assert {path.name for path in safe} >= {"train-images.npy", "train-labels.npy", "test-labels.npy"}
    for file in (tmp_path / "cifar10.part").glob("*.npy"):
        data = file.read_bytes()
        file.write_bytes(data[: safe[file]].ljust(len(data), b"\0"))
    monkeypatch.setattr(cache_writer, "SYNC_BYTES", 3 * 3072)
    monkeypatch.setattr(cache_writer, "CHUNK_BYTES", 2 * 3072)
    decoded = watch(monkeypatch)
    assert contents(prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)) == undisturbed
    assert decoded[0] == 3
    (tmp_path / "whole" / "cifar10").rename(tmp_path / "older")
    with pytest.MonkeyPatch.context() as patch:  # stopped between the last steps
        patch.setattr(Path, "unlink", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_cache("cifar10", tmp_path / "whole", copy=copy, quiet=True)
    done = [*decoded]
    prepare_cache("cifar10", tmp_path / "whole", copy=copy, quiet=True)
    assert decoded == done


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_half_done_work_of_another_source_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, copy = small("cifar10", tmp_path)
    part = tmp_path / "data" / "cifar10.part"
    part.mkdir(parents=True)
    (part / "train-images.npy").write_bytes(bytes(9 * 3072))
    (part / cache_writer.PLAN_FILE).write_text('{"name": "cifar10"')
    prepare_cache("cifar10", tmp_path / "data", copy=copy, quiet=True)
    same(open_cache(tmp_path / "data", "cifar10").train, images, labels)

    other = tmp_path / "other"
    hub.repository(other, find("cifar10"), hub.pictures(23, (32, 32, 3), seed=1), images[:5])
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, writes=1)
        with pytest.raises(KeyboardInterrupt):
            prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    part = tmp_path / "cifar10.part"
    kept = contents(part)
    for given, overrides, difference in (
        (other, {}, f"its source is '{copy}', not '{other}'"),
        (copy, {"size": 8}, "its size is 32, not 8"),
    ):
        with pytest.raises(
            UsageError, match=re.escape(f"{part} contains unfinished work: {difference}; use the settings it was")
        ):
            prepare_cache("cifar10", tmp_path, copy=given, quiet=True, overrides=overrides)
    file = copy / "data" / "train-00000-of-00001.parquet"
    good = file.read_bytes()
    hub.repository(copy, find("cifar10"), images[:22], images[:5])
    with pytest.raises(UsageError, match=re.escape(f"{copy} has changed since")):
        prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    assert contents(part) == kept
    file.write_bytes(good)
    prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    same(open_cache(tmp_path, "cifar10").train, images, labels)


def test_two_processes_do_not_write_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, copy = small("cifar10", tmp_path)
    other = processes.start(hold, tmp_path / "cifar10", log=tmp_path / "log.txt")
    wait_until((tmp_path / "held").exists, "the other process")
    with pytest.raises(UsageError, match="is being written by another process"):
        prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    other.kill()
    processes.wait(other)
    opened = cache_writer.open_entry

    def slowly(*arguments: Any) -> Any:  # another process is done in the meantime
        monkeypatch.setattr(cache_writer, "open_entry", opened)
        prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
        return opened(*arguments)

    monkeypatch.setattr(cache_writer, "open_entry", slowly)
    decoded = watch(monkeypatch)
    prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)
    assert decoded == [*range(23), *range(5)]
    assert not (tmp_path / "cifar10.part").exists()
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(UsageError, match=r"cannot be locked .*; name a --root on another disk"):
        prepare_cache("cifar10", tmp_path / "network", copy=copy, quiet=True)


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def hold(folder: Path) -> None:
    with cache_writer._part(folder):
        folder.with_name("held").touch()
        signal.pause()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # torch's, which counts descriptors then
def test_a_killed_worker_is_one_sentence_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, copy = small("cifar10", tmp_path)
    undisturbed = contents(prepare_cache("cifar10", tmp_path / "whole", copy=copy, quiet=True))
    monkeypatch.setattr(cache_writer, "CHUNK_BYTES", 2 * 3072)
    monkeypatch.setattr(cache_writer, "SYNC_BYTES", 0)
    getitem = DecodedImages.__getitem__

    def killed(images: DecodedImages, place: int) -> Any:
        if place == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return getitem(images, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodedImages, "__getitem__", killed)
        with pytest.raises(UsageError, match=r"a process that loads images was killed.*; lower --jobs"):
            prepare_cache("cifar10", tmp_path, copy=copy, jobs=2, quiet=True)
    decoded = watch(monkeypatch)
    assert contents(prepare_cache("cifar10", tmp_path, copy=copy, quiet=True)) == undisturbed
    assert decoded[0] > 0


def test_more_processes_write_the_same_bytes_and_show_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, copy = small("cifar10", tmp_path)
    monkeypatch.setattr(cache_writer, "CHUNK_BYTES", 2 * 3072)
    one = contents(prepare_cache("cifar10", tmp_path / "one", copy=copy, quiet=True))
    assert capsys.readouterr().err == ""
    assert contents(prepare_cache("cifar10", tmp_path / "two", copy=copy, jobs=2)) == one
    assert re.search(r"cifar10 train: image 23/23, \S+ images/s", capsys.readouterr().err)
