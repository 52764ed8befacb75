"""The types in which a GGUF file stores numbers, and ggml's own rounding to them: none of it is done here.

Shapes: R rows, C numbers of each.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmprune.core.errors import ModelError
from llmprune.core.recipe import GgufType
from llmprune.numerics.llamacpp_library import library

Blocks = NDArray[Any]
"""What a file holds of some rows: (R, bytes of a row) uint8, or the numbers themselves in f32 and f16."""
_F16_MAX = float(np.finfo(np.float16).max)
_PLAIN: tuple[GgufType, ...] = ("f32", "f16")


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One type, with the name that a file of nothing else has."""

    type: gguf.GGMLQuantizationType
    file: gguf.LlamaFileType

    @property
    def block(self) -> int:
        """Numbers that are stored under one scale: a row is a whole number of blocks."""
        return gguf.GGML_QUANT_SIZES[self.type][0]

    @property
    def bits(self) -> float:
        """Bits a number takes, scales counted in."""
        numbers, size = gguf.GGML_QUANT_SIZES[self.type]
        return 8 * size / numbers


_T, _F = gguf.GGMLQuantizationType, gguf.LlamaFileType
TYPES: dict[GgufType, GgmlType] = {
    "f32": GgmlType(_T.F32, _F.ALL_F32),
    "f16": GgmlType(_T.F16, _F.MOSTLY_F16),
    "q8_0": GgmlType(_T.Q8_0, _F.MOSTLY_Q8_0),
    "q6_k": GgmlType(_T.Q6_K, _F.MOSTLY_Q6_K),
    "q5_k": GgmlType(_T.Q5_K, _F.MOSTLY_Q5_K_S),
    "q5_1": GgmlType(_T.Q5_1, _F.MOSTLY_Q5_1),
    "q5_0": GgmlType(_T.Q5_0, _F.MOSTLY_Q5_0),
    "q4_k": GgmlType(_T.Q4_K, _F.MOSTLY_Q4_K_S),
    "q4_1": GgmlType(_T.Q4_1, _F.MOSTLY_Q4_1),
    "q4_0": GgmlType(_T.Q4_0, _F.MOSTLY_Q4_0),
    "iq4_nl": GgmlType(_T.IQ4_NL, _F.MOSTLY_IQ4_NL),
    "iq4_xs": GgmlType(_T.IQ4_XS, _F.MOSTLY_IQ4_XS),
    "q3_k": GgmlType(_T.Q3_K, _F.MOSTLY_Q3_K_S),
    "q2_k": GgmlType(_T.Q2_K, _F.MOSTLY_Q2_K),
}


def to_blocks(values_RC: Tensor, weights: GgufType, squares_C: Tensor | None = None) -> Blocks:
    """A matrix as a file stores it, every row for itself. `squares_C`, the mean square of each column's input, weighs
    the errors (llama.cpp's importance matrix); f32, f16 and q8_0 take no notice of it.

    Raises ModelError if a number is not finite or, for other types than f32, beyond f16; and if llama.cpp, which rounds
    to all but f32, f16 and q8_0, is not there.
    """
    own = TYPES[weights]
    numbers = values_RC.detach().to("cpu", torch.float32).contiguous().numpy()
    if weights != "f32" and not np.abs(numbers).max(initial=0) <= _F16_MAX:
        raise ModelError(f"weights must be numbers within +-{_F16_MAX:.0f} for gguf in {weights}; use f32")
    if weights in (*_PLAIN, "q8_0"):
        stored: Blocks = gguf.quants.quantize(numbers, own.type)
        return stored
    blocks = np.empty(gguf.quant_shape_to_byte_shape(numbers.shape, own.type), np.uint8)
    rows, columns = numbers.shape
    importance = None if squares_C is None else squares_C.detach().to("cpu", torch.float32).contiguous().numpy()
    assert importance is None or importance.shape == (columns,), "one for each column"
    pointers = [
        array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for array in (numbers, importance) if array is not None
    ]
    written = library().ggml_quantize_chunk(
        int(own.type), pointers[0], blocks.ctypes.data_as(ctypes.c_void_p), 0, rows, columns, (*pointers, None)[1]
    )
    assert written == blocks.nbytes, f"{written} bytes of {blocks.nbytes}"
    return blocks


def from_blocks(blocks: Blocks, weights: GgufType) -> Tensor:
    """(R, C) float32: the numbers that a file says."""
    return torch.from_numpy(np.array(gguf.quants.dequantize(blocks, TYPES[weights].type), dtype=np.float32))
