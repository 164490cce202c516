"""A file may hold anything, and may be no file. It is read, or it is refused in one sentence of the caller's error."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen2_fp16_fix.errors import ScanError
from qwen2_fp16_fix.files import reading
from qwen2_fp16_fix.files.reading import read_json, read_utf8

#: What no JSON file of ours or of a checkpoint may hold, and a word of the sentence.
BAD_JSON = {
    "nothing": (b"", "Expecting value"),
    "half": (b'{"a": 1', "Expecting"),
    "more behind": (b"{} {}", "Extra data"),
    "lists 10^5 deep": (b"[" * 10**5, "nested brackets"),
    "closed lists 10^5 deep": (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested brackets"),
    "objects 10^5 deep": (b'{"a": ' * 10**5 + b"1" + b"}" * 10**5, "nested brackets"),
    "70 deep": (b'{"a": ' * 70 + b"1" + b"}" * 70, "more than 64 nested brackets"),
    "310 digits": (b'{"a": ' + b"7" * 310 + b"}", "7... is beyond the range of a float"),
    "5000 digits": (b'{"a": -' + b"7" * 5000 + b"}", "7... is beyond the range of a float"),
    "1e999": (b'{"a": 1e999}', "1e999 is beyond the range of a float"),
    "NaN": (b'{"a": NaN}', "NaN is not a finite number"),
    "-Infinity": (b'{"a": -Infinity}', "-Infinity is not a finite number"),
    "surrogate": (b'{"a": ["\\ud83d"]}', "'\\ud83d' has half of a surrogate pair"),
    "surrogate in a key": (b'{"\\udc80": 1}', "has half of a surrogate pair"),
    "key twice": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
    "byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "not UTF-8": (b'{"a": "\xff"}', "it is not UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "it is not UTF-8"),
    "a list": (b"[]", "is not a JSON object"),
    "a text": (b'"{}"', "is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_with_more_than_one_reading_is_refused(case: str, tmp_path: Path) -> None:
    content, words = BAD_JSON[case]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ScanError) as caught:
        read_json(tmp_path / "a.json", "another file", ScanError, name="a.json")
    said = str(caught.value)
    assert said.startswith("a.json is not ")
    assert said.endswith(": name another file.")
    assert words in said
    assert (said.isprintable(), len(said) < 200) == (True, True)


def test_what_tokenizers_and_models_have_is_read(tmp_path: Path) -> None:
    """An integer of 31 digits, letters beyond the first plane, escapes in pairs."""
    text = '{"model_max_length": 1000000000000000019884624838656, "a": ["\\ud83d\\ude00 😀", 1e-300, null]}'
    (tmp_path / "a").write_text(text, encoding="utf-8")
    found = read_json(tmp_path / "a", "another file", ScanError)
    assert found == {"model_max_length": int(1e30), "a": ["😀 😀", 1e-300, None]}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the name of a socket is short
        server.bind(path.name)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "No such file or directory"),
    "folder": (Path.mkdir, "it is a folder"),
    "pipe": (pipe, "it is a pipe"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    "loop": (loop, "symbolic links"),
    "socket": (listening, "No such device"),
    "large": (lambda path: path.write_bytes(bytes(101)), "is larger than"),
}


@pytest.mark.skipif(os.name != "posix", reason="Windows has none of these in a folder")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("read", [read_json, read_utf8])
def test_what_is_no_file_is_refused_at_once(
    kind: str, read: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody writes to kept the program waiting; /dev/zero took all memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "LARGEST_JSON", 100)
    monkeypatch.setattr(reading, "LARGEST_TEXT", 100)
    make, words = NO_FILES[kind]
    make(tmp_path / "a")
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(ScanError, match=words):
        read(tmp_path / "a", "another file", ScanError)
    assert not descriptors or len(os.listdir("/proc/self/fd")) == descriptors


def test_a_name_that_the_system_cannot_have_is_refused() -> None:
    with pytest.raises(ScanError, match="NUL character"):
        read_json(Path("a\0b"), "another file", ScanError)
