"""One script a cache, each in a process of its own: the same work for all of them, see `_child`."""
