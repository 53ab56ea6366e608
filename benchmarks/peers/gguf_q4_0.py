"""A GGUF file's matrices in q4_0, its embedding and head in q8_0, as llama.cpp's own quantizer shares them out.

python gguf_q4_0.py SOURCE.gguf TARGET.gguf
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

reader = GGUFReader(sys.argv[1])
writer = GGUFWriter(sys.argv[2], reader.fields["general.architecture"].contents())
for name, field in reader.fields.items():
    if name.startswith("GGUF.") or name == "general.architecture":
        continue
    kind, *inner = field.types
    value = 2 if name == "general.file_type" else field.contents()  # mostly q4_0
    writer.add_key_value(name, value, kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
for tensor in reader.tensors:
    data, kind = tensor.data, tensor.tensor_type
    if len(tensor.shape) == 2:
        outer = tensor.name.startswith(("token_embd", "output"))
        kind = GGMLQuantizationType.Q8_0 if outer else GGMLQuantizationType.Q4_0
        data = quantize(dequantize(data, tensor.tensor_type).astype(np.float32), kind)
    writer.add_tensor(tensor.name, data, raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
