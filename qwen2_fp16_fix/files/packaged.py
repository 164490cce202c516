"""Where the data of this package lies."""

from pathlib import Path

DEMO_CHECKPOINT = Path(__file__).parents[1] / "demo_checkpoint"
PASSAGE = DEMO_CHECKPOINT / "held_out.txt"  # a text that the demo checkpoint was not trained on
