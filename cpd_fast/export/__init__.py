"""Write networks to files that run without this library, each checked against PyTorch before it is kept."""

from cpd_fast.export.onnx import CPU, CUDA, OPSET, export_onnx, onnx_feed, onnx_session
from cpd_fast.export.pt2 import export_pt2

__all__ = ["CPU", "CUDA", "OPSET", "export_onnx", "export_pt2", "onnx_feed", "onnx_session"]
