"""The format "onnx": a file for ONNX Runtime, and for all else that reads ONNX."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vimoe.files import temporary_folder
from vimoe.models.export.format import Format, Forward

OPSET = 18
LARGEST = 1_900_000_000  # bytes of weights in the file itself; protobuf ends at 2 GB, beyond it they lie beside


class OnnxFile(Format):
    """An ONNX file with the input "images" and the output "logits"."""

    file, int8_file, script = "model.onnx", "model-int8.onnx", "predict.py"
    needs = ("onnx", "onnxscript", "onnxruntime")

    def write(self, program: ExportedProgram, path: Path) -> None:
        weights = sum(tensor.nbytes for tensor in program.state_dict.values())
        with _quiet("onnxscript", "torch.onnx"):
            written = torch.onnx.export(
                program,
                program.example_inputs[0],
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
                dynamo=True,
                verbose=False,
            )
            assert written is not None
            written.save(path, external_data=weights > LARGEST)

    def load(self, path: Path, weights: Mapping[str, Tensor] | None = None) -> Forward:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(w.numpy()) for name, w in (weights or {}).items()}
        if values.keys() - {each.name for each in onnx.load(path, load_external_data=False).graph.initializer}:
            raise KeyError(f"{path} has no {', '.join(values)}")
        for name, value in values.items():
            options.add_initializer(name, value)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def forward(images: Tensor, _held: Any = values) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy(force=True)})[0])

        return forward

    def quantize(self, source: Path, path: Path) -> None:
        """Write matrices in int8, with a scale for each column; tokens are quantised as they come.

        Routers stay in float32, as their scores do in every precision. Weights have 7 of the 8 bits, because products
        of full ones overflow on processors without VNNI.
        """
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic, shape_inference

        nodes = onnx.load(source, load_external_data=False).graph.node
        routers = [node.name for node in nodes if _is_of_router(node)]
        beside = source.with_name(f"{source.name}.data").exists()
        with temporary_folder(path.parent) as folder, _quiet("root"):
            prepared = folder / source.name  # with all weights as constants: others would not be quantised
            shape_inference.quant_pre_process(
                source, prepared, skip_symbolic_shape=True, save_as_external_data=beside, all_tensors_to_one_file=True
            )
            quantize_dynamic(
                prepared,
                path,
                op_types_to_quantize=["MatMul"],  # a Gemm becomes one first
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*routers, *(f"{name}_MatMul" for name in routers)],
                use_external_data_format=beside,
            )


def _is_of_router(node: Any) -> bool:
    """Return True for a node that torch's exporter made of an operator in a module named "router"."""
    scopes = next((each.value for each in node.metadata_props if each.key == "pkg.torch.onnx.name_scopes"), "[]")
    return any(scope.split(".")[-1] == "router" for scope in ast.literal_eval(scopes))


def _stable_sort() -> Any:
    """Return the translation of a stable sort: ONNX orders equal numbers by their index."""
    from onnxscript import opset18

    op: Any = opset18  # its types leave out that a shape is of integers

    def sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=descending, sorted=True)

    return sort


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Keep other libraries' remarks on their own work out of the log."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
