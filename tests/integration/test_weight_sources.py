"""What loading takes and does outside of its process: memory, and the hub. Each in an interpreter of its own."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file


def run_python(code, **environment):
    """Standard output of `code` in a fresh interpreter."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | environment
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_peak_memory_is_the_weights_and_one_shard(tmp_path):
    rows = 16 * 1024
    part = torch.ones(rows // 2, 1024)  # 32 MiB
    weight_map = {}
    for index in range(4):
        names = (f"{index}.q.weight", f"{index}.k.weight")
        save_file({name: part.clone() for name in names}, tmp_path / f"{index}.safetensors")
        weight_map.update(dict.fromkeys(names, f"{index}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    code = f"""
        import re, psutil, torch
        from pathlib import Path
        from engine.weights.loader import load_weights
        from engine.weights.safetensors_checkpoint import SafetensorsCheckpoint

        class Linear(torch.nn.Module):
            output_sizes = ({rows // 2}, {rows // 2})
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.empty({rows}, 1024))
            def after_loading(self):
                self.packed = self.weight.T.contiguous()
                del self.weight

        class Model(torch.nn.Module):
            packed_parameters = {{"qk": ("q", "k")}}
            def __init__(self):
                super().__init__()
                for index in range(4):
                    layer = torch.nn.Module()
                    layer.qk = Linear()
                    self.add_module(str(index), layer)

        torch.ones(1000, 1000).T.contiguous()
        with torch.device("meta"):
            model = Model()
        before = psutil.Process().memory_info().rss
        load_weights(model, SafetensorsCheckpoint(Path({str(tmp_path)!r})), torch.device("cpu"), torch.float32)
        # VmHWM, not ru_maxrss: that one starts with the size of the process that this one was forked from.
        peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        print(peak - before)
    """
    mebibytes = int(run_python(code)) / 2**20
    # 256 of weights, 64 of the shard that is mapped or the module that is being repacked, and some slack.
    assert mebibytes <= 256 + 64 + 32


PATHS = [
    "./missing",
    "../missing",
    "/missing",
    "~/missing",
    "~nobody/x",
    "a/b/c",
    "",
    "missing",
    "a\0/b\0/",
    "x" * 5000,
]


def test_paths_never_reach_the_hub(tmp_path):
    (tmp_path / "model.safetensors").touch()
    code = f"""
        import sys
        from engine.errors import CheckpointError
        from engine.weights.hub import resolve_model
        for model in {[*PATHS, str(tmp_path / "model.safetensors")]!r}:
            try:
                resolve_model(model)
            except CheckpointError as error:
                print(error)
        assert "huggingface_hub" not in sys.modules
    """
    messages = run_python(code).splitlines()
    assert len(messages) == len(PATHS) + 1
    assert all("hub id such as Qwen/Qwen3-0.6B" in message and len(message) < 500 for message in messages)
    assert "model.safetensors' is a file" in messages[-1]


HUB_FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "merges.txt": b"",
    "chat_template.jinja": b"template",
    "README.md": b"not needed",
    "notes.txt": b"not needed",
    "pytorch_model.bin": b"not needed",
    "consolidated.safetensors": b"not needed",
    "original/params.json": b"not needed",
}
COMMIT = "a" * 40
REPOSITORIES = {
    "owner/model": HUB_FILES,
    "owner/old": {
        "config.json": b"{}",
        "pytorch_model.bin.index.json": b"{}",
        "pytorch_model-00001-of-00002.bin": b"first" * 5_000_000,
        "pytorch_model-00002-of-00002.bin": b"second",
        "training_args.bin": b"not needed",
        "optimizer.pt": b"not needed",
        "flax_model.msgpack": b"not needed",
    },
    "owner/model-GGUF": {"M-Q4_0.gguf": b"GGUF four", "M-Q8_0.gguf": b"GGUF eight", "README.md": b"", ".config": b""},
    "owner/one-GGUF": {"one.f16.gguf": b"GGUF sixteen"},
    "owner/split-GGUF": {
        **{f"Q4_0/S-Q4_0-0000{number}-of-00002.gguf": b"GGUF part %d" % number for number in (1, 2)},
        **{f"S-Q8_0-0000{number}-of-00003.gguf": b"GGUF" for number in (1, 3)},
    },
}
BREAKING = "pytorch_model-00001-of-00002.bin"
"""The first download of it breaks off half-way."""


class HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as downloads of REPOSITORIES need; refuses everything else as a hub would."""

    ranges: ClassVar[list[str | None]] = []
    """What was asked for of the file that breaks off."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        repository = next((name for name in REPOSITORIES if f"/{name}/" in path), "")
        files = REPOSITORIES.get(repository, {})
        if files and path == f"/api/models/{repository}/revision/main":
            siblings = [{"rfilename": name} for name in files]
            self._reply(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
        elif files and path == f"/api/models/{repository}/tree/{COMMIT}":
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            self._reply(200, json.dumps(listed).encode())
        elif files and path.startswith(f"/{repository}/resolve/{COMMIT}/"):
            name = path.partition(f"/{COMMIT}/")[2]
            content = files[name]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if name == BREAKING and self.command == "GET":
                self._reply_by_halves(content, headers)
            else:
                self._reply(200, content, headers)
        elif "gated" in path:
            self._reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "teapot" in path:
            self._reply(418, b"{}")
        else:
            known = "/owner/model/" in path
            self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    do_HEAD = do_GET

    def _reply_by_halves(self, content, headers):
        """The first half at first, and then what is asked for."""
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        if asked is None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        rest = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._reply(206, content[start:], headers | rest)

    def _reply(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def hub_address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def resolve_in_fresh_process(calls, **environment):
    """One line for each call: the files of the folder it resolved to, or the error."""
    code = f"""
        from engine.errors import CheckpointError
        from engine.weights.hub import resolve_model
        for arguments in {calls!r}:
            try:
                folder = resolve_model(*arguments)
                print(sorted(str(path.relative_to(folder)) for path in folder.rglob("*")))
            except CheckpointError as error:
                print(error)
    """
    return run_python(code, **environment).splitlines()


def test_hub_downloads_only_what_is_needed_and_its_refusals_are_explained(tmp_path, hub_address):
    calls = [("owner/model",), ("owner/model", "v9"), ("owner/gated",), ("owner/unknown",), ("owner/teapot",)]
    files, revision, gated, unknown, teapot = resolve_in_fresh_process(
        calls, HF_ENDPOINT=hub_address, HF_HOME=str(tmp_path), NO_PROXY="127.0.0.1"
    )
    assert files == str(["chat_template.jinja", "config.json", "merges.txt", "model.safetensors"])
    assert "'owner/model' at revision 'v9'" in revision and "no such revision" in revision
    assert "'owner/gated'" in gated and "accept the terms" in gated
    assert "'owner/unknown'" in unknown and "no such repository" in unknown
    assert "'owner/teapot'" in teapot and "418" in teapot and "try again" in teapot

    calls = [("owner/model",), ("owner/unknown",), ("-bad-/id!",)]
    cached, offline, invalid = resolve_in_fresh_process(calls, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert cached == files
    assert "'owner/unknown'" in offline and "HF_HUB_OFFLINE" in offline and "local directory" in offline
    assert "'-bad-/id!'" in invalid and "not a valid hub id" in invalid


def test_hub_pytorch_files_where_there_are_no_others_and_resumed(tmp_path, hub_address):
    HubHandler.ranges.clear()
    environment = {"HF_ENDPOINT": hub_address, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    (files,) = resolve_in_fresh_process([("owner/old",)], **environment)
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert files == str(["config.json", *shards, "pytorch_model.bin.index.json"])
    assert HubHandler.ranges == [None, f"bytes={10 * 2**20}-"], "the library writes 10 MiB at a time"
    (stored,) = tmp_path.rglob(f"snapshots/*/{BREAKING}")
    assert stored.read_bytes() == REPOSITORIES["owner/old"][BREAKING]


def test_hub_gguf_files_by_the_end_of_their_names(tmp_path, hub_address):
    """Their contents are no models, which is said of the one that was chosen."""
    environment = {"HF_ENDPOINT": hub_address, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    calls = [("owner/model-GGUF:q8_0",), ("owner/model-GGUF",), ("owner/model-GGUF:Q5_0",), ("owner/one-GGUF",)]
    calls += [("owner/split-GGUF:Q4_0",), ("owner/split-GGUF:Q8_0",)]
    chosen, several, unknown, only, parts, incomplete = resolve_in_fresh_process(calls, **environment)
    blobs = [path.read_bytes() for path in tmp_path.rglob("blobs/*")]
    assert sorted(blobs) == [b"GGUF eight", b"GGUF part 1", b"GGUF part 2", b"GGUF sixteen"]
    assert "Q4_0/S-Q4_0-00001-of-00002.gguf: has 11 bytes, too few for a GGUF file" in parts
    assert "'S-Q8_0.gguf' has 3 parts, 2 are there" in incomplete
    assert "too few for a GGUF file" in chosen and "too few for a GGUF file" in only
    assert "2 GGUF files are meant, expected one of 'M-Q4_0.gguf', 'M-Q8_0.gguf'" in several
    assert "0 GGUF files are meant" in unknown and "owner/name:Q8_0" in unknown
    (offline,) = resolve_in_fresh_process([("owner/model-GGUF:Q8_0",)], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert offline == chosen


def test_hub_out_of_reach(tmp_path):
    (message,) = resolve_in_fresh_process(
        [("owner/model",)], HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path), NO_PROXY="127.0.0.1"
    )
    assert "'owner/model'" in message and "ConnectError" in message and "check the network" in message
