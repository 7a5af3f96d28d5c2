import pytest


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
