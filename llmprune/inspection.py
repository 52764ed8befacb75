"""What can be pruned from a model, before anything is: sizes, and where the time goes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmprune.architecture import BLOCK_KINDS, BlockKind
from llmprune.measure.host import fingerprint
from llmprune.measure.profile import time_shares
from llmprune.measure.throughput import Workload
from llmprune.models.parent import Parent
from llmprune.models.sizes import size_of


def inspect_parent(parent: Parent, workload: Workload, repeats: int) -> dict[str, Any]:
    """Shape and sizes of the model, and for every block its units, parameters, bytes and share of measured time."""
    shares = time_shares(parent, workload, repeats)
    layers = [
        {
            "layer": layer,
            **{
                kind: {
                    "kv_groups" if kind == "attention" else "ffn_width": parent.shape.units(kind),
                    **_block_size(parent, layer, kind),
                    "prefill_share": shares.prefill[layer, kind],
                    "decode_share": shares.decode[layer, kind],
                }
                for kind in BLOCK_KINDS
            },
        }
        for layer in range(parent.shape.layers)
    ]
    return {
        "model": parent.source,
        "model_type": parent.model.config.model_type,
        "shape": asdict(parent.shape),
        **asdict(size_of(parent.model, parent.shape, parent.shape.architecture)),
        "layers": layers,
        "measured_on": {"workload": workload.to_json(), "repeats": repeats, "host": fingerprint()},
    }


def _block_size(parent: Parent, layer: int, kind: BlockKind) -> dict[str, int]:
    """Parameters and bytes of the projections that shrink with the block's units."""
    block, names = parent.block(layer, kind), parent.names(kind)
    modules = [block.get_submodule(name) for name in (*names.rows, names.output)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return {
        "params": sum(parameter.numel() for parameter in parameters),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    }
