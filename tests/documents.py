"""The documents of this repository as tests see them: fenced blocks, and the commands in those of shell."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("README.md", "GUIDE.md", "jobs/README.md", "cluster/README.md", "benchmarks/README.md")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    line: int  # of the fence, from 1
    language: str
    text: str

    @property
    def named(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        Block(document, text.count("\n", 0, found.start()) + 1, found[2], found[3]) for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block; comments are left out, continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
