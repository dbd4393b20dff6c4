"""Datasets on the hub: which files they are, and reading them over ranged requests, even if the network often breaks.

    id, config, split --datasets--> data files of one commit --RemoteFile--> readers.py, as for local files
    id of token files --snapshot_download--> a local folder, every file compared with the hub's list

`datasets` knows how a repository's configurations and splits become files. This project's readers read the files, not
the streams of `datasets`: those start a file again after every break and every resume (a file of FineWeb-Edu is 2 GB),
and sleep minutes within their retries, in silence. Here a request fetches at most `readers.READ_BYTES`, of parquet only
from the one column's chunks, and a position is a row group and a row. The commit is part of the position, so files that
change on the hub meanwhile are not mixed.

After a passing fault (timeout, broken connection, answer cut short, 429, 5xx) the request is tried again with growing
delays, each reported; after an answer the next request has all its tries again. A lasting fault (no such dataset, file,
configuration or split; gated) fails at once. A hub that was never reached is given up sooner than one that broke off.

Known gaps: nothing is read ahead, so a small row group costs a round trip; only parquet and JSON lines are streamed.
"""

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ds_slm.data.sources.readers import READ_BYTES, TextFile, suffix_of
from ds_slm.data.sources.splits import ALL
from ds_slm.errors import DataError
from ds_slm.files import shortened
from ds_slm.recipe.data_sections import Source

FIRST_DELAYS_S = (1.0, 2.0, 4.0)
"""Waits before the first requests for a dataset are tried again."""
DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""The same for reading, once the hub has answered."""
LONGEST_WAIT_S = 300.0
"""The longest wait that the hub may ask for: its limits count per 5 minutes."""
NETWORK = ("httpx", "httpcore")
"""Prefixes of modules whose errors mean that the hub was not reached; huggingface_hub decides which one it uses."""
NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "ProxyError")
"""Names of its errors that mean that no connection was made."""
STREAMED = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")

Report = Callable[[str], None]
Result = TypeVar("Result")


class Hub:
    """Requests to the hub for one source."""

    def __init__(self, source: Source, report: Report) -> None:
        """`report` takes a line for every try that failed."""
        self.source, self._report = source, report

    def commit(self, revision: str | None = None) -> str:
        """The commit of a revision of the dataset, or of its newest state. Raises DataError as `ask` does."""
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

        api, name = HfApi(), str(self.source.id)
        info = self.ask(lambda: api.dataset_info(name, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT), FIRST_DELAYS_S)
        return str(info.sha)

    def text_files(self, commit: str) -> list[TextFile]:
        """The data files of the source's split at a commit, in order.

        Raises:
            DataError: the configuration or split does not exist (names those that do), or files are of other kinds.
        """
        from datasets import load_dataset_builder

        source = self.source
        prefix = f"hf://datasets/{source.id}"  # without it a local folder of that name would be taken
        builder = self.ask(lambda: load_dataset_builder(prefix, source.config, revision=commit), FIRST_DELAYS_S)
        splits = builder.config.data_files or {}
        if source.split not in (*splits, ALL):
            there = shortened([repr(str(split)) for split in splits]) or "none"
            self._give_up(f"no split {source.split!r}, the splits there are: {there}")
        chosen = [source.split] if source.split in splits else list(splits)
        urls = list(dict.fromkeys(str(url) for split in chosen for url in splits[split]))
        strange = [url for url in urls if not url.startswith(f"{prefix}@{commit}/") or suffix_of(url) not in STREAMED]
        if strange:
            self._give_up(f"it is not made of {', '.join(STREAMED)} files of its own: {strange[0]}")
        return [self._text_file(url.removeprefix(f"{prefix}@{commit}/"), commit) for url in urls]

    def _text_file(self, path: str, commit: str) -> TextFile:
        buffer_bytes = 1 if suffix_of(path) == ".parquet" else READ_BYTES  # parquet knows what it wants
        return TextFile(
            f"{self.source.id}/{path}", lambda: io.BufferedReader(RemoteFile(self, path, commit), buffer_bytes)
        )

    def token_files(self, suffix: str) -> Path:
        """A local folder with the dataset's files that have a suffix, downloaded at the source's revision.

        Raises:
            DataError: a file is missing, a request fails as in `ask`, or the hub has no such revision.
        """
        from huggingface_hub import HfApi, snapshot_download

        name, commit = str(self.source.id), self.commit(self.source.revision)
        listed = self.ask(lambda: HfApi().dataset_info(name, revision=commit, files_metadata=True)).siblings or []
        sizes = {file.rfilename: file.size for file in listed if file.rfilename.endswith(suffix)}
        download = partial(snapshot_download, name, repo_type="dataset", revision=commit, allow_patterns=[*sizes])

        def download_all() -> Path:
            folder = Path(download())  # if the hub breaks off, it silently gives what is there
            found = {path: (folder / path).stat().st_size if (folder / path).exists() else None for path in sizes}
            if missing := [path for path, size_bytes in sizes.items() if size_bytes not in (None, found[path])]:
                raise ConnectionError(f"{missing[0]} did not come whole")
            return folder

        if not sizes:
            self._give_up(f"it holds no {suffix} file")
        return self.ask(download_all)

    def ask(self, request: Callable[[], Result], delays_s: tuple[float, ...] | None = None) -> Result:
        """The request's answer, asked again as long as a failure may pass.

        Raises:
            DataError: the failure does not pass, or not soon enough.
        """
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import get_session

        get_session().timeout = HF_HUB_DOWNLOAD_TIMEOUT  # several of its calls would wait for ever
        for delay_s in (*(DELAYS_S if delays_s is None else delays_s), None):
            try:
                return request()
            except Exception as error:  # the hub's libraries raise many kinds
                if delay_s is None or not _may_pass(error):
                    self._give_up(reason_of(error), error)
                wait_s = max(delay_s, min(_asked_wait_s(error), LONGEST_WAIT_S))
                self._report(f"{self.source.name}: the hub failed ({reason_of(error)}), trying again in {wait_s:g} s")
                time.sleep(wait_s)
        raise AssertionError

    def _give_up(self, reason: str, error: Exception | None = None) -> NoReturn:
        source = self.source
        raise DataError(
            f"source {source.name!r}: the hub gave no {source.id!r} ({reason}); to do without it, {way_out(source)}."
        ) from error


class RemoteFile(io.RawIOBase):
    """A file of a dataset at one commit, read by ranges."""

    def __init__(self, hub: Hub, path: str, commit: str) -> None:
        """The first request comes with the first use."""
        from huggingface_hub import hf_hub_url

        self._hub, self._path, self._position = hub, path, 0
        self._url = hf_hub_url(str(hub.source.id), path, repo_type="dataset", revision=commit)

    @cached_property
    def size_bytes(self) -> int:
        """The file's size as the hub lists it."""
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

        facts = self._hub.ask(partial(get_hf_file_metadata, self._url, timeout=HF_HUB_ETAG_TIMEOUT))
        if facts.size is None:
            raise OSError("the hub does not say how long it is")
        return facts.size

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Nothing is fetched."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (self.size_bytes if base is None else base)
        return self._position

    def tell(self) -> int:
        """The place of the next byte."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the hub, or as much of it as the file has left."""
        end = min(self._position + len(buffer), self.size_bytes)
        if end <= self._position:
            return 0
        block = self._hub.ask(partial(self._range, self._position, end))
        buffer[: len(block)] = block
        self._position = end
        return len(block)

    def _range(self, begin: int, end: int) -> bytes:
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        answer = get_session().get(self._url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(answer)
        if len(answer.content) != end - begin:
            raise ConnectionError(
                f"{len(answer.content)} bytes of {self._path} came where {end - begin} were asked for"
            )
        return answer.content


@cache
def unreachable() -> str | None:
    """Why the hub cannot be asked, which is found out once in a process; None if it gives any answer.

    The longest wait is HF_HUB_ETAG_TIMEOUT, in seconds, for each of its addresses; a request that failed sooner is
    tried again. After `unreachable.cache_clear()` the hub is asked again.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    if (error := _error_of_a_request()) is None:
        return None
    if any("Timeout" in type(cause).__name__ for cause in _causes(error)) or not _may_pass(error):
        return reason_of(error)
    time.sleep(FIRST_DELAYS_S[0])
    again = _error_of_a_request()
    return reason_of(again) if again else None


def _error_of_a_request() -> Exception | None:
    """Why the hub's start page was not reached; None after any answer."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:  # an answer that points elsewhere is an answer: a mirror's start page may lie on another host
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT, follow_redirects=False)
    except Exception as error:  # the network library's own kinds
        return error
    return None


