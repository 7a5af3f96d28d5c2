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


@pytest.fixture
def options(tiny_models, tmp_path):
    """Options of `python -m cme.train`: the demo with tiny models, all but the number of steps."""
    from train_run import options_for

    return options_for(tiny_models, tmp_path)
