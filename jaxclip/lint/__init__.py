"""Finds chains of transforms that do not do what they say."""

from jaxclip.lint.chain import Finding as Finding
from jaxclip.lint.chain import lint_chain as lint_chain
