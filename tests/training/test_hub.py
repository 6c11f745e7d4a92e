"""An ARM pushed to and fetched from a Hub: a server on loopback, the real client, in a process of its own."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.config.errors import UserError
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.models.loading import Source, model_digest
from pipeline.stages import push
from pipeline.training import hub
from tests.tiny import ROOT

TOKEN = "hf_secret0123456789"
SHA = "a" * 40


class Hub(ThreadingHTTPServer):
    """One repository: what is committed to it can be listed and resolved."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.created, self.seen, self.refuses = {}, {}, [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        if self.server.refuses:
            self._json({"error": "You may not."}, 403)
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._json({"url": f"{self.server.url}/me/arm", "name": "me/arm"})
        elif self.path.startswith("/api/models/me/arm/preupload/"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._json({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif self.path.startswith("/api/models/me/arm/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"success": True, "commitOid": SHA, "commitUrl": f"{self.server.url}/me/arm/commit/{SHA}"})
        else:
            self._json({"url": self.server.url})

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        found = re.fullmatch(rf"/me/arm/resolve/{SHA}/(.+)", self.path)
        if found and found[1] in self.server.files:
            data = self.server.files[found[1]]
            self._send(data, "application/octet-stream", {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        elif self.path.startswith("/api/models/me/arm/tree/"):
            sizes = {name: len(data) for name, data in self.server.files.items()}
            self._json([{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()])
        elif self.path.startswith("/api/models/me/arm"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "me/arm", "sha": SHA, "siblings": siblings, "private": False, "tags": [], "downloads": 0})
        else:
            self._json({"error": "Entry not found"}, 404)

    do_HEAD = do_GET

    def _json(self, value, status=200):
        self._send(json.dumps(value).encode(), "application/json", {}, status)

    def _send(self, data, kind, headers, status=200):
        self.send_response(status)
        told = {"Content-Type": kind, "Content-Length": str(len(data)), "X-Repo-Commit": SHA, **headers}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


def client(server, tmp_path, code):
    environment = {
        **os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    command = [sys.executable, "-c", "from pathlib import Path; " + code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_an_arm_comes_back_from_the_hub_as_it_was_pushed(server, tmp_path, arms):
    (arms["one"] / "README.md").write_text("---\nlicense: mit\n---\n# An ARM\n")
    (arms["one"] / "notes.pt").write_bytes(b"not for the Hub")
    pushed = client(
        server, tmp_path,
        f"from pipeline.training.hub import push; print(push(Path({str(arms['one'])!r}), 'me/arm', True))",
    )  # fmt: skip
    assert pushed.returncode == 0, pushed.stderr[-2000:]
    assert f"{server.url}/me/arm/commit/{SHA}" in pushed.stdout
    assert server.created.get("private") or server.created.get("visibility") == "private"
    told = dict(server.seen)
    assert told["/api/repos/create"] == told["/api/models/me/arm/commit/main"] == f"Bearer {TOKEN}"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(server.files)
    assert "notes.pt" not in server.files
    fetched = client(
        server, tmp_path,
        "from pipeline.config.schema import Model; from pipeline.models.fetch import fetch; "
        f"fetch('arm', Model('hub', 'me/arm', revision='main'), Path({str(tmp_path / 'arm')!r}))",
    )  # fmt: skip
    assert fetched.returncode == 0, fetched.stderr[-2000:]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "arm" / name).read_bytes() == (arms["one"] / name).read_bytes()
    assert model_digest(tmp_path / "arm")


def test_a_hub_that_refuses_and_an_arm_that_is_not_there_are_one_sentence(server, tmp_path, arms):
    server.refuses = True
    refused = client(
        server, tmp_path,
        f"from pipeline.training.hub import push; push(Path({str(arms['one'])!r}), 'me/arm', False)",
    )  # fmt: skip
    assert "UserError: me/arm could not be written (" in refused.stderr and "HF_TOKEN may write" in refused.stderr
    with pytest.raises(UserError, match="holds no ARM: train it with"):
        hub.release({"one": tmp_path}, "me/arm", "owner/tiny", tmp_path / "out")


def test_the_card_of_a_release_has_code_that_runs(tiny, arms, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "models/arms/positivity"
    shutil.copytree(arms["one"], folder)
    (folder / "README.md").write_text("---\nbase_model: tiny\nlicense: mit\n---\n# An ARM\n")
    (folder / "notes.pt").write_bytes(b"not for the Hub")
    monkeypatch.chdir(tmp_path)
    push.main(["positivity", "me/arm", "--base", "owner/tiny", "--dry-run", "out"])
    out = tmp_path / "out"
    assert "adapter_model.safetensors" in capsys.readouterr().out and not (out / "notes.pt").exists()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/tiny"
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: owner/tiny\nlicense: mit\n---\n")
    assert (folder / "README.md").read_text().startswith("---\nbase_model: tiny\n"), "the ARM itself stays as it was"
    monkeypatch.setattr("huggingface_hub.snapshot_download", {"owner/tiny": str(tiny), "me/arm": str(out)}.__getitem__)
    [code] = re.findall(r"```python\n(.+?)```", card, flags=re.DOTALL)
    exec(code.replace("do_sample=True", "do_sample=False").replace("max_new_tokens=48", "max_new_tokens=12"), {})
    decoder = GuidedDecoder.load(Source(tiny, dtype="float32"), {"positivity": out}, device="cpu")
    request = Request("Describe a rainy Monday morning.", {"positivity": 1.0}, temperature=0.0, max_new_tokens=12)
    [(_, row)] = decoder.generate([request])
    assert row.text.strip() and row.text.strip() in capsys.readouterr().out


def test_all_arms_are_released_together_with_code_that_mixes_them(project, tiny, arms, capsys, monkeypatch):
    push.main(["all", "me/arms", "--base", "owner/tiny", "--dry-run", "out"])
    out = project / "out"
    assert "positivity/adapter_model.safetensors" in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.snapshot_download", {"owner/tiny": str(tiny), "me/arms": str(out)}.__getitem__)
    [code] = re.findall(r"```python\n(.+?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    exec(code.replace("do_sample=True", "do_sample=False").replace("max_new_tokens=48", "max_new_tokens=12"), {})
    weights = {"positivity": 0.5, "conciseness": 0.5}
    for name in weights:
        config = json.loads((out / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "owner/tiny"
    decoder = GuidedDecoder.load(Source(tiny, dtype="float32"), {name: out / name for name in weights}, device="cpu")
    request = Request("Describe a rainy Monday morning.", weights, temperature=0.0, max_new_tokens=12)
    [(_, row)] = decoder.generate([request])
    assert row.text.strip() and row.text.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("repository", "base"), [("arm", "owner/tiny"), ("me/arm", "tiny"), ("me/a r", "owner/tiny"), ("me/arm", "a/b/c")]
)
def test_a_name_that_the_hub_has_not_is_refused_and_nothing_is_written(arms, tmp_path, repository, base):
    with pytest.raises(UserError, match="is not a name on the Hub: write owner/name"):
        hub.release({"one": arms["one"]}, repository, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_from_a_wheel_needs_its_name_on_the_hub(project):
    with pytest.raises(UserError, match="tiny did not come from the Hub: say what it is called there, --base"):
        push.main(["positivity", "me/arm", "--dry-run", "out"])
