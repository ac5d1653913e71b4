"""PLAN of an insertion: where a norm goes, and why not elsewhere."""

from bnify.insertion.options import InsertOptions
from bnify.insertion.plan import plan_insert, reconciled, training_batch

__all__ = ["InsertOptions", "plan_insert", "reconciled", "training_batch"]
