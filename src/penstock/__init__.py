"""Penstock: an LLM inference framework. A service that understands people, an engine for tokens."""

PROJECT = "penstock"
__version__ = "0.1.0"
