"""Debian packages built in the test, and an apt-get that the test plays."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile

import pytest

from alimm.datasets.fetch import DebianPackage, FetchError, fetch_files, replaced_folder

FILES = {"usr/share/toy/a.bin": b"first file", "usr/share/toy/b.bin": b"second"}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def tar_of(files, mode="w:xz"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def deb_of(files, mode="w:xz"):
    """A package, as Debian's manual describes the format."""
    members = [
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", tar_of({"control": b"x"}) + b"x"),  # an odd length, which is padded
        ("data.tar." + mode[2:], tar_of({"usr/share/doc/toy/copyright": b"free", **files}, mode)),
    ]
    data = b"!<arch>\n"
    for name, body in members:
        data += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    return data


DEB = deb_of(FILES)


def package(version="1:2.0-1"):
    return DebianPackage("toy-data", version, sha256(DEB), {name: sha256(data) for name, data in FILES.items()})


PINNED = "toy-data_1%3a2.0-1_all.deb"


@pytest.mark.parametrize("mode", ["w:xz", "w:gz", "w:bz2"])
@pytest.mark.parametrize("give_folder", [False, True])
def test_from_a_package_file(tmp_path, mode, give_folder):
    path = tmp_path / "toy-data_3.0-1_all.deb"
    path.write_bytes(deb_of(FILES, mode))
    assert fetch_files(package(), tmp_path if give_folder else path) == FILES


def test_from_the_files(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name.rpartition("/")[2]).write_bytes(data)
    assert fetch_files(package(), tmp_path) == FILES
    (tmp_path / "b.bin").write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"b\.bin: expected sha256 {sha256(b'second')}, got {sha256(b'other')}"):
        fetch_files(package(), tmp_path)
    (tmp_path / "b.bin").unlink()
    with pytest.raises(FetchError, match=r"neither a package toy-data_\*\.deb nor all of a\.bin, b\.bin"):
        fetch_files(package(), tmp_path)
    with pytest.raises(FetchError, match="no such file or folder"):
        fetch_files(package(), tmp_path / "gone")


def test_the_pinned_version_is_checked_whole(tmp_path):
    other = deb_of({**FILES, "usr/share/toy/extra": b"x"})
    (tmp_path / PINNED).write_bytes(other)
    with pytest.raises(ValueError, match=f"damaged: expected sha256 {sha256(DEB)}, got {sha256(other)}"):
        fetch_files(package(), tmp_path / PINNED)
    (tmp_path / PINNED).rename(tmp_path / "toy-data_2.1-1_all.deb")
    assert fetch_files(package(), tmp_path) == FILES


def test_another_version_with_other_files_shows_both_digests(tmp_path):
    path = tmp_path / "toy-data_3.0-1_all.deb"
    path.write_bytes(deb_of({**FILES, "usr/share/toy/b.bin": b"new"}))
    with pytest.raises(ValueError, match=rf"expected sha256 {sha256(b'second')}, got {sha256(b'new')}.*--from"):
        fetch_files(package(), path)
    path.write_bytes(deb_of({"usr/share/toy/a.bin": b"first file"}))
    with pytest.raises(ValueError, match=r"has no usr/share/toy/b\.bin"):
        fetch_files(package(), path)


@pytest.mark.parametrize("damage", [DEB[:-40], b"text", DEB[:200], b"!<arch>\n", DEB[:-60] + b"x" * 60])
def test_damaged_packages(tmp_path, damage):
    path = tmp_path / "toy-data_9_all.deb"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"toy-data_9_all\.deb cannot be read as a Debian package"):
        fetch_files(package(), path)


def test_an_installed_package_is_used(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert fetch_files(package(), root=tmp_path) == FILES


APT = """#!/bin/sh
echo "$*" >> "$APT_LOG"
case "$*" in
  *update*) touch updated; exit 0;;
esac
[ -n "$APT_BROKEN" ] && { echo "E: no mirror" >&2; exit 100; }
case "$*" in
  *=*2.0-1) [ -n "$APT_NEWER" ] && { echo "E: version not found" >&2; exit 100; }; name=$APT_NAME;;
  *) name=toy-data_3.0-1_all.deb;;
esac
[ -n "$APT_NO_LISTS" ] && [ ! -e updated ] && { echo "E: Unable to locate package" >&2; exit 100; }
cp "$APT_DEB" "$name"
"""


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """An apt-get of our own first on the path; the returned function lists what it was asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apt-get").write_text(APT)
    (programs / "apt-get").chmod(0o755)
    (tmp_path / "toy.deb").write_bytes(DEB)
    log = tmp_path / "apt.log"
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("APT_LOG", str(log))
    monkeypatch.setenv("APT_DEB", str(tmp_path / "toy.deb"))
    monkeypatch.setenv("APT_NAME", PINNED)
    return lambda: log.read_text().splitlines()


def test_apt_brings_the_pinned_version(apt, tmp_path):
    assert fetch_files(package(), root=tmp_path) == FILES
    assert apt() == ["-q download toy-data=1:2.0-1"]


def test_apt_updates_private_lists_where_there_are_none(apt, tmp_path, monkeypatch):
    monkeypatch.setenv("APT_NO_LISTS", "1")
    assert fetch_files(package(), root=tmp_path) == FILES
    asked = apt()
    assert len(asked) == 3
    assert asked[1].endswith("update")
    assert all("Dir::State::lists=" in line for line in asked[1:])


def test_apt_takes_another_version_with_the_same_files(apt, tmp_path, monkeypatch):
    monkeypatch.setenv("APT_NEWER", "1")
    assert fetch_files(package(), root=tmp_path) == FILES
    assert apt()[-1].endswith("download toy-data")


def test_apt_fails_with_advice(apt, tmp_path, monkeypatch):
    monkeypatch.setenv("APT_BROKEN", "1")
    with pytest.raises(FetchError, match=r"cannot download toy-data: E: no mirror\. .*toy-data=1:2\.0-1.*--from PATH"):
        fetch_files(package(), root=tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "gone"))
    with pytest.raises(FetchError, match="no apt-get"):
        fetch_files(package(), root=tmp_path)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "data" / "toy"
    with replaced_folder(target) as folder:
        (folder / "README.md").write_text("one")
        (folder / "old").touch()
    with replaced_folder(target) as folder:
        (folder / "README.md").write_text("two")
    assert sorted(path.name for path in target.iterdir()) == ["README.md"]

    def fail():
        with replaced_folder(target) as folder:
            (folder / "README.md").write_text("three")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (target / "README.md").read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["toy"]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match="holds other files"), replaced_folder(tmp_path / "photos"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to"), replaced_folder(tmp_path / "file" / "x"):
        pass
