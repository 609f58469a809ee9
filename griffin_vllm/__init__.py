"""GRIFFIN speculative decoding for vLLM (arXiv 2502.11018): serve, train and measure draft heads."""

__version__ = "0.1.0"
