"""What the stand-in of the Hub answers: repositories, and the storage beside them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from abc import ABC, abstractmethod
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.files import TOKEN, File, is_large

if TYPE_CHECKING:
    from tests.hub.server import Hub


class Handler(ABC, BaseHTTPRequestHandler):
    hub: Hub  # set by a subclass for each hub
    protocol_version = "HTTP/1.1"  # connections stay open, as with the Hub
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one packet, which need not wait for the one before

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        line = f"{self.command} {self.shown(url.path)}"
        with self.hub.lock:
            self.hub.requests.append(line)
            self.fault = None
            for fault in self.hub.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    self.fault = fault
                    break
        if self.fault is not None and self.fault.do is not None:
            self.fault.do()
        if self.fault is not None and self.fault.status is not None:
            return self.error(self.fault.status, "ordered by the test")
        self.route(url.path)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def shown(self, path: str) -> str:
        return path

    @abstractmethod
    def route(self, path: str) -> None:
        """Answer a request."""

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        """Answer; a range that was asked for is cut out."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.after is not None:
            self.wfile.write(data[: self.fault.after])
            self.close_connection = True  # in the middle of the body
        else:
            self.wfile.write(data)

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def error(self, status: int, message: str, code: str = "") -> None:
        self.json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)


class Storage(Handler):
    """Large files: PUT and GET by sha256, without a token, since the address is secret enough."""

    def shown(self, path: str) -> str:
        return f"/storage/{self.query.get('name', path)}"

    def route(self, path: str) -> None:
        oid = path.rsplit("/", 1)[-1]
        if "Authorization" in self.headers:
            self.error(400, "a token was sent to the storage")
        elif self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self.error(400, "the content has another sha256")
            self.hub.storage[oid] = self.body
            self.send(b"")
        elif oid in self.hub.storage:
            self.hub.ranges[self.query.get("name", "")].append(self.headers.get("Range", ""))
            self.send(self.hub.storage[oid], ETag=f'"{oid}"', Accept_Ranges="bytes")
        else:
            self.error(404, "no such object")


