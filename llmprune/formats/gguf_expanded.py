"""Expand a GGUF file to float32: the same numbers and the same metadata, from which nothing has to be rounded."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from llmprune.core.files import atomic_path


def write_expanded(source: Path, to: Path) -> None:
    """Write to `to` what `source` holds, every tensor dequantised to f32: four bytes a number.

    Raises RunDirectoryError if `to` cannot be written.
    """
    reader = gguf.GGUFReader(source)
    with atomic_path(to) as temporary:
        writer = gguf.GGUFWriter(temporary, str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents()))
        try:
            _copy_metadata(reader, writer)
            f32 = gguf.GGMLQuantizationType.F32
            for tensor in reader.tensors:
                # The file names the fastest axis first.
                shape = tuple(int(size) for size in reversed(tensor.shape))
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * tensor.n_elements, raw_dtype=f32)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in reader.tensors:
                writer.write_tensor_data(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        finally:
            writer.close()


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for field in reader.fields.values():
        # What the writer itself says of the file.
        if field.name.startswith("GGUF.") or field.name in (
            gguf.Keys.General.ARCHITECTURE,
            gguf.Keys.General.FILE_TYPE,
        ):
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
