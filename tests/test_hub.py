"""Pushes over real HTTP, to a server that speaks the Hub's endpoints; each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hub_server
import pytest
from conftest import Finished
from hub_server import SIGNATURE, TOKEN, Hub
from tiny import contents

from llmprune.publish.contents import METADATA_FILE, PUSH_FILE

REPO = "user/tiny-pruned"
# Runs commands that come as lines of JSON. A wait of huggingface_hub between two tries is seconds long.
COMMANDS = """
import contextlib, io, json, os, sys, time, traceback
time.sleep = lambda s: None
from llmprune.cli.main import main

for line in sys.stdin:
    arguments, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    sys.argv = ["llmprune", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        except Exception:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
loaded = [AutoModelForCausalLM.from_pretrained(n, trust_remote_code=True, token=t) for n, t in
          ((sys.argv[1], True), (sys.argv[2], False))]
tokens = torch.arange(3, 40)[None]
with torch.inference_mode():
    hub, local = (model(tokens).logits for model in loaded)
    halved = loaded[1](tokens // 2).logits
same = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("The river")["input_ids"]
kept = AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True)("The river")["input_ids"]
print(float((hub - local).abs().max()), float((hub - halved).abs().max()), same == kept and len(same) > 0)
print([name for name in sys.modules if name.split(".")[0] == "llmprune"])
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


Push = Callable[..., Result]


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_server.running() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The server, as if it had just been started."""
    server.reset()
    return server


@pytest.fixture(scope="module")
def environment(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "NO_PROXY": "127.0.0.1",
    }


def started(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMANDS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def process(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with started(environment) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def push(process: subprocess.Popen[str], environment: dict[str, str]) -> Push:
    """Runs `llmprune push`; with `at`, in a process of its own that takes that address for the Hub's."""

    def run(*arguments: object, licence: str | None = "mit", token: str | None = TOKEN, at: str = "") -> Result:
        acknowledged = ["--licence", licence] if licence else []
        line = json.dumps([["push", *map(str, arguments), *acknowledged], token]) + "\n"
        if at:
            with started({**environment, "HF_ENDPOINT": at}) as own:
                answer = own.communicate(line)[0]
        else:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        assert TOKEN not in answer and SIGNATURE not in answer
        return Result(*json.loads(answer))

    return run


@pytest.fixture
def child(finished_run: Finished, tmp_path: Path) -> Path:
    """A copy of the exported child, to add to and to change."""
    return Path(shutil.copytree(finished_run.export, tmp_path / "child"))


def pushed(result: Result) -> Any:
    assert result.code == 0, result.err
    return json.loads(result.out)


def assert_one_error(result: Result, *parts: str) -> None:
    assert (result.code, result.out) == (2, ""), result
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err


def change_metadata(directory: Path, **parent: Any) -> None:
    path = directory / METADATA_FILE
    metadata = json.loads(path.read_text())
    metadata["provenance"]["parent"] |= parent
    path.write_text(json.dumps(metadata))


def test_a_pushed_child_loads_from_the_hub(
    hub: Hub, push: Push, child: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    (child / "tiny.gguf").write_bytes(b"GGUF" * 9)
    (child / ".cache").mkdir()
    first = pushed(push(child, REPO, "--json", "--quiet"))
    repo = hub.repos[REPO]
    assert repo.private and first["private"] and first["new_commit"]
    assert [commit.message for commit in repo.branches["main"][1:]] == [f"parent pruned to {_id(child)} by llmprune"]
    there = repo.at("main")
    assert there is not None and first["commit"] == there.oid and there.oid in first["commit_url"]
    local = contents(child)
    assert {name: there.files[name] for name in local} == local
    assert there.files.keys() - local.keys() == {"README.md", ".gitattributes", PUSH_FILE}
    assert sorted(there.lfs) == ["model.safetensors", "tiny.gguf"]
    assert {file["name"]: file["bytes"] for file in first["files"]} == {
        name: len(content) for name, content in there.files.items() if name != ".gitattributes"
    }
    card = there.files["README.md"].decode()
    assert "license: mit\n" in card and f'from_pretrained("{REPO}"' in card and "llama-cli -m tiny.gguf" in card
    for content in there.files.values():
        assert str(tmp_path).encode() not in content and str(Path.home()).encode() + b"/" not in content

    finished = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", LOAD, REPO, str(child)],
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    figures, modules = finished.stdout.strip().splitlines()[-2:]
    gap, other, tokenizers_agree = figures.split()
    assert float(gap) == 0.0 < 1e-3 < float(other) and tokenizers_agree == "True" and modules == "[]"

    # The same again is no commit; less of it is one, in which what is gone here goes there.
    again = pushed(push(child, REPO, "--json", "--quiet"))
    assert not again["new_commit"] and again["commit"] == first["commit"] and len(repo.branches["main"]) == 2
    assert len(hub.puts) == 2
    there.files["figure.png"] = b"the user's own"
    (child / "tiny.gguf").unlink()
    less = pushed(push(child, REPO, "--json", "--quiet", "--message", "Without GGUF"))
    after = repo.at("main")
    assert after is not None and less["removed"] == ["tiny.gguf"] and after.message == "Without GGUF"
    assert "tiny.gguf" not in after.files and after.files["figure.png"] and "llama-cli" not in str(after.files)
    assert len(repo.branches["main"]) == 3 and len(hub.puts) == 2


def test_only_what_an_earlier_push_left_is_removed(hub: Hub, push: Push, child: Path) -> None:
    for name in ("kept.gguf", "changed.gguf", "gone.gguf"):
        (child / name).write_bytes(name.encode() * 9)
    (child / "notes.txt").write_text("of the first push")
    pushed(push(child, REPO, "--json", "--quiet"))
    there = hub.repos[REPO].at("main")
    assert there is not None
    # The user's: files that no push brought, and one that they replaced.
    own = {"own.gguf": b"GGUF mine", "changed.gguf": b"GGUF better", "vllm/notes.txt": b"mine"}
    there.files |= own
    there.lfs |= {name: hashlib.sha256(own[name]).hexdigest() for name in ("own.gguf", "changed.gguf")}
    for name in ("changed.gguf", "gone.gguf", "notes.txt"):
        (child / name).unlink()
    less = pushed(push(child, REPO, "--json", "--quiet"))
    after = hub.repos[REPO].at("main")
    assert after is not None and less["removed"] == ["gone.gguf", "notes.txt"]
    assert {name: after.files.get(name) for name in own} == own and "kept.gguf" in after.files
    # What an earlier push did not bring is nobody's to remove now, whatever it is called.
    (child / "kept.gguf").unlink()
    assert pushed(push(child, REPO, "--json", "--quiet"))["removed"] == ["kept.gguf"]


def test_a_push_from_before_pushes_left_a_list(hub: Hub, push: Push, child: Path) -> None:
    pushed(push(child, REPO, "--json", "--quiet"))
    there = hub.repos[REPO].at("main")
    assert there is not None
    listed = json.loads(there.files.pop(PUSH_FILE))["files"]
    assert listed.keys() == there.files.keys() - {".gitattributes"}
    metadata = json.loads(there.files[METADATA_FILE])
    metadata["files"] |= {"old.jinja": hashlib.sha256(b"old").hexdigest(), "new.jinja": "of something else"}
    there.files |= {"old.jinja": b"old", "new.jinja": b"new", "own.gguf": b"own"}
    there.files[METADATA_FILE] = json.dumps(metadata).encode()
    assert pushed(push(child, REPO, "--json", "--quiet"))["removed"] == ["old.jinja"]


def _id(directory: Path) -> str:
    return str(json.loads((directory / METADATA_FILE).read_text())["id"])


@pytest.mark.parametrize("failure", ["drop", "500"])
def test_an_upload_that_failed_goes_on_where_it_stopped(failure: Any, hub: Hub, push: Push, child: Path) -> None:
    for number in range(3):
        (child / f"{number}.gguf").write_bytes(b"GGUF%d" % number * 1000)
    hub.good_puts, hub.failure = 2, failure
    assert_one_error(push(child, REPO, "--quiet"), f"pushing to {REPO}", "What was uploaded is kept")
    assert len(hub.puts) == 2 and len(hub.repos[REPO].branches["main"]) == 1
    hub.good_puts = None
    assert pushed(push(child, REPO, "--quiet", "--json", at=hub.url))["new_commit"]
    assert len(hub.puts) == len(set(hub.puts)) == 4
    assert len(hub.repos[REPO].branches["main"]) == 2


def test_a_token_that_is_refused(hub: Hub, push: Push, child: Path) -> None:
    wrong = "hf_" + "wrong" * 6
    result = push(child, REPO, "--quiet", token=wrong)
    assert_one_error(result, "does not accept the token (401)")
    assert wrong not in result.err and not hub.repos and not hub.puts


def test_a_token_without_the_right_to_write_there(hub: Hub, push: Push, child: Path) -> None:
    assert_one_error(push(child, "org/tiny", "--quiet"), "the token may not do this", "org/tiny", "(403)")
    assert not hub.repos and not hub.puts


def test_a_commit_of_somebody_else_is_not_overwritten(hub: Hub, push: Push, child: Path) -> None:
    hub.intruder = True
    assert_one_error(push(child, REPO, "--quiet"), "somebody else committed in the meantime (412)")
    assert [commit.message for commit in hub.repos[REPO].branches["main"]] == ["initial commit", "theirs"]


def test_refusals_ask_the_server_nothing(hub: Hub, push: Push, child: Path, finished_run: Finished) -> None:
    assert_one_error(push(child, REPO, "--quiet", token=None), "needs a token")
    assert_one_error(push(child, REPO, "--quiet", licence=None), "acknowledged the licence of parent", "--licence")
    assert_one_error(push(child, "tiny", "--quiet"), "a repository is user/name", "'tiny'")
    assert_one_error(push(finished_run.path, REPO, "--quiet"), "export is not a directory")
    with (child / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert_one_error(push(child, REPO, "--quiet"), "model.safetensors has changed since the checkpoint was proven")
    assert hub.requests == []


def test_a_run_is_pushed_publicly_to_a_branch(hub: Hub, push: Push, child: Path, copied: Path) -> None:
    shutil.copytree(child, copied / "export")
    result = pushed(push(copied, REPO, "--public", "--revision", "v1", "--json", "--quiet"))
    assert not hub.repos[REPO].private and not result["private"]
    assert [len(hub.repos[REPO].branches[name]) for name in ("main", "v1")] == [1, 2]
    told = push(copied, REPO, "--quiet")
    assert_one_error(told, f"{REPO} exists and is public; give --public")
    assert len(hub.repos[REPO].branches["main"]) == 1
    told = push(copied, REPO, "--public")
    assert told.code == 0 and "(public)" in told.out and "checking export against its proof" in told.err


def test_a_parent_on_the_hub_is_asked_for_its_licence(hub: Hub, push: Push, child: Path) -> None:
    hub.create("org/parent", private=False, card={"license": "other", "license_name": "parent-research"})
    change_metadata(child, model="org/parent", on_hub=True)
    assert_one_error(push(child, REPO, "--quiet"), "org/parent states licence parent-research, but mit is acknowledged")
    assert_one_error(push(child, REPO, "--quiet", licence=None), "(parent-research by its own card)")
    assert list(hub.repos) == ["org/parent"]
    pushed(push(child, REPO, "--quiet", "--json", licence="parent-research"))
    there = hub.repos[REPO].at("main")
    assert there is not None
    card = there.files["README.md"].decode()
    assert "license: other\nlicense_name: parent-research\n" in card
    assert "base_model: org/parent\n" in card and "base_model_relation: finetune\n" in card


def test_what_the_hub_refuses_is_one_error(hub: Hub, push: Push, child: Path) -> None:
    result = push(child, REPO, "--quiet", licence="not-a-licence")
    assert_one_error(result, '"license" must be one of [apache-2.0, ...]')
    assert not hub.puts
    assert_one_error(push(child, REPO, "--quiet", at="http://127.0.0.1:9"), "pushing to", "127.0.0.1:9")
