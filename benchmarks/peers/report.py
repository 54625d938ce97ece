"""The page."""

from __future__ import annotations
