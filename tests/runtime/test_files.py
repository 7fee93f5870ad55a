"""Files that appear whole or not at all."""

import pytest

from ssnas.errors import InputError
from ssnas.runtime.files import written_whole


def test_a_failed_writing_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "text"
    path.write_text("old")
    refused = pytest.raises(InputError, match=r"text: cannot be written \(disk\)")
    with refused, written_whole(path) as partial:
        partial.write_text("ne")
        raise OSError("disk")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["text"]
