"""Running what was exported, with numpy and onnxruntime alone."""
