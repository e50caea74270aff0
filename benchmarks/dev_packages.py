"""Imported first of all by benchmarks that need what `make install-dev` installs."""

from benchmarks.needs import packages

packages("psutil", "transformers")
