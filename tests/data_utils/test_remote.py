"""Files behind a URL, from a real server on 127.0.0.1 that misbehaves on request: the path's first part says how."""

import gc
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from scipy import sparse
from torch.utils.data import DataLoader

from perturbgene.data_utils import remote
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.opening import H5adFile, expand_paths
from perturbgene.data_utils.remote import DiskCache, Version, copy_file, default_cache_dir, open_remote
from perturbgene.data_utils.shards import write_h5ad_copy
from perturbgene.errors import InputError
from perturbgene.urls import shown_url
from tests.web_server import Handler, Web, serving

CONTENT = np.random.default_rng(0).bytes(3_000_000)
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
        start = int(self.headers["Range"].split("=")[1].split("-")[0])
        self.ranged(most=max(0, HALF - start))

    def serve_busy(self, number: int) -> None:
        self.answer(503, Retry_After="7")

    def serve_gone(self, number: int) -> None:
        self.answer(404)

    def serve_rangeless(self, number: int) -> None:
        self.answer(200, self.content, ETag='"one"')

    def serve_rangeless_untagged(self, number: int) -> None:
        self.answer(200, self.content[: 1000 if number == 2 else None], stated=len(self.content))

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
    """Wait hardly at all between tries, and keep out of the user's cache."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def kept(folder: Path) -> list[str]:
    """Name the files of a cache folder, locks apart."""
    return sorted(path.name for path in folder.glob("*") if path.suffix != ".lock")


# -- ranges --------------------------------------------------------------------------------------------------------


def test_any_range_of_a_remote_file_is_read_as_from_disk(web: Web) -> None:
    file = open_remote(f"{web.url}/good/a.h5ad")
    for start, length in [(0, 8), (HALF, 1), (len(CONTENT) - 5, 5), (1_000_000, 700_000), (262_143, 2)]:
        file.seek(start)
        assert file.read(length) == CONTENT[start : start + length]
    file.seek(0)
    assert file.read() == CONTENT


def test_small_reads_that_lie_together_ask_the_server_once(web: Web) -> None:
    file = open_remote(f"{web.url}/good/a.h5ad")
    for start in range(HALF, HALF + 10_000, 100):
        file.seek(start)
        file.read(100)
    assert web.seen["good"] == 2


def test_reads_in_sequence_fetch_further_and_further_ahead(web: Web) -> None:
    file = open_remote(f"{web.url}/good/a.h5ad")
    for start in range(300_000, len(CONTENT), 1000):
        file.seek(start)
        file.read(1000)
    assert web.seen["good"] <= 6


def test_two_sequences_in_turn_are_both_read_ahead(web: Web) -> None:
    file = open_remote(f"{web.url}/good/a.h5ad")
    for offset in range(0, HALF - 300_000, 1000):
        for start in (300_000 + offset, HALF + 200_000 + offset):
            file.seek(start)
            assert file.read(1000) == CONTENT[start : start + 1000]
    assert web.seen["good"] <= 10


def test_blocks_in_memory_are_bounded(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)
    file = open_remote(f"{web.url}/good/a.h5ad")
    assert file.read() == CONTENT
    assert len(file._blocks) <= remote.MOST_BLOCKS


def test_beyond_the_end_the_buffer_is_zero_and_the_count_is_honest(web: Web) -> None:
    file = open_remote(f"{web.url}/good/a.h5ad")
    file.seek(-2, os.SEEK_END)
    buffer = bytearray(b"xxxx")
    assert (file.readinto(buffer), bytes(buffer)) == (2, CONTENT[-2:] + b"\0\0")


# -- a bad network -------------------------------------------------------------------------------------------------


def test_a_server_that_fails_two_times_of_three_gives_the_whole_file(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MOST_REQUEST_BYTES", 1 << 18)
    assert open_remote(f"{web.url}/flaky/a.h5ad").read() == CONTENT
    assert web.seen["flaky"] > 12


def test_bytes_that_stay_away_are_named_with_their_file(web: Web) -> None:
    file = open_remote(f"{web.url}/truncates/a.h5ad?token=s3cret", retries=2)
    file.seek(HALF)
    with pytest.raises(InputError, match=r"/truncates/a\.h5ad\?\*\*\*: bytes \d+-\d+ could not be read in 3 tries"):
        file.read(10)
    assert web.seen["truncates"] == 4


def test_waits_grow_and_honour_the_server(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 4.0)
    waits: list[float] = []
    with pytest.raises(InputError, match="status 503"):
        open_remote(f"{web.url}/busy/a.h5ad", retries=5, sleep=waits.append)
    assert waits[0] == 7 and 16 <= waits[3] <= 32 and 32 <= waits[4] <= 60


def test_nobody_at_home_is_told_with_the_address() -> None:
    with pytest.raises(InputError, match=r"http://\*\*\*@127.0.0.1:9/a.h5ad: bytes 0-\d+ could not be read in 2 tries"):
        open_remote("http://ann:s3cret@127.0.0.1:9/a.h5ad", retries=1)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        pytest.param("gone/a.h5ad", "answers with status 404", id="no such file"),
        pytest.param("private/a.h5ad", "answers with status 401 .*user:password@host", id="no password"),
        pytest.param("moved_to_disk/a.h5ad", r"redirects to file://\.\.\., which is refused", id="redirect to a file"),
        pytest.param("circle/a.h5ad", "redirects in a circle", id="endless redirects"),
        pytest.param("zipped/a.h5ad", "Content-Encoding gzip", id="compressed on the way"),
        pytest.param("good/empty.h5ad", "is empty", id="empty file"),
        pytest.param("rangeless/empty.h5ad", "is empty", id="empty file without ranges"),
    ],
)
def test_what_another_try_cannot_mend_is_refused_at_once(web: Web, place: str, message: str) -> None:
    web.files["empty.h5ad"] = b""
    with pytest.raises(InputError, match=message):
        open_remote(f"{web.url}/{place}", sleep=lambda seconds: pytest.fail("waited"))


def test_redirects_within_the_web_and_passwords_work(web: Web) -> None:
    assert open_remote(f"{web.url}/moved/a.h5ad").read(9) == CONTENT[:9]
    url = f"{web.url}/private/a.h5ad".replace("//", "//ann:s3cret@")
    assert open_remote(url).read(9) == CONTENT[:9]


@pytest.mark.parametrize("manner", ["changes", "grows"], ids=["another ETag", "another size"])
def test_a_file_that_changes_during_the_run_is_refused(web: Web, manner: str) -> None:
    file = open_remote(f"{web.url}/{manner}/a.h5ad")
    file.seek(HALF)
    with pytest.raises(InputError, match="changed during the run"):
        file.read(10)


def test_a_file_that_changed_between_two_openings_is_refused(web: Web, cache: Path) -> None:
    open_remote(f"{web.url}/changes/a.h5ad", cache).close()
    with pytest.raises(InputError, match="changed during the run"):
        open_remote(f"{web.url}/changes/a.h5ad", cache)


def test_the_garbage_collector_rests_while_bytes_are_fetched(web: Web) -> None:
    """Otherwise it may wait in fsspec's thread for the lock that h5py holds in ours."""
    states = []
    file = open_remote(f"{web.url}/good/a.h5ad")
    inner = file._store._read  # type: ignore[attr-defined]

    async def spied(*given: int) -> Any:
        states.append(gc.isenabled())
        return await inner(*given)

    file._store._read = spied  # type: ignore[attr-defined]
    file.seek(HALF)
    file.read(1)
    assert states == [False] and gc.isenabled()


