"""Checkpoint files that attack whoever reads them: name -> how to make one.

What could run code runs ``touch CANARY``.  Run as a program, this module reads files as training does
and prints what came of each.
"""

import io
import json
import os
import pickle
import resource
import stat
import struct
import sys
import tarfile
import zipfile

import numpy as np
import torch

COUNT = 70_000  # of a tensor's elements: two instructions hold this number, for storage and shape
HUGE = 2**31 - 1  # of them: 8 GB


class Call:
    """Pickled as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(canary):
    return Call(os.system, f"touch {canary}")


def zoo(value=None, **entries):
    model = {"stem.conv1.weight": np.zeros((2, 3), np.float32) if value is None else value}
    return {"model": model, "__author__": "somebody", "matching_heuristics": True, **entries}


# --- pickles -------------------------------------------------------------------------------------


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def pkl(data, protocol=4):
    """A maker of files that hold an object, or what a function of the canary's path returns."""

    def make(path, canary):
        value = data(canary) if callable(data) else data
        value = value if isinstance(value, bytes) else pickle.dumps(value, protocol)
        with open(f"{path}.pkl", "wb") as f:
            f.write(value)
        return f"{path}.pkl"

    return make


def set_state(canary):
    """A class is given os.system as its __setstate__, then an object of it a state."""
    head = b"\x80\x02cargparse\nNamespace\nq\x00"
    method = b"N}" + text("__setstate__") + b"cos\nsystem\ns\x86b0"
    return head + method + b"h\x00)\x81" + text(f"touch {canary}") + b"b."


def dotted(canary):
    return b"\x80\x04\x8c\x09posixpath\x8c\x09os.system\x93" + text(f"touch {canary}") + b"\x85R."


def built_twice(canary):
    """The function itself comes out of a call."""
    get = b"\x80\x02c__builtin__\ngetattr\n(c__builtin__\n__import__\n" + text("os") + b"\x85R"
    return get + text("system") + b"tR" + text(f"touch {canary}") + b"\x85R."


def array(shape=b"K\x02K\x03", code="f4", raw=b"B" + struct.pack("<I", 24) + bytes(24)):
    """An array's pickle, with any part replaced by other instructions."""
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    kind = b"cnumpy\ndtype\n" + text(code) + b"K\x00K\x01\x87R"
    order = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01(" + shape + b"t" + kind + order + b"\x89" + raw + b"tb"
    return b"\x80\x03" + start + state + b"."


def many_arrays(canary):
    """A thousand arrays from the same million bytes."""
    one = array(b"J\x40\x42\x0f\x00", "u1", b"h\x07")[2:-1]
    raw = b"B" + struct.pack("<I", 10**6) + bytes(10**6) + b"q\x070"
    return b"\x80\x03" + raw + b"](" + one * 1000 + b"e."


def many_strings(canary):
    start = b"\x80\x02" + text("x" * 10**6) + b"q\x000c_codecs\nencode\nq\x010]("
    return start + (b"h\x01h\x00" + text("latin1") + b"\x86R") * 1000 + b"e."


def many_dictionaries(canary):
    pairs = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(10**4)) + b"e"
    start = b"\x80\x02" + pairs + b"q\x000ccollections\nOrderedDict\nq\x010]("
    return start + b"h\x01h\x00\x85R" * 1000 + b"e."


def laughs(canary):
    """Lists of ten times the list before: 10 ** 100 elements for whoever prints them."""
    lists = b"]q\x00" + b"".join(
        b"0](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(100)
    )
    model = text("model") + b"}" + text("a") + lists + b"s"
    return b"\x80\x02}(" + model + text("__author__") + text("x") + b"u."


# --- PyTorch's files -----------------------------------------------------------------------------


def saved(data, legacy=False):
    def make(path, canary):
        value = data(canary) if callable(data) else data
        torch.save(value, f"{path}.pth", _use_new_zipfile_serialization=not legacy)
        return f"{path}.pth"

    return make


def weights():
    return {"model": {"a": torch.zeros(COUNT)}}


def edited(edit, legacy=False, **options):
    """A maker of files whose pickle has been edited: bytes, canary -> bytes."""

    def make(path, canary):
        path = saved(weights(), legacy)(path, canary)
        if legacy:
            with open(path, "rb") as f:
                data = edit(f.read(), canary)
            with open(path, "wb") as f:
                f.write(data)
        else:
            rewrite(path, {"data.pkl": lambda data: edit(data, canary)}, **options)
        return path

    return make


