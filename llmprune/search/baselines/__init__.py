"""What a child has to beat: published methods and luck, at the same measured speed, judged as the search's children."""

from llmprune.search.baselines.chance import random_architecture
from llmprune.search.baselines.given import SPEED_TOLERANCE
from llmprune.search.baselines.methods import METHODS

__all__ = ["METHODS", "SPEED_TOLERANCE", "random_architecture"]
