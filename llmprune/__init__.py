"""llmprune: find, inside a pretrained causal LM, the smaller network that is best at a measured speed.

Importing it teaches transformers' auto classes the pruned model types, so that pruned checkpoints load without
`trust_remote_code`.
"""

from importlib.metadata import version

from llmprune.blocks.library import BlockLibrary, build_library
from llmprune.choices.architecture import Architecture, LayerChoice, ParentShape
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.space import Space
from llmprune.core.errors import LlmpruneError
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_text import load_recipe
from llmprune.data.tokens import TokenSplits, build_token_splits
from llmprune.measure.quality.perplexity import Quality, score
from llmprune.measure.speed.throughput import Speed, Workload, measure_paired
from llmprune.models.checkpoint import write_checkpoint
from llmprune.models.parent import Parent, load_parent, make_parent
from llmprune.models.surgery import prune, register_pruned_classes
from llmprune.pipeline.commands import compress
from llmprune.pipeline.run import Run

__version__ = version("llmprune")

__all__ = [
    "Architecture",
    "AttentionChoice",
    "BlockLibrary",
    "FfnChoice",
    "LayerChoice",
    "LlmpruneError",
    "Parent",
    "ParentShape",
    "Quality",
    "Recipe",
    "Run",
    "Space",
    "Speed",
    "TokenSplits",
    "Workload",
    "build_library",
    "build_token_splits",
    "compress",
    "load_parent",
    "load_recipe",
    "make_parent",
    "measure_paired",
    "prune",
    "score",
    "write_checkpoint",
]

register_pruned_classes()
