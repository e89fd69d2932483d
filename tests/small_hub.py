"""A Hugging Face Hub on this machine, for huggingface_hub's real client: files to download, repositories to upload to."""

import contextlib
import hashlib
import http.server
import json
import re
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """What the Hub answers; the server has files, by OWNER/NAME/FILE, and asked, pairs of (method, path)."""

    def do_HEAD(self):
        self.download(False)

    def do_GET(self):
        self.download(True)

    def download(self, body):
        """/OWNER/NAME/resolve/REVISION/FILE"""
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", self.path.split("?")[0]):
            names = [name[len(match[1]) + 1 :] for name in self.server.files if name.startswith(f"{match[1]}/")]
            return self.tell(200, id=match[1], sha=COMMIT, siblings=[dict(rfilename=name) for name in names])
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        self.server.asked.append((self.command, found and found[2]))
        content = self.server.files.get(f"{found[1]}/{found[3]}") if found else None
        if content is None or found[2] == "gone":
            return self.answer(404)
        named = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, content if body else b"", length=len(content), **named)

    def do_PUT(self):
        """A large file, at the address that the answer before gave."""
        self.server.large[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer(200)

    def do_POST(self):
        text, where = self.body(), self.path.split("?")[0]
        self.server.asked.append(("POST", where))
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.tell(401, error="Invalid username or password.")
        if where.endswith("/create"):
            return self.tell(200, url=f"{self.server.url}/{json.loads(text)['organization']}/{json.loads(text)['name']}")
        if "/preupload/" in where:
            kinds = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in json.loads(text)["files"]]
            files = [dict(path=path, uploadMode=kinds[path.endswith(".safetensors")], shouldIgnore=False) for path in paths]
            return self.tell(200, files=files)
        if where.endswith("/objects/batch"):
            objects = json.loads(text)["objects"]
            upload = [o | {"actions": {"upload": {"href": f"{self.server.url}/large/{o['oid']}"}}} for o in objects]
            return self.tell(200, transfer="basic", objects=upload)
        if "/commit/" in where:
            for line in map(json.loads, text.splitlines()):
                self.server.commits.append((line["key"], line["value"]))
            return self.tell(
                200, commitUrl=f"{self.server.url}/{'/'.join(where.split('/')[3:5])}/commit/{COMMIT}", commitOid=COMMIT
            )
        return self.tell(200)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def tell(self, code, **values):
        self.answer(code, json.dumps(values).encode())

    def answer(self, code, content=b"", length=None, **headers):
        self.send_response(code)
        for key, value in {"Content-Length": len(content) if length is None else length, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Nothing on stderr."""


@contextlib.contextmanager
def small_hub(files=()):
    """Yields a server that has url, files, asked, and of uploads large, {SHA-256: content}, and commits, (kind, value)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files = f"http://127.0.0.1:{server.server_port}", dict(files)
    server.asked, server.large, server.commits = [], {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
