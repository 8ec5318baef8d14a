"""The same work in hypernodes and in other frameworks: a script each, for the workloads in `_compare`."""
