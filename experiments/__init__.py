"""Studies of what the reward is worth: grids of training runs, and reports of them."""
