"""What hypernodes costs, measured against the same work by hand and against its peers: see README.md."""
