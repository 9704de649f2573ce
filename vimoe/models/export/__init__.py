"""Models as files that run without vimoe: ONNX, and programs of torch.export."""
