"""Files behind a URL, from a real server on 127.0.0.1 that misbehaves on request: the path's first part says how."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from scipy import sparse
from torch.utils.data import DataLoader

from perturbgene.data_utils import remote
from perturbgene.data_utils.foreign import HDF5_SIGNATURE
from perturbgene.data_utils.h5ad_writing import write_copy
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.opening import expand_paths, open_source
from perturbgene.data_utils.remote import default_cache_dir, fetch, has_room
from perturbgene.data_utils.sources import H5adFile
from perturbgene.errors import InputError
from perturbgene.urls import shown_url
from tests.web_server import Handler, Web, serving

CONTENT = HDF5_SIGNATURE + np.random.default_rng(0).bytes(3_000_000)
HALF = len(CONTENT) // 2


class BadHandler(Handler):
    """Serve well or badly, over connections that stay open."""

    protocol_version = "HTTP/1.1"

    tries: Counter[tuple[Any, ...]] = Counter()

    def serve_flaky(self, number: int) -> None:
        """Drop the connection, answer 503, or send half a body: two requests of three for the same bytes.

        Counted over all requests, one of two clients could meet nothing but the bad ones.
        """
        wanted = (self.server.server_address, self.path, self.headers.get("Range"))
        self.tries[wanted] += 1
        number = self.tries[wanted]
        if number % 6 == 1:
            self.close_connection = True
        elif number % 6 == 2:
            self.answer(503, Retry_After="0")
        elif number % 6 == 4:
            self.ranged(most=1000)
        elif number % 6 == 5:
            self.answer(429)
        else:
            self.ranged()

    def serve_truncates(self, number: int) -> None:
        """End every body at the middle of the file, as a proxy with a broken copy does."""
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        self.ranged(most=max(0, HALF - start))

    def serve_drips(self, number: int) -> None:
        self.ranged(most=500_000)

    def serve_busy(self, number: int) -> None:
        self.answer(503, Retry_After="7")

    def serve_gone(self, number: int) -> None:
        self.answer(404)

    def serve_rangeless(self, number: int) -> None:
        self.answer(200, self.content, ETag='"one"')

    def serve_rangeless_untagged(self, number: int) -> None:
        self.answer(200, self.content[: 1000 if number == 1 else None], stated=len(self.content))

    def serve_untagged(self, number: int) -> None:
        self.ranged(etag=None)

    def serve_changes(self, number: int) -> None:
        self.ranged(etag='"old"' if number == 1 else '"new"')

    def serve_grows(self, number: int) -> None:
        self.ranged(etag=None, content=self.content if number == 1 else self.content + b"more")

    def serve_circle(self, number: int) -> None:
        self.answer(302, Location=self.path)

    def serve_zipped(self, number: int) -> None:
        self.answer(200, b"\x1f\x8b", Content_Encoding="gzip")

    def serve_dies(self, number: int) -> None:
        """Serve well until the test says that the network is gone."""
        self.answer(503) if self.web.is_down else self.ranged()


@pytest.fixture
def web() -> Iterator[Web]:
    with serving(BadHandler, content=CONTENT) as running:
        yield running


@pytest.fixture(autouse=True)
def quick_and_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wait hardly at all between tries, keep out of the user's cache, and begin with a process that fetched nothing."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(remote, "_fetched", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def forget() -> None:
    """Let the next `fetch` begin as in a new run."""
    remote._fetched.clear()


def kept(folder: Path) -> list[str]:
    """Name the files of a cache folder, locks apart."""
    return sorted(path.name for path in folder.glob("*") if path.suffix != ".lock")


# -- a bad network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "manner", ["good", "flaky", "drips", "rangeless", "rangeless_untagged", "untagged", "moved", "changes"]
)
def test_the_whole_file_arrives_from_any_server(web: Web, cache: Path, manner: str) -> None:
    assert fetch(f"{web.url}/{manner}/a.h5ad", cache).read_bytes() == CONTENT


def test_a_dropped_connection_is_resumed_from_the_byte_where_it_broke(web: Web, cache: Path) -> None:
    assert fetch(f"{web.url}/drips/a.h5ad", cache, retries=1).read_bytes() == CONTENT
    assert [headers.get("Range") for headers in web.headers[:3]] == [None, "bytes=500000-", "bytes=1000000-"]
    assert web.headers[1]["If-Range"] == '"one"'


def test_a_file_that_stays_away_is_named_and_what_arrived_is_kept(web: Web, cache: Path) -> None:
    message = (
        rf"/truncates/a\.h5ad\?\*\*\* could not be fetched in 3 tries in a row: the connection ended at {HALF:,} of"
    )
    with pytest.raises(InputError, match=message + rf" .* {HALF:,} bytes are kept"):
        fetch(f"{web.url}/truncates/a.h5ad?token=s3cret", cache, retries=2)
    assert web.seen["truncates"] == 3
    (part,) = kept(cache)
    assert part.endswith("-a.h5ad.part")


def test_a_fetch_that_was_cut_short_is_resumed_by_the_next_run(web: Web, cache: Path) -> None:
    with pytest.raises(InputError, match="could not be fetched"):
        fetch(f"{web.url}/drips/a.h5ad", cache, retries=0)
    assert fetch(f"{web.url}/drips/a.h5ad", cache).read_bytes() == CONTENT
    assert web.headers[2]["Range"] == "bytes=500000-"
    assert len(kept(cache)) == 1


def test_waits_grow_and_honour_the_server(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 4.0)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(InputError, match="status 503"):
        fetch(f"{web.url}/busy/a.h5ad", retries=5)
    assert waits[0] == 7 and 16 <= waits[3] <= 32 and 32 <= waits[4] <= 60


def test_nobody_at_home_is_named_with_the_address() -> None:
    with pytest.raises(
        InputError, match=r"http://\*\*\*@127.0.0.1:9/a.h5ad could not be fetched in 2 tries in a row: no"
    ):
        fetch("http://ann:s3cret@127.0.0.1:9/a.h5ad", retries=1)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        pytest.param("gone/a.h5ad", "answers with status 404", id="no such file"),
        pytest.param("private/a.h5ad", "answers with status 401 .*user:password@host", id="no password"),
        pytest.param("moved_to_disk/a.h5ad", r"redirects to file://\.\.\., which is refused", id="redirect to a file"),
        pytest.param("circle/a.h5ad", "redirects in a circle", id="endless redirects"),
        pytest.param("zipped/a.h5ad", "Content-Encoding gzip", id="compressed on the way"),
        pytest.param("good/page.h5ad", "page.h5ad is a web page .*login form", id="login page"),
        pytest.param("good/unpacked.h5ad", "unpacked.h5ad is compressed with gzip", id="gzip"),
        pytest.param("good/empty.h5ad", "is empty", id="empty file"),
        pytest.param("rangeless/empty.h5ad", "is empty", id="empty file without ranges"),
    ],
)
def test_what_another_try_cannot_mend_is_refused_at_once(
    web: Web, place: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited"))
    web.files |= {"empty.h5ad": b"", "page.h5ad": b"<!DOCTYPE html><html>Log in", "unpacked.h5ad": b"\x1f\x8b..."}
    with pytest.raises(InputError, match=message):
        fetch(f"{web.url}/{place}")


def test_passwords_in_a_url_open_the_door(web: Web) -> None:
    url = f"{web.url}/private/a.h5ad".replace("//", "//ann:s3cret@")
    assert fetch(url).read_bytes() == CONTENT


@pytest.mark.parametrize("manner", ["changes", "grows"], ids=["another ETag", "another size"])
def test_a_file_that_changes_during_the_run_stops_it(web: Web, manner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(f"{web.url}/{manner}/a.h5ad")
    monkeypatch.setattr(remote, "RECHECK_SECONDS", 0.0)
    with pytest.raises(InputError, match="changed during the run"):
        fetch(f"{web.url}/{manner}/a.h5ad")


def test_a_network_that_goes_away_does_not_stop_a_run_that_has_the_file(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(f"{web.url}/dies/a.h5ad")
    monkeypatch.setattr(remote, "RECHECK_SECONDS", 0.0)
    web.is_down = True
    assert fetch(f"{web.url}/dies/a.h5ad") == path and web.seen["dies"] == 2


# -- the cache -----------------------------------------------------------------------------------------------------


def test_a_fetched_file_is_kept_and_found_by_the_next_run(web: Web, cache: Path) -> None:
    path = fetch(f"{web.url}/drips/a.h5ad", cache)
    assert path.parent == cache and kept(cache) == [path.name] and path.name.endswith("-a.h5ad")
    asked = web.seen["drips"]
    assert fetch(f"{web.url}/drips/a.h5ad", cache) == path and web.seen["drips"] == asked
    forget()
    assert fetch(f"{web.url}/drips/a.h5ad", cache) == path and web.seen["drips"] == asked + 1


def test_a_new_version_is_not_taken_for_the_cached_one(web: Web, cache: Path) -> None:
    first = fetch(f"{web.url}/changes/a.h5ad", cache)
    forget()
    second = fetch(f"{web.url}/changes/a.h5ad", cache)
    third = fetch(f"{web.url}/changes/a.h5ad?id=1", cache)
    assert len({first, second, third}) == 3 == len(kept(cache))


def test_a_file_without_etag_or_date_is_kept_for_this_run_only(web: Web, cache: Path) -> None:
    path = fetch(f"{web.url}/untagged/a.h5ad", cache)
    assert kept(cache) == [] and fetch(f"{web.url}/untagged/a.h5ad", cache) == path
    code = (
        "import sys; from perturbgene.data_utils.remote import fetch; "
        f"print(fetch({web.url + '/untagged/a.h5ad'!r}, {str(cache)!r}))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip().endswith("a.h5ad") and not Path(printed.strip()).exists()


def test_several_processes_fetch_a_file_once(web: Web, cache: Path) -> None:
    def run() -> None:
        fetch(f"{web.url}/good/a.h5ad", cache)

    workers = [get_context("fork").Process(target=run) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert web.seen["good"] == 3 and len(kept(cache)) == 1  # one download, two looks at the version


def test_a_full_cache_drops_what_was_long_unused_and_nothing_else(cache: Path) -> None:
    cache.mkdir()
    for name, age in [("old", 9e5), ("new", 10.0)]:
        (cache / name).write_bytes(bytes(400))
        os.utime(cache / name, (time.time() - age,) * 2)
    assert has_room(cache, 500, most_bytes=1000) and kept(cache) == ["new"]
    assert not has_room(cache, 700, most_bytes=1000) and kept(cache) == ["new"]


def test_a_file_for_which_the_cache_has_no_room_is_fetched_for_this_run(
    web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LEAST_FREE_BYTES", 10**30)
    path = fetch(f"{web.url}/good/a.h5ad", cache)
    assert path.read_bytes() == CONTENT and path.parent != cache and kept(cache) == []


def test_a_cache_folder_that_cannot_be_written_is_done_without(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert fetch(f"{web.url}/good/a.h5ad", tmp_path / "file" / "cache").read_bytes() == CONTENT


def test_a_full_disk_is_noticed_before_the_first_byte(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=rf"needs {len(CONTENT):,} more bytes, but only 1,000 are free"):
        fetch(f"{web.url}/good/a.h5ad", cache)


def test_the_default_cache_follows_the_xdg_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_cache_dir() == tmp_path / "xdg" / "perturbgene"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "perturbgene"


# -- paths ---------------------------------------------------------------------------------------------------------


class Bucket(MemoryFileSystem):
    """An object store in memory under the scheme s3."""

    protocol = ("s3",)
    store: dict[str, Any] = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    store = Bucket()
    for name in ("a_2", "a_10", "b_1"):
        store.pipe_file(f"s3://cells/set/{name}.h5ad", CONTENT)
    yield store
    Bucket.store.clear()


def test_braces_work_in_urls_and_mix_with_files(web: Web, write_h5ad: Callable[..., str]) -> None:
    local = write_h5ad([[1, 0, 0, 0]])
    urls = [f"{web.url}/good/s_{number}.h5ad" for number in (9, 10)]
    assert expand_paths([local, f"{web.url}/good/s_{{9..10}}.h5ad"]) == [local, *urls]
    assert not web.seen


def test_globs_and_folders_of_a_bucket_are_listed_in_counting_order(bucket: Bucket) -> None:
    assert expand_paths("s3://cells/set/a_*.h5ad") == ["s3://cells/set/a_2.h5ad", "s3://cells/set/a_10.h5ad"]
    assert expand_paths("s3://cells/set/a_?.h5ad") == ["s3://cells/set/a_2.h5ad"]
    assert shown_url("s3://cells/set/a_?.h5ad") == "s3://cells/set/a_?.h5ad"  # as it must stand in run.yaml
    assert shown_url("s3://cells/set/a.h5ad?token=pw") == "s3://cells/set/a.h5ad?***"
    assert len(expand_paths("s3://cells/set/")) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param("https://ann:pw@host/s_*.h5ad", r"https://\*\*\*@host/.* cannot be listed", id="glob over http"),
        pytest.param("https://host/folder/", "web servers have no folders", id="folder over http"),
        pytest.param("ftp://host/a.h5ad", "ftp:// is none of https://", id="unknown scheme"),
        pytest.param("file:///etc/passwd", "file:// is none of .* plain path", id="file URL"),
        pytest.param("https:///a.h5ad", "names no host", id="no host"),
        pytest.param("https://host:x/a.h5ad", "A URL is malformed", id="bad port"),
        pytest.param(["https://h/a.h5ad?t=pw", "https://u:pw@H/a.h5ad?t=pw"], "is the same file as", id="twice"),
        pytest.param("s3://cells/none_*.h5ad", "matches no file", id="nothing in the bucket"),
    ],
)
def test_urls_that_cannot_be_are_refused_without_their_secrets(bucket: Bucket, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        expand_paths(given)
    assert "pw" not in str(caught.value)


def test_a_store_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match="pip install gcsfs"):
        fetch("gs://cells/a.h5ad")


def test_an_object_of_a_bucket_is_fetched_cached_and_watched(
    bucket: Bucket, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RECHECK_SECONDS", 0.0)
    monkeypatch.setattr(remote, "BUCKET_CHUNK_BYTES", 1_000_000)
    assert fetch("s3://cells/set/b_1.h5ad", cache).read_bytes() == CONTENT and len(kept(cache)) == 1
    with pytest.raises(InputError, match="s3://cells/set/c.h5ad does not exist"):
        fetch("s3://cells/set/c.h5ad")
    bucket.pipe_file("s3://cells/set/b_1.h5ad", CONTENT[:-1])
    with pytest.raises(InputError, match="changed during the run"):
        fetch("s3://cells/set/b_1.h5ad", cache)


def test_an_object_that_is_replaced_while_it_is_read_is_read_again(
    bucket: Bucket, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BUCKET_CHUNK_BYTES", 1_000_000)
    read, newer = Bucket.cat_file, HDF5_SIGNATURE + bytes(2_000_000)

    def replaced_after_the_first_read(self: Bucket, path: str, **span: Any) -> bytes:
        chunk = read(self, path, **span)
        if span["start"] == 0:
            self.pipe_file(path, newer)
        return chunk

    monkeypatch.setattr(Bucket, "cat_file", replaced_after_the_first_read)
    bucket.pipe_file("s3://cells/set/b_1.h5ad", CONTENT)
    with pytest.raises(InputError, match="replaced while it was read"):
        fetch("s3://cells/set/b_1.h5ad", cache, retries=0)
    monkeypatch.setattr(Bucket, "cat_file", read)
    assert fetch("s3://cells/set/b_1.h5ad", cache).read_bytes() == newer


# -- h5ad ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(web: Web, write_h5ad: Callable[..., str]) -> list[str]:
    """Three files of 2,000 cells and four genes that the server has too, as shard_0 to shard_2."""
    paths = []
    for number in range(3):
        values = sparse.random(2000, 4, density=0.6, format="csr", dtype=np.float32, random_state=number)
        paths.append(write_h5ad(values, name=f"shard_{number}.h5ad", obs={"cell_type": ["B cell", "T cell"] * 1000}))
        web.files[f"shard_{number}.h5ad"] = Path(paths[-1]).read_bytes()
    return paths


def same_rows(file: H5adFile, other: H5adFile, start: int, stop: int) -> bool:
    pairs = zip(file.read_rows(start, stop), other.read_rows(start, stop), strict=True)
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("manner", ["good", "flaky", "rangeless", "untagged"])
def test_an_h5ad_file_reads_alike_over_any_server(web: Web, shards: list[str], manner: str) -> None:
    file, local = H5adFile(f"{web.url}/{manner}/shard_0.h5ad"), H5adFile(shards[0])
    assert same_rows(file, local, 5, 1500)
    assert list(file.obs_column("cell_type")) == list(local.obs_column("cell_type"))
    file.close()
    assert same_rows(file, local, 1999, 2000)


def test_half_a_file_is_called_damaged(web: Web, shards: list[str]) -> None:
    web.files["bad.h5ad"] = web.files["shard_0.h5ad"][:40_000]
    with pytest.raises(InputError, match="bad.h5ad is an HDF5 file that is truncated or damaged"):
        _ = H5adFile(f"{web.url}/good/bad.h5ad").shape


def test_messages_about_a_remote_file_hide_its_secrets(web: Web, shards: list[str]) -> None:
    url = f"{web.url}/private/shard_0.h5ad?token=abc".replace("//", "//ann:s3cret@")
    file = pickle.loads(pickle.dumps(H5adFile(url)))
    with pytest.raises(InputError, match="has no obs column 'sex'") as caught:
        file.obs_column("sex")
    assert "s3cret" not in f"{caught.value} {file!r}" and "abc" not in f"{caught.value} {file!r}"


def test_a_remote_file_opened_before_a_fork_is_opened_again_in_the_child(web: Web, shards: list[str]) -> None:
    file, local = H5adFile(f"{web.url}/good/shard_0.h5ad"), H5adFile(shards[0])
    assert same_rows(file, local, 0, 10)
    child = get_context("fork").Process(target=lambda: sys.exit(0 if same_rows(file, local, 10, 1500) else 1))
    child.start()
    child.join(20)
    assert child.exitcode == 0 and same_rows(file, local, 100, 200)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("manner", ["good", "flaky"])
def test_a_data_set_over_urls_gives_the_cells_of_the_files(
    web: Web, shards: list[str], four_gene_tokenizer: Any, manner: str, num_workers: int
) -> None:
    def cells(paths: Any, num_workers: int) -> list[list[int]]:
        data = IterableAnnDataset(paths, four_gene_tokenizer, shuffle=True, seed=1, batch_size=100)
        loader = DataLoader(data, batch_size=100, num_workers=num_workers, collate_fn=token_lists)
        return [cell for batch in loader for cell in batch]

    urls = f"{web.url}/{manner}/shard_{{0..2}}.h5ad"
    assert cells(urls, num_workers) == cells(shards, 0)


def token_lists(cells: list[Any]) -> list[list[int]]:
    """Collate to plain lists, which travel faster than many small tensors."""
    return [cell["input_ids"].tolist() for cell in cells]


def test_answers_are_written_into_a_copy_of_a_remote_file(web: Web, shards: list[str], tmp_path: Path) -> None:
    url, target = f"{web.url}/flaky/shard_1.h5ad?token=s3cret", tmp_path / "answers.h5ad"
    write_copy(url, target, obs=pd.DataFrame({"predicted_sex": ["male"] * 2000}), uns={"run": "here"})
    answered = H5adFile(str(target))
    assert answered.columns_of("obs") == ["cell_type", "predicted_sex"]
    assert same_rows(answered, H5adFile(shards[1]), 0, 2000)


# -- zarr ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def zarr_store(tmp_path: Path, shards: list[str]) -> Path:
    """The cells of shard_0 as a zarr store."""
    path = tmp_path / "served" / "shard_0.zarr"
    path.parent.mkdir()
    ad.read_h5ad(shards[0]).write_zarr(path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_zarr_store_of_a_web_server_gives_the_rows_of_the_file(zarr_store: Path, shards: list[str]) -> None:
    handler = partial(SilentFiles, directory=str(zarr_store.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/shard_0.zarr"
        file = open_source(*expand_paths(f"{url}/"))
        assert same_rows(file, H5adFile(shards[0]), 100, 1500)
        assert file.obs_column("cell_type").tolist()[:2] == ["B cell", "T cell"]
        with pytest.raises(InputError, match="none.zarr cannot be read as zarr"):
            _ = open_source(f"{url}/none.zarr").shape
        server.shutdown()


class SilentFiles(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore")
def test_a_zarr_store_of_a_bucket_gives_the_rows_of_the_file(
    bucket: Bucket, zarr_store: Path, shards: list[str]
) -> None:
    bucket.put(str(zarr_store), "s3://cells/set/shard_0.zarr", recursive=True)
    assert expand_paths("s3://cells/set/*.zarr") == ["s3://cells/set/shard_0.zarr"]
    assert "s3://cells/set/shard_0.zarr" in expand_paths("s3://cells/set/")
    assert same_rows(open_source("s3://cells/set/shard_0.zarr"), H5adFile(shards[0]), 100, 1500)
