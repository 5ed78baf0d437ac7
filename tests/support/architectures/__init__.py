"""The catalogue of models that the sweep and the tests prune: one module a library, every model built on demand."""
