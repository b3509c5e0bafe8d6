from pathlib import Path

import pytest
from small_pictures import save_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder)
    return folder
