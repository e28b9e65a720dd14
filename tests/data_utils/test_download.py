"""Downloads are tried against a real server on 127.0.0.1 that misbehaves on request: the path's first part says how."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from perturbgene.cli.verbs import DownloadConfig
from perturbgene.data_utils.download import download, read_checksums, run_download
from perturbgene.data_utils.foreign import HDF5_SIGNATURE
from perturbgene.errors import InputError
from perturbgene.files import claimed
from tests.web_server import Handler, Web, serving

CONTENT = HDF5_SIGNATURE + np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


class BadHandler(Handler):
    """Serve well or badly, a connection for each request."""

    def serve_drops(self, number: int) -> None:
        self.ranged(most=100_000 if number == 1 else None)

    def serve_weak(self, number: int) -> None:
        self.ranged(most=100_000 if number == 1 else None, etag=None)

    def serve_drips(self, number: int) -> None:
        self.ranged(most=30_000)

    def serve_changes(self, number: int) -> None:
        if number == 1:
            self.ranged(HDF5_SIGNATURE + bytes(300_000), most=100_000, etag='"old"')
        else:
            self.ranged(etag='"new"')

    def serve_changes_unsaid(self, number: int) -> None:
        """Change the file, and ignore If-Range as simple servers do; the new length gives it away."""
        if number == 1:
            self.ranged(HDF5_SIGNATURE + bytes(400_000), most=100_000, etag=None)
        else:
            self.ranged(etag=None)

    def serve_rangeless(self, number: int) -> None:
        self.answer(200, CONTENT[:100_000] if number == 1 else CONTENT, stated=len(CONTENT), ETag='"one"')

    def serve_truncates(self, number: int) -> None:
        self.answer(200, CONTENT[:100_000], stated=len(CONTENT))

    def serve_busy(self, number: int) -> None:
        if number <= 2:
            self.answer(503, Retry_After="7")
        else:
            self.ranged()

    def serve_html(self, number: int) -> None:
        self.answer(200, PAGE, Content_Type="text/html")

    def serve_garbage(self, number: int) -> None:
        self.answer(200, b"GIF89a not hdf5")

    def serve_empty(self, number: int) -> None:
        self.answer(200, b"")

    def serve_gone(self, number: int) -> None:
        self.answer(404, PAGE)

    def serve_figshare(self, number: int) -> None:
        """Redirect to a store that names the file in a header."""
        if "/stored/" not in self.path:
            self.answer(302, Location=f"/figshare/stored/{self.path.rpartition('/')[2]}")
            return
        self.answer(200, self.content, ETag='"one"', Content_Disposition='attachment; filename="pancreas.h5ad"')

    def serve_evil(self, number: int) -> None:
        self.answer(200, self.content, Content_Disposition='attachment; filename="../../.bashrc"')

    def serve_chunked(self, number: int) -> None:
        """State no length, as servers do that make the file on the way."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CONTENT)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serving(BadHandler, content=CONTENT) as running:
        yield running


def fetch(web: Web, manner: str, folder: Path, **options: object) -> Path:
    return download([f"{web.url}/{manner}/a.h5ad"], output_dir=folder, **options)[0]  # type: ignore[arg-type]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("manner", "num_requests"),
    [
        pytest.param("good", 1, id="a plain server"),
        pytest.param("drops", 2, id="a connection that breaks in the middle"),
        pytest.param("weak", 2, id="a break, and no ETag to resume with"),
        pytest.param("drips", 11, id="breaks more often than the retries, each time a little further"),
        pytest.param("rangeless", 2, id="a break, and ranges are ignored"),
        pytest.param("busy", 3, id="503 twice"),
        pytest.param("changes", 2, id="another ETag at the second request"),
        pytest.param("changes_unsaid", 3, id="another length at the second request"),
        pytest.param("moved", 1, id="a redirect to http"),
        pytest.param("chunked", 1, id="no stated length"),
    ],
)
def test_the_whole_file_arrives_from(web: Web, tmp_path: Path, manner: str, num_requests: int) -> None:
    path = fetch(web, manner, tmp_path)
    assert path.read_bytes() == CONTENT
    assert names_in(tmp_path) == ["a.h5ad"]
    assert web.seen[manner] == num_requests


