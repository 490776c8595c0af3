"""An author behind a URL: any server with OpenAI's /chat/completions, asked with the standard library alone.

Every answer is kept in a folder under the sha256 of its question, so a table that was interrupted or is written again
asks only what is new.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prism_ray.documents import parse_json
from prism_ray.errors import InputError, PrismError
from prism_ray.prompts.write import Author, Messages
from prism_ray.storage import open_store, read_json, sha256_of, to_json

SOURCE = "http"
WORTH_ANOTHER_TRY = (408, 429, 500, 502, 503, 504)
FIRST_PAUSE_S = 1.0
MOST_ANSWER_BYTES = 2**20
ANSWER_TOKENS = 2048


class ServerError(PrismError):
    """A server gave no answer; what it answered before is kept."""


@dataclass(frozen=True)
class ChatServer:
    """Where and how an author is asked.

    Attributes:
        url: up to the version, such as http://127.0.0.1:8000/v1.
        model: its name there.
        cache_dir: address of the folder in which answers are kept.
        api_key_variable: environment variable that holds the key; no key is sent if it is unset or empty.
        timeout_s: of one try, to the last byte of its answer.
        max_retries: tries after the first.
    """

    url: str
    model: str
    cache_dir: str | Path
    api_key_variable: str = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    max_retries: int = 3

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username is not None or parts.password is not None:
            # The address itself holds the secret, so it is not repeated.
            raise InputError("prompts.url: holds a password; remove it and set the key's environment variable instead")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError(f"prompts.url={self.url!r}: is no address; expected one such as http://127.0.0.1:8000/v1")


@dataclass(frozen=True)
class Kept:
    """An answer as it is kept."""

    question: dict[str, Any]
    answer: str


def author_behind(server: ChatServer) -> Author:
    """An author whose answers come from a server, or from the folder if it answered before.

    Its `ask` raises:
        ServerError: no answer after all tries, or one that says the question is wrong (status 4xx).
    """
    opener = urllib.request.build_opener(_NoRedirect)
    store = open_store(str(server.cache_dir))

    def ask(messages: Messages) -> str:
        question = {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS}
        body = json.dumps(question, sort_keys=True, ensure_ascii=False).encode()
        digest = sha256_of(body)
        kept = read_json(store, f"{digest}.json", Kept)
        if kept is None:
            kept = Kept(question, _answer(server, opener, body, digest))
            store.create(f"{digest}.json", to_json(asdict(kept)))
        return kept.answer

    return Author(SOURCE, ask)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Answers with the redirect itself: the next address would get the key too."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _answer(server: ChatServer, opener: urllib.request.OpenerDirector, body: bytes, digest: str) -> str:
    """Ask until there is an answer, with pauses that double and differ between questions."""
    request = urllib.request.Request(f"{server.url.rstrip('/')}/chat/completions", data=body, headers=_headers(server))
    reason = ""
    for attempt in range(server.max_retries + 1):
        if attempt:
            jitter = int(sha256_of(f"{digest} {attempt}".encode())[:8], 16) / 2**32
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) * (0.5 + jitter))
        try:
            return _text_of(_read(opener, request, server.timeout_s))
        except urllib.error.HTTPError as error:
            error.close()
            # Only the status: some servers repeat the key in their message.
            reason = f"status {error.code}"
            if error.code not in WORTH_ANOTHER_TRY:
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = _kind(error)
    raise ServerError(
        f"prompts.url={server.url!r}: gave no answer ({reason}); check server, model and key and run the same command "
        "again, which asks only what is missing, or set prompts.back_end=template"
    )


def _headers(server: ChatServer) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(server.api_key_variable, "").strip()
    if key:
        # http.client would put a key with a line break into its own message.
        if not (key.isascii() and key.isprintable()):
            raise InputError(
                f"prompts.api_key_variable: the value of {server.api_key_variable} is no key; expected printable ASCII "
                "in one line"
            )
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _read(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout_s: float) -> bytes:
    """The body of an answer. The socket's own time-out starts anew with every byte, hence the clock."""
    end = time.monotonic() + timeout_s
    data = b""
    with opener.open(request, timeout=timeout_s) as response:
        while part := response.read1(2**16):
            data += part
            if len(data) > MOST_ANSWER_BYTES:
                raise ValueError(f"an answer of more than {MOST_ANSWER_BYTES} bytes")
            if time.monotonic() > end:
                raise TimeoutError
    return data


def _text_of(data: bytes) -> str:
    """The text of a chat completion; empty where the model declined to write one."""
    try:
        text = parse_json(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError("an answer that is no chat completion") from error
    if not isinstance(text, str | None):
        raise ValueError("an answer that is no chat completion")
    return text or ""


def _kind(error: Exception) -> str:
    """What went wrong, in words of our own: messages of libraries may hold a part of the request."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return "time-out"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    return str(error) if type(error) is ValueError else type(error).__name__
