"""megarpt: distributed pretraining that chooses what each token is worth."""

__version__ = "0.1.0"
