"""Files that are not what their names say: what a download left in place of the data.

    the first bytes of a file --stand_in--> what they are, and the way out; None if they may be data

A pointer of Git LFS, Xet or git-annex is a few lines of text in place of a file that was not fetched. A page is what a
server sends instead of a file: HTML, or the XML of a storage service. In a .txt only the pointers, whose form is
fixed, can be distinguished from text.
"""

import codecs
import re
from pathlib import Path

HEAD_BYTES = 1024
"""A pointer is shorter than this, and a page can be recognised within it."""

_LFS = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/v1\s")
_PAGE = re.compile(rb"<(!doctype\s+html|html|head|\?xml|error>)", re.IGNORECASE)


def stand_in(head: bytes, pages: bool = True) -> str | None:
    """What a file is instead of data.

    Args:
        head: its first HEAD_BYTES, or the whole file if it is shorter.
        pages: whether a page counts as a stand-in too, as in every kind of file except plain text.
    """
    short = len(head) < HEAD_BYTES
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()  # as an editor may have left a pointer
    if _LFS.match(head) and b"oid sha256:" in head and short:
        return "it is a pointer of Git LFS, not the file itself: run git lfs pull where it was cloned"
    if head.startswith(b"# xet version") and short:
        return "it is a pointer of Git Xet, not the file itself: run git xet checkout where it was cloned"
    if head.startswith((b"/annex/objects/", b"annex/objects/")) and short:
        return "it is a pointer of git-annex, not the file itself: run git annex get where it was cloned"
    if pages and _PAGE.match(head):
        return "it is a page of a web server, not the file itself: the download failed, fetch it again"
    return None


def stand_in_at(path: Path, pages: bool = True) -> str | None:
    """The same for a local file."""
    with path.open("rb") as file:
        return stand_in(file.read(HEAD_BYTES), pages)
