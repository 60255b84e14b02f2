"""``Pruner`` inside other people's training loops: Lightning, Hugging Face Trainer, MMEngine.

Each file needs its library, an optional extra, and is imported by name; nothing is imported from here.
"""
