"""A Hub on the loopback: the HTTP endpoints that huggingface_hub needs to make, fill, branch and read model repositories.

Everything lies in memory. Tokens are checked, private repositories hidden, large files go through LFS, commits are atomic, downloads
have ranges and ETags. `Fault`s break what it does in ways that networks and servers do. It speaks no xet: HF_HUB_DISABLE_XET=1.
`python tests/hub_server.py --port 8642` serves one until it is interrupted, and says which environment reaches it.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

OWNER, READER, STRANGER = "hf_owner", "hf_reader", "hf_stranger"  # tokens: may write, may only read, of somebody else
USERS = {OWNER: ("me", True), READER: ("me", False), STRANGER: ("they", True)}
LARGE = 20_000  # bytes from which a file goes through LFS; safetensors always do
BUSY = {"error": "busy"}


@dataclass
class Fault:
    """What goes wrong with requests `method` on paths that contain `path`, the first `times` times.

    Args: kind: a status to answer instead; "drop" closes the connection halfway, of an upload or else of the answer; "flip" changes
    a byte of what is sent either way; "lost" does what is asked and closes the connection instead of an answer.
    """

    method: str
    path: str
    kind: int | str
    times: int = 1
    seen: int = 0


@dataclass(frozen=True)
class Blob:
    """A file: its content, or the SHA-256 of its LFS object."""

    size: int
    oid: str
    content: bytes | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, content: bytes) -> "Blob":
        return cls(len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), content)

    def entry(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 134}} if self.sha256 else {}
        return {"type": "file", "path": path, "rfilename": path, "size": self.size, "oid": self.oid, "blobId": self.oid} | lfs


Tree = dict[str, Blob]


@dataclass
class Repo:
    """Branches -> their commits, oldest first: (oid, title, tree)."""

    private: bool
    gated: bool = False
    branches: dict[str, list[tuple[str, str, Tree]]] = field(default_factory=dict)

    def commit(self, branch: str, title: str, tree: Tree) -> str:
        log = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(json.dumps([branch, len(log), title, sorted((p, b.oid) for p, b in tree.items())]).encode()).hexdigest()
        log.append((oid, title, tree))
        return oid

    def at(self, revision: str) -> tuple[str, str, Tree] | None:
        if log := self.branches.get(revision):
            return log[-1]
        return next((entry for log in self.branches.values() for entry in log if entry[0] == revision), None)


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", **answer: str):
        super().__init__(message)
        self.answer = {"error": message} | answer
        self.status, self.headers = status, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Hub(ThreadingHTTPServer):
    """The server, running between `with` and its end; `url` goes into HF_ENDPOINT."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []  # of requests: method and path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no error."""

    def tree(self, repo_id: str, revision: str = "main") -> Tree:
        return self.repos[repo_id].at(revision)[2]

    def read(self, blob: Blob) -> bytes:
        return self.objects[blob.sha256] if blob.sha256 else blob.content

    def fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            self.log.append((method, path))
            for fault in self.faults:
                if fault.method == method and fault.path in path and fault.seen < fault.times:
                    fault.seen += 1
                    return fault.kind
        return None


ID = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = {
    rf"GET /api/models/{ID}(/revision/{REVISION})?": "info",
    rf"GET /api/models/{ID}/tree/{REVISION}(?P<folder>/.*)?": "tree",
    rf"GET /api/models/{ID}/refs": "refs",
    rf"GET /api/models/{ID}/commits/{REVISION}": "commits",
    rf"(GET|HEAD) /{ID}/resolve/{REVISION}/(?P<path>.+)": "resolve",
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/validate-yaml": "validate",
    r"POST /api/repos/create": "create",
    rf"POST /api/models/{ID}/branch/{REVISION}": "branch",
    rf"POST /api/models/{ID}/preupload/{REVISION}": "preupload",
    rf"POST /api/models/{ID}/commit/{REVISION}": "commit",
    rf"POST /{ID}\.git/info/lfs/objects/batch": "batch",
    rf"POST /{ID}\.git/info/lfs/objects/verify": "verify",
    r"PUT /lfs/(?P<sha256>[0-9a-f]{64})": "store",
}


