"""Make image classifiers from the Hugging Face Hub smaller for real."""

__version__ = "0.1.0"
