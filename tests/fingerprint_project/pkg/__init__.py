"""A package."""

from pkg.sub import trim as trim
