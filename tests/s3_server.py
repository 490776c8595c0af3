"""An S3 server on loopback (moto, in this process), and a proxy in front of it that does what networks do.

with s3_server() as server:                     # one bucket, `BUCKET`; credentials in `server.environment`
    with faulty(server, share=0.1, seed=0) as proxy:
        ...                                     # the same bucket through `proxy.environment`
"""

import contextlib
import hashlib
import http.client
import json
import logging
import os
import random
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BUCKET = "prism"
ACCESS_KEY, SECRET_KEY = "a-key-of-tests", "a-secret-of-tests"

FAULTS = ("500", "503", "404", "timeout", "reset", "lost")
"""An answer instead of the work (404 to reads alone); silence; a cut line; the work done and its answer lost."""

QUIET_S = 5.0
"""How long a timeout lasts; clients of the proxy are told to wait less, and still longer than a busy machine takes."""
CLIENT_TIMEOUT_S = 4.0
TIMEOUT_SHARE = 0.1
"""Of faults of several kinds; the others cost no time."""


@dataclass
class Server:
    """Where an S3 service listens."""

    endpoint: str
    is_proxy: bool = False
    faults: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which programs find it."""
        timeouts = {"FSSPEC_S3_CONFIG_KWARGS": json.dumps({"read_timeout": CLIENT_TIMEOUT_S})}
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **(timeouts if self.is_proxy else {}),
        }


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """A fresh S3 service with one empty bucket."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        server = Server(f"http://{host}:{port}")
        urllib.request.urlopen(
            urllib.request.Request(f"{server.endpoint}/{BUCKET}", method="PUT", headers=_authorized()), timeout=30
        ).close()
        yield server
    finally:
        moto.stop()


def _authorized() -> dict[str, str]:
    """A header by which moto takes a request for one of S3; it checks no signature."""
    scope = f"{ACCESS_KEY}/20260101/us-east-1/s3/aws4_request"
    return {"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=00"}


@contextlib.contextmanager
def faulty(server: Server, *, share: float = 0.1, seed: int = 0, kinds: tuple[str, ...] = FAULTS) -> Iterator[Server]:
    """A proxy that spoils a share of the requests, which ones by the seed and their order.

    Whoever talks to it must wait longer than `CLIENT_TIMEOUT_S` for nothing.
    """
    target = urlsplit(server.endpoint)
    generator, lock = random.Random(seed), threading.Lock()
    proxy = Server("", is_proxy=True)
    quick = [kind for kind in kinds if kind != "timeout"]

    def drawn() -> str:
        """The next request's fault, or none."""
        if generator.random() >= share:
            return ""
        is_quick = generator.random() >= TIMEOUT_SHARE or "timeout" not in kinds
        return generator.choice(quick) if quick and is_quick else "timeout"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return

        def handle_any(self) -> None:
            body = self._body()
            with lock:
                fault = drawn()
                if fault == "404" and self.command not in ("GET", "HEAD"):
                    fault = "500"
                proxy.requests[self.command] += 1
                proxy.faults[fault] += bool(fault)
            if fault in ("500", "503", "404"):
                codes = {"500": "InternalError", "503": "SlowDown", "404": "NoSuchKey"}
                text = f"<Error><Code>{codes[fault]}</Code><Message>a test</Message></Error>".encode()
                self._answer(int(fault), {"Content-Type": "application/xml"}, text)
            elif fault == "timeout":
                time.sleep(QUIET_S)
                self._cut()
            elif fault == "reset":
                self._cut()
            else:
                status, headers, content = self._forwarded(body)
                self._cut() if fault == "lost" else self._answer(status, headers, content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _forwarded(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            left_out = ("transfer-encoding", "content-length", "connection", "expect")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in left_out}
            connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
            try:
                connection.request(self.command, self.path, body=body, headers=headers)
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _cut(self) -> None:
            """End the connection without an answer."""
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    class Proxy(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            return  # clients that gave up

    with Proxy(("127.0.0.1", 0), Handler) as listening:
        proxy.endpoint = f"http://127.0.0.1:{listening.server_address[1]}"
        threading.Thread(target=listening.serve_forever, name="faulty", daemon=True).start()
        try:
            yield proxy
        finally:
            listening.shutdown()


@contextlib.contextmanager
def environment(server: Server) -> Iterator[None]:
    """This process's stores talk to a server, also those that talked to another one before."""
    from prism_ray import artifacts, storage, stores

    remembered = (stores._filesystem, storage._object_store, artifacts._listing, artifacts._remote_facts)
    before = {name: os.environ.get(name) for name in server.environment}
    import fsspec.config

    configured = dict(fsspec.config.conf)
    try:
        os.environ.update(server.environment)
        fsspec.config.conf["s3"] = {"config_kwargs": {"read_timeout": CLIENT_TIMEOUT_S}} if server.is_proxy else {}
        for function in remembered:
            function.cache_clear()
        yield
    finally:
        fsspec.config.conf.clear()
        fsspec.config.conf.update(configured)
        for function in remembered:
            function.cache_clear()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def products_at(url: str) -> dict[str, str]:
    """sha256 of everything a run in a storage promises to make again bit for bit, by key; see `commands.products`."""
    from prism_ray.storage import open_store

    root = open_store(url)
    (run,) = {key.split("/")[1] for key in root.keys("runs")}
    store = open_store(root.url_of(f"runs/{run}"))
    keys = [key for folder in ("images", "labels", "student") for key in store.keys(folder)]
    return {
        key: hashlib.sha256(store.read(key)).hexdigest() for key in keys if key.endswith((".parquet", ".safetensors"))
    }
