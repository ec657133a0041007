"""No reader ever meets half a file, and nothing is left behind: kills, full disks, two writers at once."""

import contextlib
import ctypes
import errno
import multiprocessing
import os
import random
import signal
import stat
import sys
import time

import pytest
import torch

from w2wpp import ConfigError, FormatError, WriteError, load_identity, save_identity
from w2wpp.files import writing
from w2wpp.files.container import open_container, write_container
from w2wpp.files.pictures import save_picture
from w2wpp.files.writing import OLD, is_leftover, remove_leftovers, replacing, write_text
from w2wpp.identity import Identity
from w2wpp.training.fit_delta import lora_files
from w2wpp.training.gather import find_loras

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")


def write(path, data):
    with replacing(path) as file:
        file.write(data)


def whole_file(path, number):
    """A file of which every part tells who wrote it."""
    t = {"z": torch.full((64, 1000), float(number)), "rest": torch.full((50,), number)}
    write_container(path, t, format="w2wpp.test", config={"number": number})


def number_in(path):
    """Who wrote a file; fails if it is torn or mixed."""
    with open_container(path, "w2wpp.test") as file:
        numbers = {file.config["number"], *file.read("z").unique().tolist()}
        numbers |= set(file.read("rest").tolist())
    assert len(numbers) == 1, f"mixed: {numbers}"
    return numbers.pop()


