"""The ground floor of Limbeck: recipes, artifacts, errors, progress. Imports neither torch nor onnx."""

__version__ = "0.1.0"
