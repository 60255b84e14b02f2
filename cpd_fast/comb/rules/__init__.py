"""How channels run through the operators: importing this fills the rule table, one file a family of operators."""

from cpd_fast.comb.rules import elementwise, products, reductions, shapes

__all__ = ["elementwise", "products", "reductions", "shapes"]
