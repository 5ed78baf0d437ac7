"""dwindle makes trained PyTorch models smaller and faster for real, and proves that it did."""

__version__ = "0.1.0"
