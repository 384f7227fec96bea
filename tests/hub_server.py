"""A small stand-in for the Hub's HTTP API on loopback, for the real `huggingface_hub` client.

It keeps what the client can observe: accounts with tokens, private repositories, commits and refs, regular and LFS files,
ETags and commit hashes, the error codes that the client makes exceptions of, and uploads that break in the middle.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
LICENSES = {
    "apache-2.0",
    "mit",
    "creativeml-openrail-m",
    "openrail++",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "other",
    "unknown",
}
PIPELINE_TAGS = {"image-to-image", "text-to-image"}


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


NOT_FOUND = {"repo": "RepoNotFound", "revision": "RevisionNotFound", "entry": "EntryNotFound"}


def not_found(what: str, name: str) -> Refusal:
    return Refusal(404, f"{what.capitalize()} {name} not found", NOT_FOUND[what])


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_errors(content: str) -> list[str]:
    """What is wrong with a card's metadata, by the Hub's rules for the keys used here."""
    front_matter = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    if front_matter is None:
        return ["empty or missing yaml metadata"]
    try:
        data = yaml.safe_load(front_matter[1])
    except yaml.YAMLError as error:
        return [f"yaml: {error}"]
    bases = data.get("base_model") or []
    wrong = {
        "license": data.get("license") not in LICENSES,
        "pipeline_tag": data.get("pipeline_tag") not in PIPELINE_TAGS,
        "base_model": not all(REPO_ID.fullmatch(base) for base in ([bases] if isinstance(bases, str) else bases)),
        "tags": not all(isinstance(tag, str) for tag in data.get("tags") or []),
        "library_name": not isinstance(data.get("library_name"), str),
    }
    return [f'"{key}" is not valid: {data.get(key)!r}' for key, is_wrong in wrong.items() if is_wrong]


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # commit hash to {path: sha256}
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags to commit hashes
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, str], message: str, branch: str = "main") -> str:
        sha = hashlib.sha1(json.dumps([len(self.commits), message, files]).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise not_found("revision", revision)
        return sha


class Hub:
    """The server and its state. `tokens` are accounts; `cut_uploads` counts the uploads that are still to be broken off."""

    def __init__(self, port: int, tokens: dict[str, str]) -> None:
        self.tokens = tokens  # token to user name
        self.repositories: dict[str, Repository] = {}  # by "models/ns/name"
        self.blobs: dict[str, bytes] = {}  # by sha256
        self.cut_uploads = 0
        self.refuse_uploads = False
        self.unreadable: set[str] = set()  # file names that answer 501, which the client does not retry
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"  # another host, which gets no token
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return sha256

    def put(self, repo_id: str, folder: Path, kind: str = "models") -> str:
        """A public repository with a folder's files, as if someone had published it before."""
        files = {
            path.relative_to(folder).as_posix(): self.store(path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repository = self.repositories.setdefault(f"{kind}/{repo_id}", Repository(private=False))
        return repository.commit(files, "Published")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[f"models/{repo_id}"]
        return {path: self.blobs[sha] for path, sha in repository.commits[repository.resolve(revision)].items()}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    ROUTES = [
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)", "info"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/revision/([^/]+)", "info"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/(?:branch|tag)/([^/]+)", "make_ref"),
        ("POST", r"/()([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("HEAD", r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve_file"),
        ("GET", r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve_file"),
        ("GET", r"/cdn/([0-9a-f]{64})", "cdn"),
    ]

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {url.path}")
        try:
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match is not None and method == self.command:
                    return getattr(self, name)(*(unquote(group or "models") for group in match.groups()))
            raise Refusal(404, f"no route {self.command} {url.path}")
        except Refusal as refusal:
            self.read_body()
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, format: str, *args) -> None:
        pass

    def read_body(self) -> bytes:
        if getattr(self, "body_of", None) is not self.headers:  # once a request
            self.body_of = self.headers
            if self.headers.get("Transfer-Encoding") == "chunked":
                self.body = b""
                while size := int(self.rfile.readline(), 16):
                    self.body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.body

    def answer(
        self, content: dict | list | bytes = b"", status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- who may do what

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if header.removeprefix("Bearer ") not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[header.removeprefix("Bearer ")]

    def repository(self, kind: str, repo_id: str, write: bool = False) -> Repository:
        user, owner = self.user(), repo_id.split("/")[0]
        repository = self.hub.repositories.get(f"{kind}/{repo_id}")
        if repository is None or (repository.private and user != owner):
            raise not_found("repo", repo_id) if user else Refusal(401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refusal(403, "You don't have the rights to write to this repository")
        return repository

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self.answer({"type": "user", "name": user, "orgs": []})

    # ---- repositories

    def create_repo(self) -> None:
        asked, user = json.loads(self.read_body()), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = asked.get("organization") or user
        repo_id, kind = f"{owner}/{asked['name']}", asked.get("type", "model") + "s"
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a {asked.get('type')} under {owner}")
        url = {"url": f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"}
        if f"{kind}/{repo_id}" in self.hub.repositories:
            return self.answer(url | {"error": "You already created this model repo"}, 409)
        repository = Repository(private=asked.get("visibility") == "private")
        repository.commit({}, "initial commit")
        self.hub.repositories[f"{kind}/{repo_id}"] = repository
        self.answer(url)

    def validate_card(self) -> None:
        errors = card_errors(json.loads(self.read_body())["content"])
        self.answer({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    def info(self, kind: str, repo_id: str, revision: str = "main") -> None:
        repository = self.repository(kind, repo_id)
        sha = repository.resolve(revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        self.answer({"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id)
        entries = []
        for path, sha256 in repository.commits[repository.resolve(revision)].items():
            content = self.hub.blobs[sha256]
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(entries)

    def make_ref(self, kind: str, repo_id: str, name: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        asked = json.loads(self.read_body() or b"{}")
        start = asked.get("startingPoint", "main") if "tag" not in asked else name
        name = asked.get("tag", name)
        if name in repository.refs:
            raise Refusal(409, f"Reference {name} exists already")
        repository.refs[name] = repository.resolve(start)
        self.answer({})

    # ---- uploads

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        committed = repository.commits[repository.resolve(revision)]
        answers = []
        for file in json.loads(self.read_body())["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = None
            if path in committed:
                oid = committed[path] if mode == "lfs" else git_hash(self.hub.blobs[committed[path]])
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def lfs_batch(self, kind: str, repo_id: str) -> None:
        self.repository(kind, repo_id, write=True)
        objects = []
        for asked in json.loads(self.read_body())["objects"]:
            if asked["oid"] not in self.hub.blobs:
                upload, verify = f"{self.hub.endpoint}/lfs/{asked['oid']}", f"{self.hub.endpoint}/lfs/verify"
                asked["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(asked)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if self.hub.cut_uploads:  # half of the file, then a reset connection
            self.hub.cut_uploads -= 1
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            self.wfile = open("/dev/null", "wb")
            return
        if self.hub.refuse_uploads:
            raise Refusal(403, "Request has expired")
        if self.hub.store(self.read_body()) != oid:
            raise Refusal(400, "the content is not what was announced")
        self.answer()

    def lfs_verify(self) -> None:
        asked = json.loads(self.read_body())
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "the object was not uploaded")
        self.answer({})

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        files = dict(repository.commits[repository.resolve(revision)])
        for line in self.read_body().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        request = f"{self.hub.endpoint}/{repo_id}/discussions/1" if "create_pr" in self.query else None
        sha = repository.commit(files, message, "refs/pr/1" if request else revision)
        commit = f"{self.hub.endpoint}/{repo_id}/commit/{sha}"
        self.answer({"commitUrl": commit, "commitOid": sha, "pullRequestUrl": request})

    # ---- downloads

    def resolve_file(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(kind, repo_id)
        sha = repository.resolve(revision)
        if path not in repository.commits[sha]:
            raise not_found("entry", path)
        if path in self.hub.unreadable:
            raise Refusal(501, "Out of service")
        sha256 = repository.commits[sha][path]
        content, headers = self.hub.blobs[sha256], {"X-Repo-Commit": sha}
        if path.endswith(LFS_SUFFIXES):
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            self.answer(status=302, headers=headers | linked | {"Location": f"{self.hub.cdn}/cdn/{sha256}"})
        else:
            self.send_content(content, headers | {"ETag": f'"{git_hash(content)}"'})

    def cdn(self, sha256: str) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "a token was sent to the CDN")
        self.send_content(self.hub.blobs[sha256], {"ETag": f'"{sha256}"'})

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        if self.command == "HEAD":
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            return self.end_headers()
        self.answer(content, headers=headers)
