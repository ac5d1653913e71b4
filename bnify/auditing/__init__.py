"""AUDIT: a linter for normalization. Rules read a subject and yield findings."""

from __future__ import annotations
