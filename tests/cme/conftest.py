import pytest


@pytest.fixture
def options(tiny_models, tmp_path):
    """Options of `python -m cme.train`: the demo with tiny models, all but the number of steps."""
    from train_run import options_for

    return options_for(tiny_models, tmp_path)