class Api(Handler):
    """Repositories."""

    def route(self, path: str) -> None:
        for pattern, name in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                groups = {key: unquote(value) for key, value in found.groupdict().items()}
                repo = groups.pop("repo", None)
                if repo is None:
                    return getattr(self, name)(**groups)
                if self._may(repo, write=self.command in ("POST", "PUT")):
                    return getattr(self, name)(repo, **groups)
                return None
        self.error(404, f"the stand-in does not know {self.command} {path}")

    def _token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may(self, name: str, write: bool) -> bool:
        """Whether the request may touch the repository; answers if not."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._token()):
            # Without a token the Hub does not say which of the two.
            self.error(404 if self._token() else 401, "Repository not found", "RepoNotFound")
        elif write and not self._token():
            self.error(401, "Invalid username or password.")
        elif repo.gated and not self._token() and "/resolve/" in self.path:
            self.error(401, "Access to this model is restricted.", "GatedRepo")
        else:
            return True
        return False

    def _commit(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; answers if there is none."""
        found = self.hub.repos[repo].find(revision)
        if found is None:
            self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # ---- reading ------------------------------------------------------------------------

    def info(self, repo: str, revision: str = "main") -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        siblings = []
        for name, file in self.hub.repos[repo].commits[commit].items():
            entry: dict[str, Any] = {"rfilename": name}
            if "blobs" in self.query:
                entry |= {"size": file.size, "blobId": file.oid}
                if file.large:
                    lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": 130}
                    entry["lfs"] = lfs
            siblings.append(entry)
        private = self.hub.repos[repo].private
        self.json({"id": repo, "sha": commit, "private": private, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        entries = []
        for name, file in self.hub.repos[repo].commits[commit].items():
            entry = {"type": "file", "path": name, "size": file.size, "oid": file.oid}
            if file.large:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
            entries.append(entry)
        # In pages, as the Hub's lists are; its pages are longer.
        start, step = int(self.query.get("cursor", 0)), 5
        more = {}
        if start + step < len(entries):
            url = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={start + step}"
            more["Link"] = f'<{url}>; rel="next"'
        self.json(entries[start : start + step], **more)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        file = self.hub.repos[repo].commits[commit].get(name)
        if file is None:
            return self.error(404, "Entry not found", "EntryNotFound")
        headers = {"X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if not file.large:
            return self.send(file.data, ETag=f'"{file.oid}"', **headers)
        url = f"{self.hub.storage_url}/{file.sha256}?name={quote(name)}"
        linked = {"X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": str(file.size)}
        self.send(b"", 302, Location=url, **linked, **headers)

    # ---- writing ------------------------------------------------------------------------

    def create(self) -> None:
        values = json.loads(self.body)
        name = f"{values['organization']}/{values['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if not self._token():
            return self.error(401, "Invalid username or password.")
        if values["organization"] == "others":
            return self.error(403, "You don't have the rights to create a model there")
        if name in self.hub.repos:
            return self.json({**url, "error": "You already created this model repo"}, 409)
        private = values.get("private") or values.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self.json(url)

    def branch(self, repo: str, revision: str) -> None:
        refs = self.hub.repos[repo].refs
        if revision in refs:
            return self.error(409, "Reference already exists")
        refs[revision] = refs["main"]
        self.json({})

    def check_card(self) -> None:
        content = json.loads(self.body)["content"]
        if content.startswith("---\n"):
            return self.json({"errors": [], "warnings": []})
        self.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})

    def preupload(self, repo: str, revision: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        there = self.hub.repos[repo].commits[commit]
        answer = []
        for file in json.loads(self.body)["files"]:
            name, size = file["path"], file["size"]
            large = is_large(name, size)
            entry = {"path": name, "uploadMode": "lfs" if large else "regular"}
            if name in there:  # what it is now: of a large file the content's sha256
                entry["oid"] = there[name].sha256 if there[name].large else there[name].oid
            answer.append({**entry, "shouldIgnore": False})
        self.json({"files": answer})

    def batch(self, repo: str) -> None:
        objects = []
        for entry in json.loads(self.body)["objects"]:
            if entry["oid"] not in self.hub.storage:
                upload = {"href": f"{self.hub.storage_url}/{entry['oid']}"}
                verify = {"href": f"{self.hub.url}/{repo}.git/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.json({"transfer": "basic", "objects": objects})

    def verify(self, repo: str) -> None:
        entry = json.loads(self.body)
        data = self.hub.storage.get(entry["oid"])
        there = data is not None and len(data) == entry["size"]
        self.json({}) if there else self.error(404, "no such object")

    def commit(self, repo: str, revision: str) -> None:
        parent = self._commit(repo, revision)
        if parent is None:
            return
        found = self.hub.repos[repo]
        files = dict(found.commits[parent])
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                if value.get("parentCommit") not in (None, parent):
                    return self.error(412, "A commit has happened since. Please refresh.")
            elif entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    return self.error(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.storage[value["oid"]], large=True)
            else:
                del files[value["path"]]
        commit = found.commit(revision, files)
        self.json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})


# Branches with a "/" come quoted, so that a part of a path has none.
_NAME = "(?P<repo>[^/]+/[^/]+)"
_MODEL = f"/api/models/{_NAME}"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES = (
    (f"GET {_MODEL}", "info"),
    (f"GET {_MODEL}/revision/{_REVISION}", "info"),
    (f"GET {_MODEL}/tree/{_REVISION}", "tree"),
    (f"(GET|HEAD) /{_NAME}/resolve/{_REVISION}/(?P<name>.+)", "resolve"),
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "check_card"),
    (f"POST {_MODEL}/branch/{_REVISION}", "branch"),
    (f"POST {_MODEL}/preupload/{_REVISION}", "preupload"),
    (f"POST {_MODEL}/commit/{_REVISION}", "commit"),
    (f"POST /{_NAME}[.]git/info/lfs/objects/batch", "batch"),
    (f"POST /{_NAME}[.]git/verify", "verify"),
)
