"""Bring a model repository of the Hugging Face hub into a checkpoint folder.

    python scripts/download.py --repo_id tiiuae/falcon-7b

Takes the configuration, the tokenizer and one set of weights, verified by size and hash. After an interruption the
same command goes on where it stopped. HF_HOME, HF_ENDPOINT and HF_TOKEN are respected.
"""

import hashlib
import json
import re
import shlex
import shutil
import time
from fnmatch import filter as matching
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.cli import run
from lit_gpt.errors import UsageError, UserError

repo_id: str | None = None  # Download this repository: owner/name as in the address of its page; required.
checkpoint_dir: Path | None = None  # Put the files here (null: into checkpoints/<repo_id>).
revision: str | None = None  # Take this branch, tag or commit (null: the main branch).
access_token: str | None = None  # Open gated and private repositories with it (null: HF_TOKEN or the stored login).

# By hand: huggingface_hub.snapshot_download checks no hash, only warns of a full disk, and gives up after 5 seconds.
NEEDED = """config.json generation_config.json tokenizer.json tokenizer.model tokenizer_config.json added_tokens.json
    special_tokens_map.json vocab.json merges.txt *.jinja LICENSE* README.md""".split()
WEIGHTS = {"model.safetensors": "*.safetensors", "pytorch_model.bin": "pytorch_model*.bin"}  # the first that is there
NOT_WEIGHTS = "consolidated*", "adapter_model*"  # the same tensors under the maker's names; an adapter without its base
WAITS = 1, 2, 4, 8, 15  # seconds before each new try; after one that brought something, from the first again
TEMPORARY = None, 408, 429, 500, 502, 503, 504  # status of answers that may be others soon; None: no answer at all


class File(NamedTuple):
    """A file as the hub lists it, and where it goes."""

    path: Path
    url: str
    size: int
    git_hash: str
    sha256: str | None  # LFS files have one

    @property
    def part(self) -> Path:
        """Return where it grows, named after the content, so that another revision's part is never continued."""
        return self.path.with_name(f"{self.path.name}.{self.git_hash[:12]}.part")


def main() -> None:
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import WeakFileLock, logging, validate_repo_id

    logging.set_verbosity_error()  # its warnings of retries and missing tokens would mix with what is said here
    try:
        validate_repo_id(repo_id or "")
    except HFValidationError:
        got = f", got '{repo_id}'" if repo_id else ""
        raise UsageError(f"--repo_id: expected a repository as owner/name, such as tiiuae/falcon-7b{got}") from None
    folder = checkpoint_dir or Path("checkpoints", str(repo_id))
    try:
        headers = request_headers(access_token)
        wanted = choose(list_files(folder), headers)
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / ".download.lock", timeout=0.1):  # two would append to the same part
            for file in plan(wanted, folder):
                obtain(file, headers)
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(explain(error, str(repo_id), revision)) from None
    except TimeoutError:
        raise UserError(f"{folder}: another download into this folder is running; wait for it or end it") from None
    print(f"Complete and verified: {count(wanted)}. Next:")
    print(f"python scripts/convert_hf_checkpoint.py --checkpoint_dir {shlex.quote(str(folder))}")


def request_headers(token: str | None) -> dict[str, str]:
    """Return the headers of all requests for files."""
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=token or None)
    if not re.fullmatch("(Bearer [!-~]+)?", headers.get("authorization", "")):  # httpx would quote it in its error
        raise UsageError("the access token (--access_token, HF_TOKEN) has a character that no token has; copy it again")
    # uncompressed: a byte on the line is a byte of the file, and a range can be taken up again
    return headers | {"accept-encoding": "identity"}


