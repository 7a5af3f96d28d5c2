"""Scores of a published model against EleutherAI's lm-evaluation-harness: `pip install -e '.[lm-eval]'`."""

import pytest
from harness import PROMPTS, RESPONSES, assert_agree
from transformers import AutoModelForCausalLM

from cme.demo.models import local_path
from cme.text.templates import PLAIN_TEMPLATE
from cme.verifier import Verifier

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[lm-eval]'")
pytestmark = pytest.mark.real_models


def test_smollm2_agrees_with_the_harness():
    path = str(local_path("smollm2-135m-instruct"))
    verifier = Verifier.from_pretrained(path, device="cpu", template=PLAIN_TEMPLATE)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype="float32", attn_implementation="eager")
    assert_agree(verifier, theirs, PROMPTS, RESPONSES)