# -- the cache -----------------------------------------------------------------------------------------------------


def test_a_file_of_which_a_quarter_was_read_is_kept_whole_and_found_again(web: Web, cache: Path) -> None:
    file = open_remote(f"{web.url}/good/a.h5ad", cache)
    assert file.read(1000) == CONTENT[:1000] and kept(cache) == []
    for start in range(0, len(CONTENT), 100_000):
        file.seek(start)
        assert file.read(100_000) == CONTENT[start : start + 100_000]
    (name,) = kept(cache)
    assert name.endswith("-a.h5ad") and (cache / name).read_bytes() == CONTENT
    asked = web.seen["good"]
    again = open_remote(f"{web.url}/good/a.h5ad", cache)
    assert again.local_path == cache / name and again.read() == CONTENT
    assert web.seen["good"] == asked + 1


def test_a_new_version_is_not_taken_for_the_cached_one(web: Web, cache: Path) -> None:
    disk = DiskCache(cache)
    names = {disk.path_of("https://h/a", Version(size, tag)) for size, tag in [(1, "x"), (2, "x"), (1, "y")]}
    assert len(names) == 3 and disk.path_of("https://h/a?id=1", Version(1, "x")) not in names


def test_a_file_without_etag_or_date_is_not_kept(web: Web, cache: Path) -> None:
    file = open_remote(f"{web.url}/untagged/a.h5ad", cache)
    file.fetch_whole()
    assert file.read() == CONTENT and kept(cache) == []


def test_a_download_that_breaks_leaves_nothing_behind(web: Web, cache: Path) -> None:
    file = open_remote(f"{web.url}/truncates/a.h5ad", cache, retries=1)
    with pytest.raises(InputError, match="could not be read in 2 tries"):
        file.fetch_whole()
    assert kept(cache) == []


