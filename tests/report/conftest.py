import pytest

from tests.report.runs import write_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "main"
    write_run(folder)
    return folder