def list_files(folder: Path) -> dict[str, File]:
    """List the files at the repository's root, all of the one commit that the revision is now."""
    from huggingface_hub import HfApi, constants, hf_hub_url

    try:
        info = HfApi(token=access_token or None).model_info(
            repo_id, revision=revision or None, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        print(f"{repo_id}, revision {revision or 'main'} ({info.sha[:8]}) -> {folder}")
        files = {}
        for entry in info.siblings:
            name = entry.rfilename
            if Path(name).name == name:
                sha256 = entry.lfs.sha256 if entry.lfs else None
                url = hf_hub_url(repo_id, name, revision=info.sha)
                files[name] = File(folder / name, url, entry.size, entry.blob_id, sha256)
        return files
    except (ValueError, TypeError, KeyError):  # not JSON, or of another shape
        raise UserError(f"{constants.ENDPOINT} does not answer as the hub does: check HF_ENDPOINT and proxy") from None


def choose(files: dict[str, File], headers: dict[str, str]) -> list[File]:
    """Return the files that a model needs, weights last, once the hub has agreed to give them."""
    from huggingface_hub import get_hf_file_metadata

    there = ", ".join(sorted(files)[:8]) or "nothing"
    if "config.json" not in files:
        raise UserError(f"{repo_id} has no config.json at its root ({there}): it is not a transformers model")
    # a gated repository lists its files to everyone and refuses only here
    get_hf_file_metadata(files["config.json"].url, headers=headers)
    weights = choose_weights(files, headers)
    if not weights:
        raise UserError(f"{repo_id} has no weights as *.safetensors or pytorch_model*.bin at its root ({there})")
    others = sorted({name for pattern in NEEDED for name in matching(files, pattern)})
    print(f"Not needed and left out: {len(files) - len(others) - len(weights)} files at its root, and all its folders")
    return [files[name] for name in [*others, *weights]]


def choose_weights(files: dict[str, File], headers: dict[str, str]) -> list[str]:
    """Return one set of weights: the usual single file, else the shards with their index, else all of the kind."""
    aside = {name for pattern in NOT_WEIGHTS for name in matching(files, pattern)}
    for single, pattern in WEIGHTS.items():
        candidates = sorted(set(matching(files, pattern)) - aside)
        index = f"{single}.index.json"
        if single in candidates:  # before shards that lie beside it, as transformers loads them
            return [single]
        if index not in files and candidates:
            return candidates
        if index in files:
            shards = sorted(set(json.loads(read(files[index], headers))["weight_map"].values()))
            if missing := [name for name in shards if name not in files]:
                raise UserError(f"{index} names {missing[0]}, which the repository lacks: try another --revision")
            return [index, *shards]
    return []


def read(file: File, headers: dict[str, str]) -> bytes:
    """Return the contents of a small file, from the folder if it is there already."""
    from huggingface_hub import constants
    from huggingface_hub.utils import hf_raise_for_status, http_backoff

    if intact(file.path, file):
        return file.path.read_bytes()
    response = http_backoff("GET", file.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    return response.content


def plan(wanted: list[File], folder: Path) -> list[File]:
    """Return the files that are still to come, after saying so and making sure that the disk can hold them."""
    here = [file for file in wanted if file.path.exists()]
    if here:
        print(f"Checking what is there: {count(here)} ...", flush=True)
    complete = [file for file in here if intact(file.path, file)]
    todo = [file for file in wanted if file not in complete]
    for file in here:
        if file not in complete:
            print(f"{file.path.name} differs from the hub's and will be replaced")
    parts = sum(size_of(file.part) for file in todo)
    earlier = f" ({readable(parts)} of it came in an earlier run)" if parts else ""
    done = f"Complete: {count(complete)}. " if here else ""
    print(f"{done}To download: {count(todo)}{earlier}", flush=True)
    missing, free = sum(file.size for file in todo) - parts, shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"{folder}: {readable(missing)} are to come and the disk has {readable(free)} free: make room, or choose "
            "another disk with --checkpoint_dir"
        )
    return todo


def obtain(file: File, headers: dict[str, str]) -> None:
    """Bring one file under its final name, by way of a part that outlives an interruption."""
    from huggingface_hub.utils import tqdm

    name, part = file.path.name, file.part
    for stale in part.parent.iterdir():
        if stale != part and re.fullmatch(re.escape(name) + r"\.[0-9a-f]{12}\.part", stale.name):
            stale.unlink()
    part.touch()
    # disable=None: no bar where nobody watches, but a line for each file
    with tqdm(desc=name, total=file.size, initial=size_of(part), unit="B", unit_scale=True, disable=None) as bar:
        unwatched = bar.disable
        receive(file, headers, bar)
    if not intact(part, file):
        got = size_of(part)
        part.unlink()
        wrong = f"{got} bytes came instead of {file.size}" if got != file.size else "its hash is not the hub's"
        raise UserError(f"{name}: {wrong}, and it was thrown away: run again; if it stays so, check HF_ENDPOINT, proxy")
    part.replace(file.path)
    if unwatched:
        print(f"{name}: {readable(file.size)}", flush=True)


def receive(file: File, headers: dict[str, str], bar: Any) -> None:
    """Append to the part what it lacks; a cut connection is taken up again where it stopped."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import hf_raise_for_status

    timeout, waits = constants.HF_HUB_DOWNLOAD_TIMEOUT, iter(WAITS)
    while (have := size_of(file.part)) < file.size:
        ranged = headers | ({"range": f"bytes={have}-"} if have else {})
        try:
            with get_session().stream("GET", file.url, headers=ranged, timeout=timeout) as response:
                hf_raise_for_status(response)
                with file.part.open("ab") as out:
                    if have and response.status_code != 206:  # the range was ignored: this is the whole file
                        out.truncate(0)
                        bar.update(-have)
                    for chunk in response.iter_bytes():
                        bar.update(out.write(chunk))
            return
        except HTTPError as error:
            if size_of(file.part) > have:
                waits = iter(WAITS)
            wait = next(waits, None)
            if wait is None or status_of(error) not in TEMPORARY:
                raise
            time.sleep(wait)


def intact(path: Path, file: File) -> bool:
    """Tell whether `path` has the size and hash that the hub lists: sha256 for LFS files, git's own for the others."""
    if not path.is_file() or size_of(path) != file.size:
        return False
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: digest).hexdigest() == (file.sha256 or file.git_hash)


