"""Settings that must be made before libraries are imported, and fixtures of several packages."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a wrong name must not wait for the network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the Triton kernels run in Triton's interpreter

pytest.register_assert_rewrite("harness", "linear_problem")  # of tests/support


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of a tiny generator, which chats, and of a tiny verifier, which does not."""
    import tiny

    folders = {}
    for name, seed, chat in (("generator", 0, True), ("verifier", 1, False)):
        folder = tmp_path_factory.mktemp("models") / name
        tiny.llama(seed).save_pretrained(folder)
        tiny.tokenizer(chat).save_pretrained(folder)
        folders[name] = str(folder)
    return folders
