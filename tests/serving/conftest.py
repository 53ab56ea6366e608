"""A server that the tests of this package ask."""

import shutil

import pytest

from helpers.methods import LORAS, lora_files
from helpers.servers import running


@pytest.fixture(scope="session")
def served(llama, tmp_path_factory):
    """A tiny Llama under the name base and four LoRAs, `lora0` to `lora3`, in fp32; three answers at a time."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("served") / "base")
    files = {f"lora{i}": path for i, path in enumerate(lora_files(folder, LORAS))}
    with running(folder, files, batch_size=3, context=256, max_queue=20) as server:
        yield server


@pytest.fixture
def client(served):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