def explain(error: Exception, repo_id: str, revision: str | None) -> str:
    """Return in one line what went wrong with the hub and what to do about it."""
    from huggingface_hub import constants, errors

    endpoint, status = constants.ENDPOINT, status_of(error)
    page, token = f"{endpoint}/{repo_id}", "with --access_token or HF_TOKEN"
    match error:
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it to download"
        case errors.GatedRepoError() if status == 401:
            return f"{repo_id} is gated: accept its licence at {page}, then give a token of that account {token}"
        case errors.GatedRepoError():
            return f"{repo_id} is gated, and the token's account has no access yet: accept its licence at {page}"
        case errors.RepositoryNotFoundError():
            return f"{repo_id} is not at {endpoint}: check the spelling; if it is private, give a token {token}"
        case errors.RevisionNotFoundError():
            return f"{repo_id} has no revision '{revision}': {page}/tree/main lists its branches and tags"
        case errors.HfHubHTTPError() if status == 401:
            return f"the access token is not valid: make one at {endpoint}/settings/tokens and give it {token}"
        case errors.HfHubHTTPError() if status == 403:
            return f"{endpoint} refuses access to {repo_id}: {error.server_message or 'see what the token may read'}"
        case errors.HfHubHTTPError():
            return f"{endpoint} answered {status} for {repo_id}: run the same command again later, it goes on from here"
    return f"cannot reach {endpoint} ({error}): check network, proxy and HF_ENDPOINT, then run the same command again"


def status_of(error: Exception) -> int | None:
    """Return the status of the answer that an error is about, if there was an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def readable(size: int) -> str:
    unit, name = (1e9, "GB") if size >= 1e7 else (1e6, "MB") if size >= 1e4 else (1e3, "kB")
    return f"{size / unit:.2f} {name}"


def count(files: list[File]) -> str:
    return f"{len(files)} file{'s' * (len(files) != 1)}, {readable(sum(file.size for file in files))}"


if __name__ == "__main__":
    run(main)