@contextlib.contextmanager
def forked(work):
    """Run work() in another process; yields its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@FORKS
def test_killed_writers_leave_a_whole_file_and_no_litter(tmp_path, pytestconfig):
    path = tmp_path / "face.safetensors"
    started = time.monotonic()
    whole_file(path, 0)
    takes = time.monotonic() - started
    seen, draw = set(), random.Random(0)
    reader, writer = multiprocessing.Pipe()

    def work():
        writer.send("begun")
        for i in range(1, 10_000):
            whole_file(path, i)

    for _ in range(pytestconfig.getoption("kills")):
        with forked(work) as pid:
            reader.recv()
            time.sleep(draw.uniform(0, 3 * takes))
            os.kill(pid, signal.SIGKILL)
        seen.add(number_in(path))
    assert len(seen) > 1, "no writer got anywhere before it was killed"
    left = set(os.listdir(tmp_path)) - {path.name}
    assert left and all(map(is_leftover, left)), left  # kills did hit writers at work
    assert [p.name for p in tmp_path.glob("*.safetensors")] == [path.name]
    for name in left:
        os.utime(tmp_path / name, (0, 0))
    whole_file(path, 1)
    assert os.listdir(tmp_path) == [path.name]


@FORKS
def test_two_writers_at_once_and_a_reader_never_mix(tmp_path):
    path, reads = tmp_path / "face.safetensors", 0
    whole_file(path, 0)

    def writer(number):
        def work():
            while True:
                whole_file(path, number)

        return work

    with forked(writer(1)), forked(writer(2)):
        seen, end = set(), time.monotonic() + 3
        while time.monotonic() < end or (len(seen) < 2 and time.monotonic() < end + 60):
            with contextlib.suppress(FormatError):  # replaced between two reads, and noticed
                seen.add(number_in(path))
            reads += 1
    assert {1, 2} <= seen and reads > 10


@FORKS
def test_a_writer_at_work_is_not_disturbed_however_long_it_takes(tmp_path):
    reader, writer = multiprocessing.Pipe()

    def work():
        with replacing(tmp_path / "slow") as file:
            writer.send(file.name)
            time.sleep(60)

    with forked(work):
        temporary = reader.recv()
        os.utime(temporary, (0, 0))
        write(tmp_path / "quick", b"x")
        assert os.path.exists(temporary)
    write(tmp_path / "quick", b"x")
    assert os.listdir(tmp_path) == ["quick"]


def test_leftovers_of_earlier_releases_go_too_and_nothing_else_does(tmp_path):
    old = [".face.safetensors.a1b2c3d4.part", f".w2wpp-{'0' * 12}.part"]
    mine = ["mine.part", ".face.part", ".w2wpp-notes.part", "face.safetensors.a1b2c3d4.part"]
    for name in [*old, *mine]:
        (tmp_path / name).write_bytes(b"x")
    for folder, inside in (
        (".import-a1b2c3d4", "draft.safetensors"),
        (".import-z9y8x7w6", "mine.txt"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / inside).write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert (tmp_path / old[0]).exists(), "it is young: its writer may be on another machine"
    for root, _, names in os.walk(tmp_path):
        for name in names:
            os.utime(os.path.join(root, name), (time.time() - OLD - 10,) * 2)
    write(tmp_path / "face.safetensors", b"x")
    assert set(os.listdir(tmp_path)) == {*mine, ".import-z9y8x7w6", "face.safetensors"}


def test_leftovers_are_no_members_of_a_collection(tmp_path):
    whole_file(tmp_path / "a.safetensors", 1)
    whole_file(tmp_path / ".import-a1b2c3d4" / "draft.safetensors", 1)
    assert find_loras([tmp_path]) == lora_files([tmp_path]) == [tmp_path / "a.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_keeps_pointing_and_its_target_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "face", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "there") == ["face"]
    target.unlink()
    write(link, b"again")  # a link to a place where nothing is yet
    assert link.is_symlink() and target.read_bytes() == b"again"
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(WriteError, match="circle"):
        write(circle, b"x")


@pytest.mark.skipif(os.name == "nt", reason="devices and pipes of POSIX")
def test_only_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    cases = {tmp_path / "folder": "a folder", tmp_path / "pipe": "a pipe", "/dev/null": "a device"}
    cases |= {tmp_path / "null": "a device"}
    for path, what in cases.items():
        with pytest.raises(ConfigError, match=f"is {what} and is not replaced"):
            write(path, b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    for path in (".", "..", f"{tmp_path}/", "", f"{tmp_path}/."):
        with pytest.raises(ConfigError, match=r"folder|expected the name"):
            write(path, b"x")
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "file" / "face", "a\0b", tmp_path / ("x" * 300), "\udcff\ud800"):
        with pytest.raises((ConfigError, WriteError)):
            write(path, b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "null", "pipe"]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a" * 243 + ".safetensors"])
def test_names_up_to_the_limit_of_the_file_system(tmp_path, name):
    write(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"


def test_permissions_are_the_users_or_those_of_the_file_replaced(tmp_path):
    mask = os.umask(0o027)
    try:
        write(tmp_path / "new", b"x")
    finally:
        os.umask(mask)
    if os.name != "nt":
        assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o640
        os.chmod(tmp_path / "new", 0o600)
        write(tmp_path / "new", b"y")
        assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o600


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    write(tmp_path / "face", b"x")
    assert calls[:2] == ["fsync", "replace"]


def everything_that_writes(path):
    from PIL import Image

    return {
        "container": lambda: whole_file(path, 1),
        "identity": lambda: save_identity(Identity(torch.zeros(4000, 64), "f"), path),
        "text": lambda: write_text(path, "x" * 1_000_000),
        "picture": lambda: save_picture(Image.effect_noise((700, 700), 90), path),
    }


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("kind", ["container", "identity", "text", "picture"])
def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path, kind):
    import resource

    path = tmp_path / "face.png"
    path.write_bytes(b"before")
    work = everything_that_writes(path)[kind]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"face\.png could not be written: File too large"):
            work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["face.png"]
    work()
    assert path.stat().st_size > 50_000


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_at_the_very_end(tmp_path, monkeypatch, call):
    (tmp_path / "face").write_bytes(b"before")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(writing.os, call, fail)
        with pytest.raises(WriteError, match="face could not be written: No space left on device"):
            write(tmp_path / "face", b"new")
    assert (tmp_path / "face").read_bytes() == b"before" and os.listdir(tmp_path) == ["face"]


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "face") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "a drive without hard links"])
def test_a_new_file_never_replaces_another(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(writing.os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no")))
    (tmp_path / "taken").write_bytes(b"mine")
    with pytest.raises(FileExistsError), replacing(tmp_path / "taken", new=True) as file:
        file.write(b"x")
    assert (tmp_path / "taken").read_bytes() == b"mine"
    with replacing(tmp_path / "free", new=True) as file:
        file.write(b"x")
    assert sorted(os.listdir(tmp_path)) == ["free", "taken"]


def test_a_sealed_file_is_the_one_that_was_announced(tmp_path):
    path = tmp_path / "f"
    config = {"sum": "0" * 10, "other": [1]}

    def seal(file):
        return {**config, "sum": f"{int(file.read('a').sum()):010}"}

    write_container(path, {"a": torch.arange(5)}, format="w2wpp.test", config=config, seal=seal)
    assert open_container(path, "w2wpp.test").config == {"sum": "0000000010", "other": [1]}
    with pytest.raises(FormatError, match="length"):
        write_container(path, {}, format="w2wpp.test", config=config, seal=lambda _: {})
    assert os.listdir(tmp_path) == ["f"]


def mount_small_disk(folder):
    """A file system of two megabytes in a folder, that only this process sees and that goes with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, recursive = 0x20000, 0x10000000, 1 << 18, 1 << 14
    if libc.unshare(new_mounts | (new_user if os.geteuid() else 0)):
        return False
    if libc.mount(None, b"/", None, private | recursive, None):
        return False
    return libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=2m") == 0


@FORKS
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts of Linux")
def test_a_disk_that_is_really_full(tmp_path):
    reader, writer = multiprocessing.Pipe()
    path = tmp_path / "face.safetensors"

    def work():
        if not mount_small_disk(tmp_path):
            writer.send(None)
            return
        said = ""
        save_identity(Identity(torch.ones(1, 64), "f"), path)
        try:
            save_identity(Identity(torch.ones(20_000, 64), "f"), path)
        except WriteError as e:
            said = str(e)
        writer.send((said, os.listdir(tmp_path), len(load_identity(path))))

    with forked(work):
        answer = reader.recv()
    if answer is None:
        pytest.skip("this machine lets nobody mount")
    said, names, count = answer
    assert "could not be written: No space left on device" in said
    assert names == ["face.safetensors"] and count == 1
