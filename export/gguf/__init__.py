"""GGUF files of a student, for llama.cpp and Ollama."""
