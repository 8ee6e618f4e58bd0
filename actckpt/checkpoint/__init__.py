"""Training states on disk: the format, how one is committed, checked, found and retired."""
