"""Kaggle: a session's set-up, what is installed there, and how notebooks, models and wheels get
there."""

from .session import setup

__all__ = ["setup"]
