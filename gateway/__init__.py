"""Veklom Gateway: governed execution of LLM calls with the customer's own provider keys."""

__version__ = "0.1.0"
