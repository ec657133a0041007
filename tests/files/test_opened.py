"""A file that is opened once is one file, whatever happens to its name meanwhile."""

import multiprocessing
import os
import threading

import pytest
import torch

from w2wpp import FormatError, load_space, save_space
from w2wpp.files import opened
from w2wpp.files.container import open_container, write_container
from w2wpp.files.opened import OpenedFile

POSIX = pytest.mark.skipif(os.name == "nt", reason="links, pipes and forks of POSIX")


@pytest.fixture(params=["one handle", "opened for each read"])
def way(request, monkeypatch):
    """As on most systems, and as on Windows."""
    monkeypatch.setattr(opened, "KEEPS_OPEN", request.param == "one handle")
    return request.param


def age(path, seconds=100):
    """As if written a while ago, so that times alone tell a change."""
    os.utime(path, ns=(os.stat(path).st_mtime_ns - int(seconds * 1e9),) * 2)


def test_reads_what_is_there(tmp_path, way):
    (tmp_path / "f").write_bytes(bytes(range(200)))
    with OpenedFile(tmp_path / "f") as file:
        assert file.size == 200
        assert file.read(10, 5) == bytes(range(10, 15))
        assert file.read(195, 100) == bytes(range(195, 200)) and file.read(300, 5) == b""
        with file.mapped() as view:
            assert view[7] == 7


@pytest.mark.parametrize("old", [True, False], ids=["old", "just written"])
@pytest.mark.parametrize("change", ["renamed over", "written over", "cut", "same size and time"])
def test_a_change_is_noticed(tmp_path, way, old, change):
    path, other = tmp_path / "f", tmp_path / "other"
    path.write_bytes(b"a" * 1000)
    if old:
        age(path)
    file = OpenedFile(path)
    assert file.read(0, 4) == b"aaaa"
    if change == "renamed over":
        other.write_bytes(b"b" * 1000)
        os.replace(other, path)
    elif change == "written over":
        path.write_bytes(b"b" * 1000)
    elif change == "cut":
        os.truncate(path, 500)
    else:
        times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
        other.write_bytes(b"b" * 1000)
        os.utime(other, ns=times)
        os.replace(other, path)
    for attempt in (lambda: file.read(0, 4), file.check, lambda: file.mapped().__enter__()):
        with pytest.raises(FormatError, match="was replaced or changed since it was opened"):
            attempt()


@POSIX
def test_a_file_taken_away_can_be_read_to_the_end(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    file = OpenedFile(tmp_path / "f")
    (tmp_path / "f").unlink()
    assert file.read(0, 3) == b"abc"


def test_a_copy_under_the_same_name_is_the_same(tmp_path, way):
    """Network drives number files anew; same size, time and start are enough."""
    path, copy = tmp_path / "f", tmp_path / "copy"
    path.write_bytes(b"abc")
    age(path)
    file, times = OpenedFile(path), os.stat(path)
    copy.write_bytes(b"abc")
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(copy, path)
    assert file.read(0, 3) == b"abc"


def test_the_working_folder_may_change(tmp_path, way, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "sub").mkdir()
    file = OpenedFile("f")
    monkeypatch.chdir(tmp_path / "sub")
    assert file.read(0, 3) == b"abc"


@POSIX
@pytest.mark.parametrize("what", ["folder", "pipe", "device", "dangling", "circle", "nul", "long"])
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, what):
    path = tmp_path / "x"
    expected = {"folder": "a folder", "pipe": "a pipe", "device": "a device"}.get(
        what, "can.t be read"
    )
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path = "/dev/zero"
    elif what == "dangling":
        path.symlink_to(tmp_path / "nothing")
        expected = "link to a place where nothing is"
    elif what == "circle":
        path.symlink_to(path)
    else:
        path = {"nul": "a\0b", "long": "x" * 5000}[what]
    with pytest.raises(FormatError, match=expected):
        OpenedFile(path)


def test_a_lazily_read_space_notices_that_its_file_was_replaced(make_space, tmp_path, way):
    path, z = tmp_path / "space.safetensors", torch.zeros(1, 5)
    first, second = make_space("vae-skip"), make_space("vae-mlp")
    save_space(first, path)
    space, again = load_space(path), load_space(path)
    expected = space.decode(z)
    save_space(second, path)
    assert torch.equal(space.decode(z), expected)  # it is in memory by now
    with pytest.raises(FormatError, match="was replaced"):
        again.decode(z)


@POSIX
def test_handles_are_given_back(make_space, tmp_path):
    path = tmp_path / "space.safetensors"
    save_space(make_space("pca"), path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if before is None:
        pytest.skip("no /proc")
    for _ in range(50):
        load_space(path).decode(torch.zeros(1, 12))
        with pytest.raises(FormatError):
            open_container(path, "w2wpp.identity")
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_threads_and_forks_share_one_handle(tmp_path, way):
    tensors = {str(i): torch.full((5000,), float(i)) for i in range(20)}
    write_container(tmp_path / "f", tensors)
    file = open_container(tmp_path / "f")
    wrong = []

    def read(times=100):
        for i in range(times):
            name = str(i % 20)
            if not torch.equal(file.read(name), tensors[name]):
                wrong.append(name)

    if "fork" in multiprocessing.get_all_start_methods():
        pid = os.fork()
        if pid == 0:
            read()
            os._exit(bool(wrong))
    threads = [threading.Thread(target=read) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    if "fork" in multiprocessing.get_all_start_methods():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
