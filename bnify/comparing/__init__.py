"""COMPARE: the same model trained with each kind of norm, and what can be said about it.

question → data, arms → schedule (what fits the budget) → trials → analysis → Comparison.
"""
