"""A package, so that another one called tests in site-packages does not come before it."""