def test_several_processes_fetch_a_file_once(web: Web, cache: Path) -> None:
    def fetch() -> None:
        open_remote(f"{web.url}/good/a.h5ad", cache).fetch_whole()

    workers = [get_context("fork").Process(target=fetch) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert web.seen["good"] == 4 and len(kept(cache)) == 1  # three openings, one download


def test_a_full_cache_drops_what_was_long_unused_and_nothing_else(cache: Path) -> None:
    cache.mkdir()
    disk = DiskCache(cache, most_bytes=1000)
    for name, age in [("old", 9e5), ("new", 10.0)]:
        (cache / name).write_bytes(bytes(400))
        os.utime(cache / name, (time.time() - age,) * 2)
    assert disk.add(cache / "third", 500, lambda output: output.write(bytes(500))) == cache / "third"
    assert disk.add(cache / "fourth", 500, lambda output: output.write(bytes(500))) is None
    assert kept(cache) == ["new", "third"]


def test_a_cache_folder_that_cannot_be_written_is_gone_without(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = open_remote(f"{web.url}/good/a.h5ad", tmp_path / "file" / "cache")
    file.fetch_whole()
    assert file.local_path is None and file.read() == CONTENT


@pytest.mark.parametrize("manner", ["rangeless", "rangeless_untagged"])
def test_a_server_without_ranges_is_asked_for_the_whole_file(web: Web, cache: Path, manner: str) -> None:
    file = open_remote(f"{web.url}/{manner}/a.h5ad", cache)
    file.seek(HALF)
    assert file.read() == CONTENT[HALF:]
    assert len(kept(cache)) == (1 if manner == "rangeless" else 0)


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
        open_remote("gs://cells/a.h5ad")


def test_an_object_of_a_bucket_is_read_cached_and_watched(
    bucket: Bucket, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RECHECK_SECONDS", 0.0)
    file = open_remote("s3://cells/set/b_1.h5ad", cache)
    assert file.read() == CONTENT and len(kept(cache)) == 1
    with pytest.raises(InputError, match="s3://cells/set/c.h5ad does not exist"):
        open_remote("s3://cells/set/c.h5ad")
    bucket.pipe_file("s3://cells/set/b_1.h5ad", CONTENT[1:])
    with pytest.raises(InputError, match="changed during the run"):
        open_remote("s3://cells/set/b_1.h5ad", cache)


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


def test_a_file_that_came_into_the_cache_is_read_without_the_server(web: Web, shards: list[str]) -> None:
    file, local = H5adFile(f"{web.url}/dies/shard_0.h5ad"), H5adFile(shards[0])
    assert file.shape == local.shape
    assert file._remote is not None
    file._remote.fetch_whole()
    assert same_rows(file, local, 0, 10)
    asked, web.is_down = web.seen["dies"], True
    assert same_rows(file, local, 0, 2000) and web.seen["dies"] == asked
    assert file._remote is not None and file.file.filename == str(file._remote.local_path)


def test_a_network_that_dies_between_two_reads_is_named_and_not_the_file_blamed(
    web: Web, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 512)
    monkeypatch.setattr(remote, "CACHE_SHARE", 9)
    file = H5adFile(f"{web.url}/dies/shard_0.h5ad?token=s3cret")
    assert file.shape == (2000, 4)
    web.is_down = True
    for read in (lambda: file.read_rows(1000, 1001), lambda: file.obs_column("cell_type"), lambda: file.var_names):
        with pytest.raises(InputError, match=r"dies/shard_0\.h5ad\?\*\*\*: bytes \d+-\d+ could not be read in 6 tries"):
            read()
    web.is_down = False
    assert same_rows(file, H5adFile(shards[0]), 1000, 1001)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"<!DOCTYPE html><html>Log in", "a web page", id="login page"),
        pytest.param(b"\x1f\x8b" + bytes(500), "gzip-compressed", id="gzip"),
        pytest.param(None, "truncated or damaged", id="half a file"),
    ],
)
def test_what_is_no_h5ad_file_is_named_for_what_it_is(
    web: Web, shards: list[str], content: bytes | None, message: str
) -> None:
    web.files["bad.h5ad"] = content or web.files["shard_0.h5ad"][:40_000]
    with pytest.raises(InputError, match=f"bad.h5ad cannot be read .*{message}"):
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


def test_a_program_that_leaves_a_remote_file_open_ends_well(web: Web, shards: list[str]) -> None:
    code = (
        f"from perturbgene.data_utils.opening import H5adFile as F; f = F({web.url + '/good/shard_0.h5ad'!r}); f.file"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("manner", ["good", "flaky"])
def test_a_data_set_over_urls_gives_the_cells_of_the_files(
    web: Web, shards: list[str], four_gene_tokenizer: Any, manner: str, num_workers: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)

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
    write_h5ad_copy(url, target, obs=pd.DataFrame({"predicted_sex": ["male"] * 2000}), uns={"run": "here"})
    answered = H5adFile(str(target))
    assert answered.columns_of("obs") == ["cell_type", "predicted_sex"]
    assert same_rows(answered, H5adFile(shards[1]), 0, 2000)


def test_a_remote_file_is_copied_as_it_is(web: Web, shards: list[str], tmp_path: Path) -> None:
    copy_file(f"{web.url}/flaky/shard_1.h5ad", tmp_path / "copy.h5ad")
    assert (tmp_path / "copy.h5ad").read_bytes() == web.files["shard_1.h5ad"]
