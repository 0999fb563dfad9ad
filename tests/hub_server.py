"""A stand-in for the hub: a server that takes models and gives them back, by the part of its HTTP API that is used."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import huggingface_hub
import pytest

TOKEN = "hf_" + "a" * 30


class Hub:
    """Models by name: files of every commit, and the commits of branches."""

    def __init__(self):
        self.models, self.private, self.commits, self.objects, self.seen = {}, {}, {}, {}, []

    def commit(self, name, branch, files):
        sha = hashlib.sha1(f"{len(self.commits)} {name}".encode()).hexdigest()
        self.commits[sha], self.models[name][branch] = files, sha
        return sha

    def files(self, name, branch="main"):
        return self.commits[self.models[name][branch]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def answer(self, content=None, code=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        path, body = unquote(self.path.partition("?")[0]), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.seen.append((self.command, path, body))
        if self.command == "PUT":
            self.hub.objects[path.rpartition("/")[2]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.models:
                return self.answer({"error": "You already created this model repo", "url": self.url(name)}, 409)
            self.hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self.hub.models[name] = {}
            self.hub.commit(name, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            return self.answer({"url": self.url(name), "id": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            to = f"http://{self.headers['Host']}/objects/"
            objects = [{**x, "actions": {"upload": {"href": to + x["oid"], "header": {}}}} for x in objects]
            return self.answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*found.groups())
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/?(.*))?", path)
        return self.model(*found.groups(), body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def url(self, name):
        return f"http://{self.headers['Host']}/{name}"

    def missing(self, what):
        return self.answer({"error": f"{what} not found"}, 404, {"X-Error-Code": what, "X-Error-Message": "not found"})

    def sha(self, name, revision):
        return revision if revision in self.hub.commits else self.hub.models[name].get(revision)

    def file(self, name, revision, path):
        content = self.hub.commits[self.sha(name, revision)].get(path)
        if content is None:
            return self.missing("EntryNotFound")
        tag = hashlib.sha256(content).hexdigest()
        self.answer(content, headers={"ETag": f'"{tag}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"})

    def model(self, name, what, revision, body):
        if name not in self.hub.models:
            return self.missing("RepoNotFound")
        if what == "branch":
            if revision in self.hub.models[name]:
                return self.answer({"error": "exists"}, 409)
            self.hub.models[name][revision] = self.hub.models[name]["main"]
            return self.answer({})
        if what == "preupload":
            modes = [{"path": x["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if x["path"].endswith((".safetensors", ".onnx")) else "regular"}
                     for x in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": modes})
        sha = self.sha(name, revision or "main")
        if sha is None:
            return self.missing("RevisionNotFound")
        if what == "commit":
            return self.committed(name, revision, body)
        files = self.hub.commits[sha]
        if what == "tree":
            return self.answer([{"type": "file", "path": path, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                                for path, x in files.items()])  # fmt: skip
        return self.answer({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})

    def committed(self, name, branch, body):
        files = dict(self.hub.files(name, branch))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        sha = self.hub.commit(name, branch, files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.url(name)}/commit/{sha}"})


@contextlib.contextmanager
def hub_server(folder):
    """The hub, in place of huggingface.co for huggingface_hub in this process, with a cache in this folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, url = Hub(), f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever).start()
    constants, template = huggingface_hub.constants, "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + template, "HF_HUB_OFFLINE": False,
                "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(folder)}  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(constants, name, value)
            patch.setenv("HF_TOKEN", TOKEN)
            huggingface_hub.utils.disable_progress_bars()
            yield server.hub
    finally:
        server.shutdown()
        server.server_close()
