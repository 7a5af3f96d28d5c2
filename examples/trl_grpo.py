"""GRPO on Cross-Model Entropy: `python examples/trl_grpo.py POLICY VERIFIER OUTPUT_DIR [OPTION ...]`.

Options are those of TRL's GRPOConfig; on a CPU give `--use-cpu --bf16 False`."""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, TrlParser

from cme import CMEReward

if len(sys.argv) < 4:
    sys.exit(__doc__)
policy, verifier, output_dir, *options = sys.argv[1:]
(config,) = TrlParser(GRPOConfig).parse_args_and_config(["--output_dir", output_dir, *options])
prompts = [f"What is the capital of {country}?" for country in ("France", "Japan", "Kenya", "Peru")]
trainer = GRPOTrainer(policy, [CMEReward(verifier)], config, Dataset.from_dict({"prompt": prompts}))
trainer.train()
trainer.save_model()