def test_a_broken_download_goes_on_where_it_stopped_in_a_later_call(web: Web, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ended at 100,000 of 300,008 bytes\. .*100,000 bytes are kept"):
        fetch(web, "drops", tmp_path, retries=0)
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(".a.h5ad.") and part.stat().st_size == 100_000
    assert fetch(web, "drops", tmp_path).read_bytes() == CONTENT
    assert web.headers[-1]["Range"] == "bytes=100000-"
    assert web.headers[-1]["If-Range"] == '"one"'


def test_a_download_stopped_just_before_the_rename_fetches_no_byte_again(web: Web, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ended at"):
        fetch(web, "drops", tmp_path, retries=0)
    (part,) = tmp_path.iterdir()
    part.write_bytes(CONTENT)
    asked = web.seen["drops"]
    assert fetch(web, "drops", tmp_path).read_bytes() == CONTENT
    assert web.seen["drops"] == asked + 1 and "Range" not in web.headers[-1]  # one look at the version


def test_a_part_from_another_address_is_dropped(web: Web, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ended at"):
        fetch(web, "drops", tmp_path, retries=0)
    fetch(web, "good", tmp_path)
    assert "Range" not in web.headers[-1] and names_in(tmp_path) == ["a.h5ad"]


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        pytest.param("html", r"/html/a\.h5ad is a web page \(.*login form\), not an HDF5 file", id="HTML"),
        pytest.param("garbage", r"is a file that begins with b'GIF89a.*, not an HDF5 file", id="other bytes"),
        pytest.param("empty", r"/empty/a\.h5ad is empty", id="nothing"),
        pytest.param("gone", r"/gone/a\.h5ad answers with status 404 Not Found\. Check the URL", id="404"),
        pytest.param("private", r"status 401.*user and password into the URL", id="401"),
        pytest.param("moved_to_disk", r"redirects to file://\.\.\., which is refused", id="a redirect to a file"),
    ],
)
def test_nothing_is_left_and_nothing_retried_after(web: Web, tmp_path: Path, manner: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fetch(web, manner, tmp_path)
    assert names_in(tmp_path) == []
    assert web.seen[manner] == 1


def test_files_that_are_not_hdf5_by_name_are_taken_as_they_are(web: Web, tmp_path: Path) -> None:
    assert download([f"{web.url}/html/readme.html"], output_dir=tmp_path)[0].read_bytes() == PAGE


def test_a_link_without_a_file_name_is_saved_under_the_name_that_the_server_gives(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/figshare/ndownloader/files/39546196"
    assert download([url], output_dir=tmp_path) == [tmp_path / "pancreas.h5ad"]
    assert (tmp_path / "pancreas.h5ad").read_bytes() == CONTENT and names_in(tmp_path) == ["pancreas.h5ad"]
    assert download([url], output_dir=tmp_path) == [tmp_path / "pancreas.h5ad"], "it is there already"


def test_a_name_that_the_server_gives_never_leads_out_of_the_folder(web: Web, tmp_path: Path) -> None:
    assert download([f"{web.url}/evil/files/1"], output_dir=tmp_path / "out") == [tmp_path / "out" / ".bashrc"]


def test_a_link_to_which_the_server_gives_no_name_keeps_its_own(web: Web, tmp_path: Path) -> None:
    assert download([f"{web.url}/good/files/39546196"], output_dir=tmp_path) == [tmp_path / "39546196"]


def test_a_right_checksum_passes_and_a_wrong_one_drops_the_file(web: Web, tmp_path: Path) -> None:
    sums = tmp_path / "sums.txt"
    sums.write_text(f"# shards\n\n{DIGEST.upper()} *a.h5ad\n{'0' * 64}  b.h5ad\n")
    assert fetch(web, "good", tmp_path / "out", checksums=sums).read_bytes() == CONTENT
    with pytest.raises(InputError, match=rf"has sha256 {DIGEST}, but 0{{64}} was expected"):
        download([f"{web.url}/good/b.h5ad"], output_dir=tmp_path / "out", checksums=sums)
    assert names_in(tmp_path / "out") == ["a.h5ad"]


def test_a_file_without_a_line_in_the_checksums_is_refused_before_any_request(web: Web, tmp_path: Path) -> None:
    (tmp_path / "sums.txt").write_text(f"{DIGEST}  other.h5ad\n")
    with pytest.raises(InputError, match=r"sums\.txt has no line for 'a\.h5ad'"):
        fetch(web, "good", tmp_path, checksums=tmp_path / "sums.txt")
    assert not web.seen


def test_a_malformed_checksum_file_is_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "sums.txt").write_text(f"{DIGEST}  a.h5ad\nd41d8cd9  b.h5ad\n")
    with pytest.raises(InputError, match=r"Line 2 of .*sums\.txt is not '<sha256>  <name>': 'd41d8cd9"):
        read_checksums(tmp_path / "sums.txt")


def test_a_complete_file_is_skipped_and_another_one_refused_unless_overwritten(web: Web, tmp_path: Path) -> None:
    target = tmp_path / "a.h5ad"
    target.write_bytes(b"x" * len(CONTENT))
    fetch(web, "good", tmp_path)
    assert target.read_bytes() == b"x" * len(CONTENT)  # same size, no checksum known: taken for complete
    target.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"exists with 4 bytes, but the remote file has 300,008\. Pass --overwrite"):
        fetch(web, "good", tmp_path)
    assert target.read_bytes() == b"mine"
    assert fetch(web, "good", tmp_path, overwrite=True).read_bytes() == CONTENT


def test_a_file_with_the_right_checksum_is_skipped_without_the_network(web: Web, tmp_path: Path) -> None:
    (tmp_path / "sums.txt").write_text(f"{DIGEST}  a.h5ad\n")
    (tmp_path / "a.h5ad").write_bytes(CONTENT)
    fetch(web, "gone", tmp_path, checksums=tmp_path / "sums.txt")
    assert not web.seen
    (tmp_path / "a.h5ad").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(InputError, match=r"exists and its sha256 is not"):
        fetch(web, "gone", tmp_path, checksums=tmp_path / "sums.txt")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a Linux device")
def test_a_disk_that_fills_up_on_the_way_is_named(web: Web, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ended at"):
        fetch(web, "drops", tmp_path, retries=0)
    (part,) = tmp_path.iterdir()
    part.unlink()
    part.symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)\. Make room"):
        fetch(web, "drops", tmp_path)


def test_an_output_folder_that_is_a_file_is_refused(web: Web, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match=r"out/a.h5ad cannot be written .*another --output_dir"):
        fetch(web, "good", tmp_path / "out")


def test_a_password_opens_the_door_and_appears_in_no_message(
    web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = web.url.removeprefix("http://")
    with caplog.at_level("DEBUG"):
        download([f"http://ann:s3cret@{host}/private/a.h5ad?token=abc"], output_dir=tmp_path)
        with pytest.raises(InputError) as caught:
            download([f"http://ann:s3cret@{host}/truncates/b.h5ad?token=abc"], output_dir=tmp_path, retries=0)
    written = caplog.text + str(caught.value) + "".join(names_in(tmp_path))
    assert "s3cret" not in written and "abc" not in written


def test_brace_patterns_name_several_files(web: Web, tmp_path: Path) -> None:
    config = DownloadConfig(sources=[f"{web.url}/good/shard_{{0..1}}.h5ad"], output_dir=str(tmp_path), retries=1)
    paths = run_download(config)
    assert [path.name for path in paths] == ["shard_0.h5ad", "shard_1.h5ad"]
    assert all(path.read_bytes() == CONTENT for path in paths)


def test_two_downloads_of_one_file_refuse_each_other(web: Web, tmp_path: Path) -> None:
    with (
        claimed(tmp_path / "a.h5ad", flag="output_dir"),
        pytest.raises(InputError, match="being written by another process"),
    ):
        fetch(web, "good", tmp_path)
    assert not web.seen


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], r"no input file was given"),
        (["file:///etc/passwd"], r"file:// is none of https://"),
        (["https://host:port/a.h5ad"], r"malformed"),
        (["https:///a.h5ad"], r"names no host"),
        (["https://host/"], r"https://host/ cannot be listed"),
        (["https://host/..%2f..%2fetc"], r"is not the URL of one file"),
        (["https://host/a.h5ad", "https://host/b/a.h5ad"], r"Two sources would be written to 'a\.h5ad'"),
    ],
)
def test_sources_are_checked_before_any_request(sources: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        download(sources, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
