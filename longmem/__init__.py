"""Long-term memory for Hugging Face language models, after LongMem (Wang et al. 2023, arXiv 2306.07174)."""

__version__ = "0.1.0"
