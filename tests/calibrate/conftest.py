"""What tests of texts share."""

import pytest


@pytest.fixture
def write(tmp_path):
    """Return a function (content, name) -> path of a new file, as a string."""

    def make(content, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make