def rewrite(path, edits, extra=(), packed=(), mode=0, rename=lambda name: name):
    """Write a zip archive anew, as PyTorch does but for what the arguments say."""
    with zipfile.ZipFile(path) as old:
        files = [(x.filename, old.read(x)) for x in old.infolist()]
    top = files[0][0].partition("/")[0]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in files:
            short = name.partition("/")[2]
            kind = zipfile.ZIP_DEFLATED if short in packed else zipfile.ZIP_STORED
            entry = zipfile.ZipInfo(rename(name))
            entry.external_attr = mode << 16 if short == "data/0" else 0
            new.writestr(entry, edits.get(short, lambda data: data)(data), kind)
        for name, data in extra:
            new.writestr(zipfile.ZipInfo(name.format(top=top)), data)


def archive(**options):
    def make(path, canary):
        path = saved(weights())(path, canary)
        rewrite(path, options.pop("edits", {}), **options)
        return path

    return make


def numbers(which, value):
    """Replace some of the places where the pickle has the tensor's size."""

    def edit(data, canary):
        parts = data.split(b"J" + struct.pack("<i", COUNT))
        assert len(parts) == 3  # in the storage and in the shape
        values = [value if i in which else COUNT for i in range(2)]
        new = [b"J" + struct.pack("<i", x) for x in values]
        return parts[0] + new[0] + parts[1] + new[1] + parts[2]

    return edit


def calls(function, argument):
    """A pickle that only calls something."""

    def edit(data, canary):
        return b"\x80\x02}" + text("model") + function + argument + b"\x85Rs."

    return edit


def bomb(path, canary):
    path = saved({"model": {"a": torch.zeros(2**24)}})(path, canary)
    rewrite(path, {}, packed=["data/0"])
    assert os.path.getsize(path) < 2**17
    return path


def appended(path, canary):
    """Two archives in one file: readers that look from the end find the other one."""
    path = saved(weights())(path, canary)
    other = saved({"model": touch(canary)})(f"{path}.other", canary)
    with open(path, "ab") as f, open(other, "rb") as g:
        f.write(g.read())
    os.remove(other)
    return path


def commented(path, canary, comment):
    """An archive with a comment, which may look like the end of an empty one."""
    path = saved(weights())(path, canary)
    with zipfile.ZipFile(path, "a") as f:
        f.comment = comment
    return path


def overlapping(path, canary):
    """Two entries of the directory share one place in the file."""
    path = saved(weights())(path, canary)
    with zipfile.ZipFile(path, "a") as f:
        twin = zipfile.ZipInfo(f.infolist()[0].filename.partition("/")[0] + "/data/1")
        original = next(x for x in f.infolist() if x.filename.endswith("data/0"))
        twin.header_offset, twin.CRC = original.header_offset, original.CRC
        twin.file_size = twin.compress_size = original.file_size
        f.filelist.append(twin)
        f.NameToInfo[twin.filename] = twin
        f._didModify = True
    return path


def long_directory(path, canary):
    """A table of contents of 300,000 entries, each of which a reader makes an object for."""
    path = f"{path}.pth"
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0
    )
    directory = (entry + b"a/b") * 300_000
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 33, 0, 0, 0, 3, 0) + b"a/b"
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, len(directory), len(local), 0)
    with open(path, "wb") as f:
        f.write(local + directory + end)
    return path


def tar(path, canary):
    with tarfile.open(f"{path}.pth", "w") as f:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(touch(canary) if name == "storages" else 0)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            f.addfile(entry, io.BytesIO(data))
    return f"{path}.pth"


def linked_tar(path, canary):
    """An archive with a link out of the folder that it is unpacked to."""
    with tarfile.open(f"{path}.pth", "w") as f:
        entry = tarfile.TarInfo("storages")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        f.addfile(entry)
    return f"{path}.pth"


# --- safetensors ---------------------------------------------------------------------------------


