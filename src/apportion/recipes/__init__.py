"""Whole experiments as commands: python -m apportion.recipes.NAME --help."""