class Handler(BaseHTTPRequestHandler):
    """One request: a fault, or a method named by ROUTES that returns JSON or bytes with headers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every small answer waits for the client's acknowledgement of the one before
    wbufsize = -1
    server: Hub

    def log_message(self, *_) -> None:
        """Nothing to the terminal."""

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        path, _, query = self.path.partition("?")
        length, fault = int(self.headers.get("Content-Length") or 0), self.server.fault(self.command, path)
        if fault == "drop" and length:
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body, self.query = self.rfile.read(length), parse_qs(query)
        if fault == "flip" and length:
            self.body = flipped(self.body)
        headers, status = {}, 200
        if isinstance(fault, int):
            answer, status = BUSY, fault
        else:
            try:
                answer = self.route(f"{self.command} {path}")
            except Refusal as refusal:
                answer, status, headers = refusal.answer, refusal.status, refusal.headers
        if fault == "lost":
            return self.hang_up()
        if isinstance(answer, tuple):
            answer, status, headers = answer
        if not isinstance(answer, bytes):
            answer, headers = json.dumps(answer).encode(), headers | {"Content-Type": "application/json"}
        self.reply(status, headers, flipped(answer) if fault == "flip" and not length else answer, fault == "drop")

    def reply(self, status: int, headers: dict, answer: bytes, halfway: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(answer))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer[: len(answer) // 2] if halfway else answer)
        if halfway:
            self.hang_up()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def route(self, request: str):
        for pattern, name in ROUTES.items():
            if found := re.fullmatch(pattern, request):
                groups = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                if "repo" in groups and name != "store":
                    groups["repo"] = self.allowed(groups["repo"], writing=self.command == "POST")
                with self.server.lock:
                    return getattr(self, name)(**groups)
        raise Refusal(404, f"no such endpoint: {request}")

    # -- who may do what ---------------------------------------------------------------------------------------------------

    def user(self) -> tuple[str, bool] | None:
        """Name and right to write of the token; 401 for one that nobody has."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def writer(self, owner: str) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != (owner, True):
            raise Refusal(403, f"you don't have the rights to write to {owner}")

    def allowed(self, repo_id: str, writing: bool) -> str:
        user, repo, owner = self.user(), self.server.repos.get(repo_id), repo_id.partition("/")[0]
        if repo is None or (repo.private and (user is None or user[0] != owner)):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if repo.gated and "/resolve/" in self.path and (user is None or user[0] != owner):
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        if writing:
            self.writer(owner)
        return repo_id

    def at(self, repo: str, revision: str) -> tuple[str, str, Tree]:
        found = self.server.repos[repo].at(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # -- reading -----------------------------------------------------------------------------------------------------------

    def whoami(self) -> dict:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": "write" if user[1] else "read"}}}

    def info(self, repo: str, revision: str = "main") -> dict:
        oid, _, tree = self.at(repo, revision)
        siblings = [blob.entry(path) if "blobs" in self.query else {"rfilename": path} for path, blob in sorted(tree.items())]
        return {"id": repo, "modelId": repo, "sha": oid, "private": self.server.repos[repo].private, "tags": [], "siblings": siblings}

    def tree(self, repo: str, revision: str, folder: str = "") -> list:
        tree = self.at(repo, revision)[2]
        found = [blob.entry(path) for path, blob in sorted(tree.items()) if f"/{path}".startswith(f"{folder}/")]
        if folder and not found:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return found

    def refs(self, repo: str) -> dict:
        branches = self.server.repos[repo].branches
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": log[-1][0]} for name, log in branches.items()]
        return {"branches": listed, "tags": [], "converts": []}

    def commits(self, repo: str, revision: str) -> list:
        self.at(repo, revision)
        log = self.server.repos[repo].branches[revision]
        return [
            {"id": oid, "title": title, "message": "", "date": "2024-01-01T00:00:00.000Z", "authors": []} for oid, title, _ in log[::-1]
        ]

    def resolve(self, repo: str, revision: str, path: str) -> tuple:
        oid, _, tree = self.at(repo, revision)
        if path not in tree:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        blob, status = tree[path], 200
        content = self.server.read(blob)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.sha256 or blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.sha256:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            self.server.log.append(("RANGE", path))
            start, end = int(asked[1]), int(asked[2] or blob.size - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{blob.size}"
            content, status = content[start : end + 1], 206
        return content, status, headers

    # -- writing -----------------------------------------------------------------------------------------------------------

    def validate(self) -> dict:
        return {"errors": [], "warnings": []}

    def create(self) -> dict:
        asked = json.loads(self.body)
        owner = asked.get("organization") or (self.user() or ("",))[0]
        self.writer(owner)
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.server.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.server.url}/{repo_id}")
        repo = self.server.repos[repo_id] = Repo(asked.get("visibility") == "private")
        repo.commit("main", "initial commit", {".gitattributes": Blob.of(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        return {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}

    def branch(self, repo: str, revision: str) -> dict:
        branches = self.server.repos[repo].branches
        if revision in branches:
            raise Refusal(409, "Reference already exists")
        branches[revision] = list(branches[json.loads(self.body).get("startingPoint", "main")])
        return {}

    def preupload(self, repo: str, revision: str) -> dict:
        tree, files = self.at(repo, revision)[2], []
        for file in json.loads(self.body)["files"]:
            blob, path = tree.get(file["path"]), file["path"]
            mode = "lfs" if file["size"] >= LARGE or path.endswith(".safetensors") else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": blob and (blob.sha256 or blob.oid)})
        return {"files": files}

    def batch(self, repo: str) -> dict:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{asked['oid']}"}
            verify = {"href": f"{self.server.url}/{repo}.git/info/lfs/objects/verify"}
            missing = asked["oid"] not in self.server.objects
            objects.append(asked | ({"actions": {"upload": upload, "verify": verify}} if missing else {}))
        return {"transfer": "basic", "objects": objects}

    def store(self, sha256: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "the content does not have the SHA-256 that was announced")
        self.server.objects[sha256] = self.body
        return {}

    def verify(self, repo: str) -> dict:
        asked = json.loads(self.body)
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(400, f"object {asked['oid']} is missing or has another size")
        return {}

    def commit(self, repo: str, revision: str) -> dict:
        tree, title = dict(self.at(repo, revision)[2]), ""
        for line in filter(None, self.body.split(b"\n")):
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                tree[value["path"]] = Blob.of(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                pointer = hashlib.sha1(value["oid"].encode()).hexdigest()
                tree[value["path"]] = Blob(value["size"], pointer, sha256=value["oid"])
            elif key == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refusal(400, f"unknown operation {key}")
        proposed = "create_pr" in self.query
        branch = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in self.server.repos[repo].branches)}" if proposed else revision
        oid = self.server.repos[repo].commit(branch, title, tree)
        url = f"{self.server.url}/{repo}"
        return {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "pullRequestUrl": f"{url}/discussions/1"}


def flipped(content: bytes) -> bytes:
    """The content with its last byte changed."""
    return content[:-1] + bytes([content[-1] ^ 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (default: a free one)")
    hub = Hub(parser.parse_args().port)
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={OWNER} HF_HUB_DISABLE_XET=1", flush=True)
    with suppress(KeyboardInterrupt):
        hub.serve_forever()


if __name__ == "__main__":
    main()