@contextmanager
def offline() -> Iterator[None]:
    """Let the hub's libraries use nothing but their cache, as with HF_HUB_OFFLINE."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = was


def is_uncached(error: Exception) -> bool:
    """Whether the hub's libraries failed while `offline` because their cache does not hold what was asked for."""
    # datasets raises a bare ValueError if it has another configuration; damaged files raise other types.
    return any(isinstance(one, ConnectionError) or type(one) is ValueError for one in _causes(error))


def way_out(source: Source) -> str:
    """What to do without a hub, or if a path is wrong."""
    return f"name a local file or folder with --source {source.name}=PATH"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _statuses(error: Exception) -> list[int]:
    answers = (getattr(cause, "response", None) for cause in _causes(error))
    return [answer.status_code for answer in answers if answer is not None]


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return False
    if statuses := _statuses(error):
        return all(status in (408, 425, 429) or status >= 500 for status in statuses)
    return any(_is_of_network(cause) for cause in causes)


def _is_of_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(NETWORK)


def _asked_wait_s(error: Exception) -> float:
    """Seconds that an answer asks to wait, in either of the headers for it."""
    for cause in _causes(error):
        headers = getattr(getattr(cause, "response", None), "headers", {})
        asked = re.fullmatch(r"(\d+)", headers.get("retry-after", "")) or re.search(
            r"\bt=(\d+)", headers.get("ratelimit", "")
        )
        if asked:
            return float(asked[1])
    return 0.0


def reason_of(error: Exception) -> str:
    """The first line of an error of the hub's libraries; which host was not reached; how to log in if that may help."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
    if any(type(cause).__name__ in NOT_CONNECTED for cause in _causes(error)):
        reason = f"{constants.ENDPOINT} cannot be reached: {reason}"
    if {401, 403} & set(_statuses(error)) or isinstance(error, DatasetNotFoundError):
        reason += "; no such dataset, or no access: accept its terms on its page, log in with hf auth login or HF_TOKEN"
    return reason