def safe(header, data=bytes(16), length=None):
    def make(path, canary):
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        with open(f"{path}.safetensors", "wb") as f:
            f.write(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
        return f"{path}.safetensors"

    return make


def entry(shape=(4,), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# -------------------------------------------------------------------------------------------------

#: name -> (maker, what the message says); these run code where they are trusted.
LIVE = {
    "reduce": (pkl(touch), "system"),
    "reduce, protocol 0": (pkl(touch, 0), "system"),
    "reduce, protocol 5": (pkl(touch, 5), "system"),
    "reduce in a zoo file": (pkl(lambda c: zoo(touch(c))), "system"),
    "reduce in the author": (pkl(lambda c: zoo(__author__=touch(c))), "system"),
    "reduce as a dictionary's key": (pkl(lambda c: {touch(c): 1}), "system"),
    "eval": (pkl(lambda c: Call(eval, f"open({c!r}, 'w').close()")), "builtins.eval"),
    "a file is opened": (pkl(lambda c: Call(open, c, "w")), "open"),
    "setstate": (pkl(set_state), "argparse.Namespace"),
    "a nested global": (pkl(dotted), "posixpath.os.system"),
    "a global out of a call": (pkl(built_twice), "__builtin__.getattr"),
    "INST": (pkl(lambda c: b"(S'touch %b'\nios\nsystem\n." % c.encode()), "os.system"),
    "OBJ": (pkl(lambda c: b"(cos\nsystem\nS'touch %b'\no." % c.encode()), "os.system"),
    "an array of objects": (pkl(lambda c: np.array([touch(c)], object)), "array of type O|system"),
    "pth": (saved(lambda c: {"model": touch(c)}), "system"),
    "pth beside weights": (saved(lambda c: {**weights(), "trainer": touch(c)}), "system"),
    "legacy pth": (saved(lambda c: {"model": touch(c)}, legacy=True), "system"),
    "a tar archive": (tar, ""),
}

ENCODE = b"\x80\x02c_codecs\nencode\n"
TERABYTE = struct.pack("<Q", 2**40) + b"x."
MISSING = "but only 2 remain|cut short"
REBUILD = b"torch._utils\n_rebuild_tensor_v2"

#: name -> (maker, what the message says); these want memory or an odd call, or are broken.
DEAD = {
    "an extension": (pkl(b"\x80\x02\x82\x01."), "extension code"),
    "a large extension": (pkl(b"\x80\x02\x84\xff\xff\xff\x7f."), "extension code"),
    "a persistent id": (pkl(b"Pwhatever\n."), "persistent"),
    "a persistent object": (pkl(b"\x80\x02K\x01Q."), "persistent"),
    "a buffer from outside": (pkl(b"\x80\x05\x97."), "out-of-band"),
    "a new object": (pkl(b"\x80\x02cnumpy\nndarray\n)\x81."), "must be a type"),
    "a new function": (pkl(ENCODE + b")\x81."), "must be a type"),
    "a call of a class": (pkl(b"\x80\x02cnumpy\nndarray\nK\x07\x85R."), "not callable"),
    "a call of text": (pkl(b"\x80\x02" + text("os.system") + b")R."), "not callable"),
    "a state for a list": (pkl(b"\x80\x02]}b."), "no attribute"),
    "a state for a function": (pkl(ENCODE + b"}" + text("a") + b"Nsb."), "no attribute"),
    "a name that paints the terminal": (pkl(b"c\x1b[2Jos\nsystem\n."), r"\\x1b\[2Jos"),
    "objects": (pkl(np.array([{}], object)), "an array of type O"),
    "records": (pkl(np.zeros(2, "i4,f4")), "an array of type V8"),
    "a wide type": (pkl(array(code="V1000000000")), "an array of type V"),
    "an array of 4 TB": (pkl(array(b"J\x00\x00\x00\x40J\x00\x04\x00\x00")), "has 24 bytes"),
    "an array of negative size": (pkl(array(b"J\xff\xff\xff\xff")), "not a tuple of sizes"),
    "an array without numbers": (pkl(array(b"N")), "not a tuple of sizes"),
    "arrays of the same bytes": (pkl(many_arrays), "more than it holds"),
    "strings of the same bytes": (pkl(many_strings), "more than it holds"),
    "dictionaries of the same pairs": (pkl(many_dictionaries), "more than it holds"),
    "bytes of 1 TB": (pkl(b"\x80\x04\x8e" + TERABYTE), MISSING),
    "text of 1 TB": (pkl(b"\x80\x04\x8d" + TERABYTE), MISSING),
    "an array of bytes of 1 TB": (pkl(b"\x80\x05\x96" + TERABYTE), MISSING),
    "a frame of 1 TB": (pkl(b"\x80\x04\x95" + TERABYTE), MISSING),
    "a number of 2 GB": (pkl(b"\x80\x02\x8b" + struct.pack("<i", HUGE) + b"x."), "not enough data"),
    "a number of a million digits": (pkl(b"I" + b"9" * 10**6 + b"\n."), "digits"),
    "a memo of 2 billion": (pkl(b"\x80\x02]r\xff\xff\xff\x7f."), "claims more"),
    "many instructions": (pkl(b"\x80\x02" + b"N0" * 1_500_000 + b"N."), "too many instructions"),
    "deep lists": (pkl(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), "no dictionary"),
    "deep tuples": (pkl(b"\x80\x02)" + b"\x85" * 10**6 + b"."), "too many instructions"),
    "a deep key": (pkl(b"\x80\x02})" + b"\x85" * 10**6 + b"Ns."), "too many instructions"),
    "laughs": (pkl(laughs), "a is no tensor but a list"),
    "no weights": (pkl(zoo({"lr": 0.1})), "is no tensor but a dict"),
    "a name with a line feed": (pkl({"a\nb": np.zeros(1, np.float32)}), r"called a\\nb"),
    "garbage": (pkl(bytes(range(256)) * 40), "unknown"),
    "cut": (pkl(lambda c: pickle.dumps(zoo())[:-40]), "cut short"),
    "nothing": (pkl(b"empty"[:0]), "is empty"),
    "a linked tar archive": (linked_tar, ""),
    "memory of any size": (
        edited(calls(b"cbuiltins\nbytearray\n", b"J\xff\xff\xff\x7f")),
        "builtins.bytearray",
    ),
    "legacy: memory of any size": (
        edited(lambda data, c: data.replace(REBUILD, b"builtins\nbytearray"), legacy=True),
        "builtins.bytearray",
    ),
    "a storage of any size": (
        edited(calls(b"ctorch.storage\nUntypedStorage\n", b"J\xff\xff\xff\x7f")),
        "torch.storage.UntypedStorage",
    ),
    "a function of PyTorch": (edited(calls(b"ctorch.hub\nload\n", text("x"))), "torch.hub.load"),
    "TorchScript": (archive(extra=[("{top}/constants.pkl", b"")]), "TorchScript"),
    "pth: a tensor of 8 GB": (edited(numbers([1], HUGE)), "resize storage"),
    "pth: a storage of 8 GB": (edited(numbers([0, 1], HUGE)), "expected size"),
    "pth: a small storage": (edited(numbers([0], 7)), "expected size"),
    "pth: a storage that is not there": (
        edited(lambda data, c: data.replace(text("0"), text("9"))),
        "data/9: file not found",
    ),
    "pth: cut": (edited(lambda data, c: data[:-9]), "exhausted"),
    "legacy: a tensor of 8 GB": (edited(numbers([1], HUGE), legacy=True), ""),
    "legacy: a storage of 8 GB": (edited(numbers([0, 1], HUGE), legacy=True), ""),
    "legacy: cut": (edited(lambda data, c: data[:-400], legacy=True), "EOF"),
}

ARCHIVES = {
    "packed": archive(packed=["data.pkl"]),
    "a bomb of 64 MB": bomb,
    "one name twice": archive(extra=[("{top}/data.pkl", b"N.")]),
    "one name in capitals": archive(extra=[("{top}/DATA.PKL", b"N.")]),
    "another folder": archive(extra=[("other/data.pkl", b"N.")]),
    "out of the folder": archive(extra=[("{top}/../../evil", b"N.")]),
    "an absolute path": archive(extra=[("/tmp/evil", b"N.")]),
    "a backslash": archive(extra=[("{top}/..\\evil", b"N.")]),
    "a link": archive(mode=stat.S_IFLNK | 0o777),
    "overlapping": overlapping,
    "two archives": appended,
    "a comment": lambda path, canary: commented(path, canary, b"of some length"),
    "a false end": lambda path, canary: commented(path, canary, b"PK\x05\x06" + bytes(18)),
    "a long directory": long_directory,
}
DEAD |= {f"zip: {x}": (make, "zip archive") for x, make in ARCHIVES.items()}

SAFETENSORS = {
    "a header of 1 TB": safe(b"{}", length=2**40),
    "a tensor of 8 GB": safe({"a": entry((HUGE,), (0, 4 * HUGE))}),
    "a shape that lies": safe({"a": entry((HUGE,))}),
    "an overflow": safe({"a": entry((2**62, 16))}),
    "overlapping": safe({"a": entry(), "b": entry()}),
    "a hole": safe({"a": entry((2,), (8, 16))}),
    "negative": safe({"a": entry((4,), (-16, 0))}),
    "no type": safe({"a": entry(dtype="O")}),
    "deep": safe(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "cut": safe({"a": entry()}, bytes(9)),
}
DEAD |= {f"safetensors: {x}": (make, "header") for x, make in SAFETENSORS.items()}


def memory():
    """(resident now, most resident) in bytes."""
    with open("/proc/self/status") as f:
        values = dict(line.split(":") for line in f)
    return [int(values[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")]


def read_all(ordinary):
    from sharedkd.weights.reading import read_weights

    read_weights(ordinary)  # what is imported or prepared once
    with open("/proc/self/statm") as f:
        size = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, -1))
    for line in sys.stdin:
        name, path, trusted = json.loads(line)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the most resident is from now on
        before, _ = memory()
        try:
            read_weights(path, trusted)
            outcome, message = "read", ""
        except Exception as e:
            outcome, message = type(e).__name__, str(e)
        print(json.dumps([name, outcome, message, memory()[1] - before]), flush=True)


if __name__ == "__main__":
    read_all(sys.argv[1])
