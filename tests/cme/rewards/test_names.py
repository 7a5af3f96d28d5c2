import subprocess
import sys

import pytest

from cme.errors import CMEError
from cme.rewards.names import HELP, REWARDS, parse_rewards


def test_names_and_options_are_read():
    def parsed(*names):
        return [(reward.name, reward.option) for reward in parse_rewards(names)]

    assert parsed("cme", "pmi:0.5", "random-verifier:1") == [("cme", None), ("pmi", 0.5), ("random-verifier", 1)]
    assert parsed("cme-min:a, b", "cme-mean:c") == [("cme-min", ("a", "b")), ("cme-mean", ("c",))]
    assert parsed("pmi", "random-verifier") == [("pmi", 1.0), ("random-verifier", 0)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("lenght", "'lenght' is not a reward; there are cme, cme-dense, length"),
        ("cme+0.5*length", r"'cme\+0.5\*length' is not a reward; .* their weights with --reward-weights"),
        ("", "names no reward: give cme, cme-dense"),
        ("cme-min", "name at least one verifier beside --verifier"),
        ("length cme-mean:,", "name at least one verifier beside --verifier"),
        ("pmi:high", "--reward pmi:high: could not convert string to float: 'high'"),
        ("pmi:nan", "must be a finite number"),
        ("cme random-verifier:1.5", "invalid literal for int"),
        ("cme:google/gemma-3-1b-it", "--reward cme:google/gemma-3-1b-it: it takes no option"),
        ("cme length:5", "--reward length:5: it takes no option"),
        ("pmi:0.5 length pmi:1", "names pmi twice"),
        (
            "cme-dense length",
            "--reward cme-dense length: cme-dense rewards tokens, not responses, and stands alone",
        ),
    ],
)
def test_what_is_no_reward_is_named(names, message):
    with pytest.raises(CMEError, match=message):
        parse_rewards(names.split())


def test_every_reward_is_in_the_help_text_and_takes_no_model_library():
    assert all(f"'{name}" in HELP for name in REWARDS)
    code = "import sys, cme.rewards.names; assert not {'torch', 'transformers', 'trl'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
