"""Untrusted shards: read correctly, or refused in one line that names the member."""

import io
import json
import os
import struct
import tarfile
import zlib

import pytest

from megatron_sr1.data.examples import Record
from megatron_sr1.data.shard_index import index_path, read_index, scan
from megatron_sr1.data.shards import ShardReader, write_shards
from megatron_sr1.errors import DataError
from megatron_sr1.records import Message

TEXT = json.dumps({"messages": [{"role": "user", "content": "q"}], "num_images": 0}).encode()


def header(name, size, kind=b"0", field=None):
    """A ustar header with a right checksum, whatever it says."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = field or b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def member(name, data=TEXT, kind=b"0", field=None):
    return header(name, len(data), kind, field) + data + bytes(-len(data) % 512)


END = bytes(1024)
GOOD = member(b"a.json")


def pax(*records):
    def line(key, value):
        body = b" " + key + b"=" + value + b"\n"
        size = len(body) + len(str(len(body) + 2))
        return b"%d" % size + body

    return member(b"pax", b"".join(line(*r) for r in records), b"x")


HOSTILE = {
    "absolute path": (member(b"/etc/a.json") + END, "'/etc/a.json': expected a printable relative"),
    "climbing path": (member(b"../../a.json") + END, "'../../a.json': expected a printable"),
    "climbing inside": (member(b"x/../../a.json") + END, "expected a printable relative name"),
    "new line in a name": (member(b"a\nb.json") + END, r"'a\\nb.json': expected a printable"),
    "terminal escape in a name": (member(b"\x1b[2J.json") + END, r"x1b\[2J.json': expected"),
    "name not UTF-8": (member(b"\xff\xfe.json") + END, "udcfe.json': expected a printable"),
    "symbolic link": (GOOD + header(b"b.json", 0, b"2") + END, "'b.json' is a symbolic link"),
    "hard link": (GOOD + header(b"b.json", 0, b"1") + END, "'b.json' is a hard link"),
    "character device": (GOOD + header(b"b", 0, b"3") + END, "'b' is a character device"),
    "block device": (GOOD + header(b"b", 0, b"4") + END, "'b' is a block device"),
    "FIFO": (GOOD + header(b"b", 0, b"6") + END, "'b' is a FIFO"),
    "sparse member": (GOOD + member(b"b.png", b"x", b"S") + END, "'b.png' is a sparse file"),
    "unknown kind": (GOOD + header(b"b", 0, b"Z") + END, "is of type b'Z'"),
    "duplicate name": (GOOD + GOOD + END, "sample a: a.json occurs twice"),
    "giant size": (
        GOOD + header(b"b.json", 0, field=b"77777777777\0") + END,
        r"sample b: 1024 of 8589934591 bytes; the shard is truncated",
    ),
    "negative size": (
        GOOD + header(b"b.json", 0, field=b"\xff" * 12) + END,
        "not a tar header .size is",
    ),
    "size of 2^95": (header(b"b.json", 0, field=b"\x80" + b"\xff" * 11) + END, "not a tar header"),
    "checksum wrong in the middle": (GOOD + b"x" * 512 + END, "byte 1024: not a tar header"),
    "cut inside a header": (GOOD + GOOD[:300], "byte 1024: .* is it truncated"),
    "cut after a member": (GOOD, "ends without tar's end mark; is it truncated"),
    "cut inside a member": (GOOD[:540], "sample a: 28 of 65 bytes; the shard is truncated"),
    "no bytes": (b"", "no tar header"),
    "text named tar": (b"hello" * 300, "not a tar header"),
    "two tars in one": (GOOD + END + member(b"b.json") + END, "more data after the end mark"),
    "no text": (member(b"a.png") + END, "sample a: no a.json"),
    "pax: giant record": (
        header(b"p", 2**33 - 1, b"x") + END,
        "a header record of 8589934591 bytes",
    ),
    "pax: size": (pax((b"size", b"9999")) + GOOD + END, "pax record b'size'"),
    "pax: negative size": (pax((b"size", b"-1")) + GOOD + END, "pax record b'size'"),
    "pax: sparse map": (pax((b"GNU.sparse.map", b"0,9")) + GOOD + END, "GNU.sparse.map"),
    "pax: climbing path": (pax((b"path", b"../b.json")) + GOOD + END, "'../b.json': expected"),
    "pax: length 0": (member(b"p", b"0 path=x\n", b"x") + GOOD + END, "that cannot be read"),
    "pax: length of a million digits": (
        member(b"p", b"1" * 60000, b"x") + GOOD + END,
        "a pax record that cannot be read",
    ),
    "pax: global path": (member(b"p", b"10 path=x\n", b"g") + GOOD + END, "pax record b'path'"),
    "pax: and nothing after it": (pax((b"path", b"b.json")) + END, "more data after the end mark"),
    "a thousand long names": (member(b"L", b"x", b"L") * 5000 + END, "more data after the end"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_refused_in_one_line(tmp_path, name):
    data, reason = HOSTILE[name]
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(DataError, match=reason) as error:
        ShardReader(tmp_path)
    assert "s.tar" in str(error.value) and str(error.value).isprintable()


def test_a_tar_of_end_marks_holds_nothing_and_odd_but_plain_ones_are_read(tmp_path):
    (tmp_path / "a.tar").write_bytes(END)
    assert len(ShardReader(tmp_path)) == 0
    times = pax((b"mtime", b"1e999"), (b"comment", b"\xff\x00"), (b"path", "é/b.json".encode()))
    (tmp_path / "a.tar").write_bytes(GOOD + header(b"d/", 0, b"5") + times + GOOD + END)
    reader = ShardReader(tmp_path)
    assert [reader.example(i).key for i in range(2)] == ["a", "é/b"]


def test_a_member_name_is_never_used_as_a_path(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "s.tar").write_bytes(member(b"../out.json") + END)
    with pytest.raises(DataError):
        ShardReader(tmp_path / "in")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "s.tar"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link"])
def test_reading_does_not_block_on_what_is_not_a_file(tmp_path, kind):
    path = tmp_path / "s.tar"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(DataError, match="s.tar: not a regular file"):
        ShardReader(tmp_path)
    with pytest.raises(DataError, match="s.tar: not a regular file"):
        scan(path)


# False indices


@pytest.fixture
def folder(tmp_path):
    records = (Record((Message("user", f"q{i}"),), str(i)) for i in range(6))
    write_shards(records, tmp_path, samples_per_shard=3)
    return tmp_path


def rewrite_index(tar, change, right_checksum=True):
    path = index_path(tar)
    value = json.loads(path.read_text())
    value = change(value) or value
    if right_checksum and isinstance(value, dict) and "samples" in value:
        value["crc32"] = zlib.crc32(json.dumps(value["samples"]).encode())
    path.write_text(json.dumps(value))


def put(value, row, field, new):
    value["samples"][row][field] = new


LIES = {
    "outside": lambda v: put(v, 1, 1, [2**40, 100]),
    "negative": lambda v: put(v, 1, 1, [-512, 100]),
    "size of an exabyte": lambda v: put(v, 1, 1, [v["samples"][1][1][0], 2**60]),
    "not at a block": lambda v: put(v, 1, 1, [v["samples"][1][1][0] + 1, 9]),
    "floats": lambda v: put(v, 1, 1, [512.0, 9.0]),
    "text": lambda v: put(v, 1, 1, "ab"),
    "null": lambda v: put(v, 1, 1, None),
    "overlap": lambda v: put(v, 1, 1, v["samples"][0][1]),
    "a key twice": lambda v: put(v, 1, 0, v["samples"][0][0]),
    "another order": lambda v: v["samples"].reverse(),
    "a list": lambda v: [1],
    "nested": lambda v: {"tar_bytes": 1, "samples": [[[[[]]]]]},
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_cannot_be_true_is_rebuilt(folder, name):
    tar = sorted(folder.glob("*.tar"))[1]
    right = read_index(tar)
    rewrite_index(tar, LIES[name])
    assert [ShardReader(folder).example(i).answer for i in range(6)] == list("012345")
    assert read_index(tar) == right


def test_a_damaged_index_is_rebuilt_even_if_it_is_valid_json(folder):
    tar = sorted(folder.glob("*.tar"))[1]
    rewrite_index(tar, lambda v: v["samples"].pop(), right_checksum=False)
    assert [ShardReader(folder).example(i).answer for i in range(6)] == list("012345")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100000, b"", b"{}"])
def test_an_index_that_is_not_json_is_rebuilt(folder, content):
    tar = sorted(folder.glob("*.tar"))[1]
    index_path(tar).write_bytes(content)
    assert ShardReader(folder).example(4).answer == "4"


def test_the_index_of_another_shard_is_detected(folder):
    one, two = sorted(folder.glob("*.tar"))
    assert one.stat().st_size == two.stat().st_size
    index_path(two).write_bytes(index_path(one).read_bytes())
    with pytest.raises(DataError, match="sample 000000000: its place holds '000000003.json' of"):
        ShardReader(folder).example(3)


def test_a_pipe_in_place_of_an_index_is_ignored(folder):
    tar = sorted(folder.glob("*.tar"))[0]
    index_path(tar).unlink()
    os.mkfifo(index_path(tar))
    os.utime(tar, ns=(0, 0))
    assert ShardReader(folder).example(0).answer == "0"


# False counts


@pytest.mark.parametrize("count", [10**12, -1, 2.5, "3", None, True, 0])
def test_a_count_that_cannot_be_true_is_refused(folder, count):
    path = folder / "dataset.json"
    value = json.loads(path.read_text())
    value["shards"][0]["samples"] = count
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="dataset.json: .*remove it to count again"):
        ShardReader(folder)


def test_a_sample_too_large_is_refused_before_it_is_read(tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.json")
        info.size = 17 * 2**20
        tar.addfile(info, io.BytesIO(b" " * info.size))
    (tmp_path / "s.tar").write_bytes(data.getvalue())
    with pytest.raises(DataError, match="sample a: a member of 17825792 bytes, at most 16777216"):
        ShardReader(tmp_path).example(0)


def test_headers_are_built_right():
    assert struct.calcsize("512s") == len(header(b"a", 0))
    with tarfile.open(fileobj=io.BytesIO(GOOD + END)) as tar:
        assert tar.getnames() == ["a.json"]


# Keys with dots, and numbers in names


def webdataset_tar(path, names):
    text = json.dumps({"messages": [{"role": "user", "content": "q"}], "num_images": 0}).encode()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            data = text if name.endswith("json") else name.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.field
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["v1.0/img.1.json", "v1.0/img.1.0.png", "v1.0/img.2.json"], "no v1.0/img.json; it"),
        (["s0.5.json"], "no s0.json; it holds .'s0.5.json'."),
        (["s.json", "s.5.json"], "2 JSON files; it holds"),
        (["a.json", "a.1.json", "a.1.png"], "2 JSON files"),
    ],
)
def test_a_dot_in_a_key_is_refused_with_the_rule(tmp_path, names, message):
    webdataset_tar(tmp_path / "s.tar", names)
    with pytest.raises(DataError, match=message) as error:
        len(ShardReader(tmp_path))
    rule = "a key ends at the first dot of a name, so all of these are one sample"
    assert rule in str(error.value)
    assert "s.tar sample " in str(error.value)


@pytest.mark.field
@pytest.mark.parametrize(
    "names",
    [
        ["image_1", "image_2", "image_10"],
        ["a1", "a9", "a11"],
        ["0", "1", "2", "10"],
        ["page1_2", "page1_10", "page2_1"],
        ["x007", "x8", "x09", "x10"],
        ["1" * 30, "2" * 30],
    ],
)
def test_images_come_in_the_order_of_the_numbers_in_their_names(tmp_path, names):
    members = [f"s1.{name}.png" for name in names]
    for number, order in enumerate((sorted(members), sorted(members, reverse=True))):
        folder = tmp_path / str(number)
        folder.mkdir()
        webdataset_tar(folder / "s.tar", ["s1.json", *order])
        assert [f.decode() for f in ShardReader(folder).image_files(0)] == members


@pytest.mark.field
def test_an_index_of_an_earlier_version_is_rebuilt(tmp_path):
    webdataset_tar(tmp_path / "s.tar", ["s1.json", "s1.image_10.png", "s1.image_2.png"])
    assert ShardReader(tmp_path).image_files(0) == [b"s1.image_2.png", b"s1.image_10.png"]
    value = json.loads(index_path(tmp_path / "s.tar").read_text())
    value["samples"][0][2].reverse()
    del value["version"]
    value["crc32"] = zlib.crc32(json.dumps(value["samples"]).encode())
    index_path(tmp_path / "s.tar").write_text(json.dumps(value))
    assert ShardReader(tmp_path).image_files(0) == [b"s1.image_2.png", b"s1.image_10.png"]
